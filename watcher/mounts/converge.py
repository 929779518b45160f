# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bring a service to a stack, in all its namespaces; do nothing where it is there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from watcher.model import Copy, Kind, Layer, Stack
from watcher.mounts.compare import shows
from watcher.mounts.namespaces import Namespace, of_service
from watcher.mounts.swap import swap
from watcher.mounts.table import Mounted
from watcher.mounts.workshop import Workshop
from watcher.process import Process

_COMPARED_MAX = 64

# A namespace's identity, the mount on its /etc, a stack's identity.
Compared = tuple[tuple[int, int], int, str]


@dataclass(frozen=True, slots=True)
class Converged:
    """What was found and done.

    Attributes:
        before: what the main process showed.
        swaps: in how many namespaces the stack was swapped.
        usec: what that took, microseconds.
        remarks: about mounts below `/etc`, one line each.
    """

    before: Mounted
    swaps: int
    usec: int = 0
    remarks: tuple[str, ...] = ()


def converge(
    shop: Workshop,
    main: Process,
    pids: Iterable[int],
    stack: Stack,
    copies: Mapping[str, Copy],
    begin: Callable[[], None],
    compared: dict[Compared, bool],
) -> Converged:
    """Swap wherever the wanted stack is not shown. Runs on a worker of the workshop.

    Args:
        pids: of all processes of the service.
        compared: what stacks without identity were found to show, so that each is compared once.
        begin: called before the first swap, if there is one.

    Raises:
        Whatever `of_service()` and `swap()` do.
    """
    with of_service(shop, main, pids) as namespaces:
        before = namespaces[-1].mounted
        behind = [one for one in namespaces if _behind(shop, one, stack, copies, compared)]
        if behind:
            begin()
        done = [swap(shop, one.fd, stack, copies) for one in behind]
    remarks = dict.fromkeys(remark for swapped in done for remark in swapped.remarks)
    return Converged(before, len(done), sum(swapped.usec for swapped in done), tuple(remarks))


def _behind(
    shop: Workshop,
    namespace: Namespace,
    stack: Stack,
    copies: Mapping[str, Copy],
    compared: dict[Compared, bool],
) -> bool:
    mounted = namespace.mounted
    if mounted.layers is not None:
        return mounted.stack != stack.id or mounted.doubled
    key = (namespace.identity, mounted.top, stack.id)
    if key not in compared:
        if len(compared) == _COMPARED_MAX:
            compared.clear()
        compared[key] = shows(shop, namespace.fd, stack, copies)
    return not compared[key]


def as_stack(mounted: Mounted) -> Stack:
    """The stack of a mount table in the plain words of the model; slots and sources are not known there."""
    layers = mounted.layers or ()
    return Stack(tuple(Layer("", one.name, one.version, one.digest, Kind.IMAGE, "") for one in layers))
