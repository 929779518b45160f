# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bring a service to a stack, in all its namespaces; do nothing where it is there already.

It is there if the same layers lie on the same base. Where the host has merged its own confexts since, or taken them
away, they lie beneath the service's stack, which was made from what `/etc` was before: the same stack is made anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from watcher.model import Copy, Kind, Layer, Stack, problem
from watcher.mounts.compare import shows
from watcher.mounts.etc import Moved
from watcher.mounts.namespaces import NESTED_MAX, Namespace, of_service
from watcher.mounts.process import Process
from watcher.mounts.swap import Swapped, swap
from watcher.mounts.table import Mounted
from watcher.mounts.workers import MountWorkers

_COMPARED_MAX = 64
_TOO_MANY = f"more than {NESTED_MAX} mount namespaces, or mounts in them: the others keep the old stack"

# By the mount on /etc (`Mounted.mount`) and a stack's identity: the base on which a mount that does not say from what
# it was made was found to show that stack; None: it shows something else. The kernel reuses a namespace's inode and an
# ID of the mount table, often at the next start of the same service: these cannot be the key.
Compared = dict[tuple[int, str], str | None]


@dataclass(frozen=True, slots=True)
class Converged:
    """What was found and done.

    Attributes:
        before: what the main process showed.
        swaps: in how many namespaces the stack was swapped.
        rebased: the main process showed the stack already, made from another base than there is now.
        usec: what that took, microseconds.
        remarks: about mounts below `/etc`, one line each.
    """

    before: Mounted
    swaps: int
    rebased: bool = False
    usec: int = 0
    remarks: tuple[str, ...] = ()


def converge(
    workers: MountWorkers,
    main: Process,
    pids: Iterable[int],
    stack: Stack,
    copies: Mapping[str, Copy],
    begin: Callable[[], None],
    compared: Compared,
    *,
    kept: Callable[[], Iterable[Stack]],
    elsewhere: Iterable[int] = (),
    patient: bool = False,
) -> Converged:
    """Swap wherever the wanted stack is not shown. Runs on a worker of the workshop.

    Args:
        patient: something that the stack may yet get is still being written: what systemd mounted when it started the
            service stays for the moment, it may be just that.
        pids: of all processes of the service.
        compared: what was found about mounts that do not say what they are, so that each is compared once.
        begin: called before each swap that is made.
        kept: see `of_service()`.
        elsewhere: see there.

    Raises:
        Whatever `of_service()` and `swap()` do.
    """
    done: list[Swapped] = []
    remarks: list[str] = []
    with of_service(workers, main, pids, lambda: (stack, *kept()), elsewhere) as found:
        bring = functools.partial(_bring, workers, stack, copies, begin, compared, patient)
        for nested in found.apart:
            _try(bring, nested, done, remarks)
        own = bring(found.main)
        rebased = own.done and _made_on(stack, compared, own.before) is not None
        for nested in found.following:
            _try(bring, nested, done, remarks)
        if found.too_many:
            remarks.append(_TOO_MANY)
    made = [swapped for swapped in (*done, own) if swapped.done]
    remarks += [remark for swapped in made for remark in swapped.remarks]
    return Converged(
        own.before,
        len(made),
        rebased,
        sum(swapped.usec for swapped in made),
        tuple(dict.fromkeys(remarks)),
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
    workers: MountWorkers,
    stack: Stack,
    copies: Mapping[str, Copy],
    begin: Callable[[], None],
    compared: Compared,
    patient: bool,
    namespace: Namespace,
) -> Swapped:
    def keep(mounted: Mounted) -> bool:
        if patient and mounted.layers is None:
            return True
        return _made_on(stack, compared, mounted) == mounted.base

    swapped = swap(workers, namespace.fd, stack, copies, begin, keep)
    before = swapped.before
    if patient and before.layers is None:
        return swapped
    key = (before.mount, stack.id)
    if before.made_on is None and _may_be(before, stack) and key not in compared:
        if len(compared) == _COMPARED_MAX:
            compared.clear()
        same = before.layers is not None or shows(workers, namespace.fd, stack, copies)
        compared[key] = before.base if same else None
        swapped = swap(workers, namespace.fd, stack, copies, begin, keep)
    return swapped


def _made_on(stack: Stack, compared: Compared, mounted: Mounted) -> str | None:
    """From which base the stack was made that a namespace shows; None if it is not this one."""
    if not _may_be(mounted, stack):
        return None
    if mounted.made_on is not None:
        return mounted.made_on
    return compared.get((mounted.mount, stack.id), mounted.base)


def _may_be(mounted: Mounted, stack: Stack) -> bool:
    """Whether it is that stack, or systemd's, which does not say."""
    return mounted.layers is None or (mounted.stack == stack.id and not mounted.doubled)


def as_stack(mounted: Mounted) -> Stack:
    """The stack of a mount table in the plain words of the model; slots and sources are not known there."""
    layers = mounted.layers or ()
    return Stack(tuple(Layer("", one.name, one.version, one.digest, Kind.IMAGE, "") for one in layers))
