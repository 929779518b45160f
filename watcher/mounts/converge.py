# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bring a service to a stack, in all its namespaces; do nothing where it is there already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from watcher.model import Copy, Kind, Layer, Stack, problem
from watcher.mounts.compare import shows
from watcher.mounts.namespaces import Namespace, of_service
from watcher.mounts.swap import Moved, Swapped, swap
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
        begin: called before each swap that is made.

    Raises:
        Whatever `of_service()` and `swap()` do.
    """
    done: list[Swapped] = []
    remarks: list[str] = []
    with of_service(shop, main, pids) as found:
        bring = functools.partial(_bring, shop, stack, copies, begin, compared)
        for nested in found.apart:
            _try(bring, nested, done, remarks)
        own = bring(found.main)
        for nested in found.following:
            _try(bring, nested, done, remarks)
    made = [swapped for swapped in (*done, own) if swapped.done]
    remarks += [remark for swapped in made for remark in swapped.remarks]
    return Converged(
        own.before, len(made), sum(swapped.usec for swapped in made), tuple(dict.fromkeys(remarks))
    )


def _try(
    bring: Callable[[Namespace], Swapped], nested: Namespace, done: list[Swapped], remarks: list[str]
) -> None:
    """A sandbox with users of its own, where what came with it is locked, may not be helped; the service must."""
    try:
        done.append(bring(nested))
    except (OSError, Moved) as error:
        remarks.append(f"a process in a mount namespace of its own keeps the old stack: {problem(error)}")


def _bring(
    shop: Workshop,
    stack: Stack,
    copies: Mapping[str, Copy],
    begin: Callable[[], None],
    compared: dict[Compared, bool],
    namespace: Namespace,
) -> Swapped:
    def keep(mounted: Mounted) -> bool:
        if mounted.layers is None:
            return compared.get((namespace.identity, mounted.top, stack.id), True)
        return mounted.stack == stack.id and not mounted.doubled

    swapped = swap(shop, namespace.fd, stack, copies, begin, keep)
    key = (namespace.identity, swapped.before.top, stack.id)
    if swapped.before.layers is None and key not in compared:
        if len(compared) == _COMPARED_MAX:
            compared.clear()
        compared[key] = shows(shop, namespace.fd, stack, copies)
        swapped = swap(shop, namespace.fd, stack, copies, begin, keep)
    return swapped


def as_stack(mounted: Mounted) -> Stack:
    """The stack of a mount table in the plain words of the model; slots and sources are not known there."""
    layers = mounted.layers or ()
    return Stack(tuple(Layer("", one.name, one.version, one.digest, Kind.IMAGE, "") for one in layers))
