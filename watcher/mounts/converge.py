# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bring a service to a stack, in all its namespaces; do nothing in one that shows it already.

A namespace shows the stack if its `/etc` has the same layers on the same base: the host's `/etc`, as it was then. If
the host merges or unmerges its own confexts later, the base becomes another one, and the same stack is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from watcher.model import Copy, Kind, Layer, Stack, problem
from watcher.mounts.compare import shows
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import Moved, look_up
from watcher.mounts.namespaces import NESTED_MAX, of_service
from watcher.mounts.process import Process
from watcher.mounts.swap import Swapped, swap
from watcher.mounts.table import Mounted
from watcher.mounts.workers import MountWorkers

_COMPARED_MAX = 64
_TOO_MANY = f"more than {NESTED_MAX} mount namespaces, or mounts in them: the others keep the old stack"

Compared = dict[tuple[int, str], str | None]
"""What was found about mounts that do not say from what they were made, by `Mounted.mount` and the identity of a stack:
the base on which the mount shows that stack; None: it shows something else. (Neither a namespace's inode nor an ID of
the mount table can be in the key: the kernel reuses them, often at the next start of the same service.)"""


@dataclass(frozen=True, slots=True)
class Converged:
    """What was found and done.

    Attributes:
        before: what the main process showed.
        swaps: in how many namespaces the stack was swapped.
        rebased: the main process showed the stack already, made from another base than there is now.
        usec: what that took, microseconds.
        remarks: about mounts below `/etc`, one line each.
        anew: the stack was to be swapped also where it was shown.
        left_out: a namespace keeps what it showed.
    """

    before: Mounted
    swaps: int
    rebased: bool = False
    usec: int = 0
    remarks: tuple[str, ...] = ()
    anew: bool = False
    left_out: bool = False


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
    other_mains: Callable[[], Iterable[int]] = tuple,
    patient: bool = False,
    anew: bool = False,
) -> Converged:
    """Swap wherever the wanted stack is not shown. Runs inside `MountWorkers.call()`.

    Args:
        pids: of all processes of the service.
        begin: called before each swap.
        compared: kept from call to call, so that each mount is compared once.
        kept: see `of_service()`.
        other_mains: see there.
        patient: a file is still being written that may change the stack. So what systemd mounted at the start of the
            service stays for now: it may turn out to be the right one.
        anew: swap also where it is shown: what is shown was made of a copy that is damaged.

    Raises:
        Whatever `of_service()` and `swap()` do.
    """
    work = _Work(workers, stack, copies, begin, compared, patient, anew)
    with of_service(workers, main, pids, lambda: (stack, *kept()), other_mains) as found:
        work.bring_nested(found.apart)
        own = work.bring(found.main)
        rebased = own.done and work.made_on(own.before) is not None
        new = device_of(workers, found.main) if anew else None
        work.bring_nested(one for one in found.following if new is None or device_of(workers, one) != new)
        if found.too_many:
            work.remarks.append(_TOO_MANY)
    made = [swapped for swapped in (*work.nested, own) if swapped.done]
    remarks = dict.fromkeys([*work.remarks, *(remark for swapped in made for remark in swapped.remarks)])
    usec = sum(swapped.usec for swapped in made)
    left_out = bool(work.remarks)
    return Converged(own.before, len(made), rebased, usec, tuple(remarks), anew, left_out)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done in each namespace; the first seven are arguments of `converge()`.

    Attributes:
        nested: what came of nested namespaces.
        remarks: why some of them were left out.
    """

    workers: MountWorkers
    stack: Stack
    copies: Mapping[str, Copy]
    begin: Callable[[], None]
    compared: Compared
    patient: bool
    anew: bool
    nested: list[Swapped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def bring_nested(self, namespaces: Iterable[int]) -> None:
        """If one cannot be swapped (a nested sandbox locks its mounts), go on: the service must get its stack."""
        for namespace in namespaces:
            try:
                self.nested.append(self.bring(namespace))
            except (OSError, Moved) as error:
                self.remarks.append(
                    f"a process in a mount namespace of its own keeps the old stack: {problem(error)}"
                )

    def bring(self, namespace: int) -> Swapped:
        swapped = self._swap(namespace)
        before = swapped.before
        key = before.mount, self.stack.id
        if (
            self.anew
            or before.made_on is not None
            or not self._may_be(before)
            or key in self.compared
            or self._waits(before)
        ):
            return swapped
        if len(self.compared) == _COMPARED_MAX:
            self.compared.clear()
        same = before.layers is not None or shows(self.workers, namespace, self.stack, self.copies)
        self.compared[key] = before.base if same else None
        return self._swap(namespace)

    def made_on(self, mounted: Mounted) -> str | None:
        """The base that the mounted stack was made from, if it is the wanted one; else None."""
        if not self._may_be(mounted):
            return None
        if mounted.made_on is not None:
            return mounted.made_on
        return self.compared.get((mounted.mount, self.stack.id), mounted.base)

    def _swap(self, namespace: int) -> Swapped:
        return swap(self.workers, namespace, self.stack, self.copies, self.begin, self._is_kept)

    def _is_kept(self, mounted: Mounted) -> bool:
        return not self.anew and (self._waits(mounted) or self.made_on(mounted) == mounted.base)

    def _waits(self, mounted: Mounted) -> bool:
        return self.patient and mounted.layers is None

    def _may_be(self, mounted: Mounted) -> bool:
        """Whether it may be the wanted stack. What systemd has mounted does not say which stack it is."""
        return mounted.layers is None or (mounted.stack == self.stack.id and not mounted.doubled)


def device_of(workers: MountWorkers, namespace: int) -> int:
    """Of what `/etc` shows: each overlay is one of its own."""
    with workers.entered(namespace), Descriptors() as fds:
        return os.fstat(fds.add(look_up())).st_dev


def as_stack(mounted: Mounted) -> Stack:
    """What a mount table says of a stack; slots and sources are not known there."""
    layers = mounted.layers or ()
    return Stack(tuple(Layer("", one.name, one.version, one.digest, Kind.IMAGE, "") for one in layers))
