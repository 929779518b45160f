# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drift: a file of an image covers one of the host's `/etc`, and that has changed since the stack was accepted.

The service does not see the change: an upgraded package, or a person who edits what is not used any more. Nothing is
done about it. It is said once, and kept in the record of the service (`State.covers`), which `status` and `diff` show:
so it is said once over a restart of the watcher, too. It is over when the host has again what it had, and when another
stack is accepted.

What the host had is noted a moment after the stack was accepted. Contents count: of a file its digest, of a link where
it leads. Modes, owners and times do not. What an image hides by other means (a whiteout, an opaque directory) is no
file below a file.

A look follows each round, and each change of a name in the host's `/etc` (fresh.py). It costs a stat of each file that
is covered. What is written in place changes no name, and is noticed at the next look: `status SERVICE` asks for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from watcher.images.layers import Layers, Type
from watcher.images.walk import DIRECTORY, Walk
from watcher.managers.base import Service
from watcher.model import Later, Refused, Stack, problem, shown
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.etc import open_inside
from watcher.mounts.parts import open_layers
from watcher.mounts.whereabouts import WorkerLost
from watcher.mounts.workers import Hung
from watcher.records.state import Covers, Drifted, State
from watcher.records.together import Gathering
from watcher.rounds.afterwards import Afterwards
from watcher.rounds.outcomes import say
from watcher.rounds.tools import Tools
from watcher.watch.offload import Unanswered

FILES_MAX = 2000
"""Files of one image that are looked at; the rest is not."""
BYTES_MAX = 16 << 20
"""A larger file of the host is known by its size and its time of change alone."""
_LATER_SEC = 0.5
"""So long changes gather: an upgrade of a package makes many."""
_SAID_MAX = 3
_KNOWN_MAX = 50_000

_FAULTS = (OSError, Refused, Later, Hung, WorkerLost, Unanswered)


class Drift:
    """Looks for drift. Everything here runs in the event loop, but for what is said to block."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._afterwards = Afterwards(self.look_now, _LATER_SEC, lambda: tools.offload.is_busy)
        self._said: dict[str, str] = {}
        # By digest: the files of a layer, which never change.
        self._files: dict[str, tuple[str, ...]] = {}
        # By what stat(2) says of a file of the host: its content.
        self._known: dict[tuple[int, ...], str] = {}

    def look(self, name: str) -> None:
        """A round of a service is over, or its base has changed."""
        self._afterwards.due(name)

    async def run(self) -> None:
        """Look until cancelled."""
        await self._afterwards.run()

    async def look_now(self, name: str) -> None:
        """Look at a service, and say what is new. What prevents that is said once, as a detail."""
        service = self._tools.manager.services.get(name)
        if service is None:
            self._said.pop(name, None)
            return
        try:
            new = await self._tools.in_turn(service, self._find)
        except _FAULTS as error:
            text = f"not known whether the host's files below its images have changed: {problem(error)}"
            if self._said.get(name) != text:
                self._said[name] = text
                say("debug", name, text)
            return
        self._said.pop(name, None)
        if new:
            say("warning", name, sentence(name, new))

    def _find(self, service: Service) -> Gathering[tuple[Drifted, ...]]:
        """What has to be said now. Blocks, also on the service's root."""
        store = self._tools.store
        state = store.state(service.slots)
        by = self._covering(state.accepted.stack) if service.root is not None else {}
        if not by and state.covers is None:
            return ()
        now = self._of_host(f"{(service.root or '').rstrip('/')}/etc", by) if by else {}
        new = noted(state, now, by)
        if new is state:
            return ()
        # Another stack may have been accepted, by `exec`: that is for the next look.
        kept = yield from store.changing(
            service.slots,
            lambda old: replace(old, covers=new.covers) if old.accepted == state.accepted else old,
        )
        if kept.covers != new.covers or new.covers is None:
            return ()
        return unsaid(state, new.covers)

    def _covering(self, stack: Stack) -> dict[str, str]:
        """By path below `/etc`: the layer that has a file there. Blocks."""
        known = {layer.digest: self._files.get(layer.digest) for layer in stack.layers}
        missing = {layer.digest: layer for layer in stack.layers if known[layer.digest] is None}
        if missing:
            with self._tools.store.using(), Descriptors() as fds:
                copies = [self._tools.store.copy(layer) for layer in missing.values()]
                workers = self._tools.workers
                opened = workers.call_apart(open_layers, fds, workers, copies, missing.__getitem__)
                for digest, root in opened.items():
                    known[digest] = tuple(files_of(root))
                    self._remember(digest, known[digest] or ())
        return {path: layer.label for layer in stack.layers for path in known[layer.digest] or ()}

    def _remember(self, digest: str, files: tuple[str, ...]) -> None:
        """Other threads may do the same meanwhile."""
        while self._files and sum(map(len, list(self._files.values()))) + len(files) > _KNOWN_MAX:
            self._files.pop(next(iter(self._files), ""), None)
        self._files[digest] = files

    def _of_host(self, etc: str, paths: Iterable[str]) -> dict[str, str]:
        """What the host has at each of these paths below its `/etc`, of those where it has something. Blocks."""
        if len(self._known) > _KNOWN_MAX:
            self._known.clear()
        with Descriptors() as fds:
            root = fds.add(os.open(etc, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            found = ((path, content(root, path, self._known)) for path in paths)
            return {path: what for path, what in found if what}


def noted(state: State, now: Mapping[str, str], by: Mapping[str, str]) -> State:
    """The record with what the host has now. Pure.

    Args:
        now: what it has, by path; where it has nothing is not in it.
        by: by each path, the layer that covers it.
    """
    covers, accepted = state.covers, state.accepted
    if not by:
        return state if covers is None else replace(state, covers=None)
    if covers is None or covers.when != accepted.when:
        return replace(state, covers=Covers(accepted.when, dict(now)))
    drifted = tuple(
        Drifted(path, by[path], _change(before, after), after)
        for path in sorted(by)
        if (before := covers.files.get(path, "")) != (after := now.get(path, ""))
    )
    return state if drifted == covers.drifted else replace(state, covers=replace(covers, drifted=drifted))


def unsaid(before: State, covers: Covers) -> tuple[Drifted, ...]:
    """What is drift now, and was not before."""
    old = before.covers.drifted if before.covers is not None and before.covers.when == covers.when else ()
    return tuple(one for one in covers.drifted if one not in old)


def sentence(service: str, drifted: Iterable[Drifted]) -> str:
    """One line for the log."""
    some = list(drifted)
    files = ", ".join(
        f"/etc/{shown(one.path)} {one.change} ({one.image} covers it)" for one in some[:_SAID_MAX]
    )
    more = f" and {len(some) - _SAID_MAX} more" if len(some) > _SAID_MAX else ""
    return (
        f"the host's own files have changed where it does not see it: {files}{more};"
        f" `confext-watcher diff {shown(service)} --from none` compares, a new version of the image can take it over"
    )


def _change(before: str, after: str) -> str:
    return "changed" if before and after else "came" if after else "went"


def files_of(root: int) -> Iterator[str]:
    """The files and links of a layer, by paths below its root; FILES_MAX at most. Raises Refused, OSError."""
    layers, walk, count = Layers([root]), Walk(), 0
    todo: list[tuple[str, ...]] = [()]
    while todo:
        path = todo.pop()
        directory = open_inside(root, "/".join(path) or ".", DIRECTORY)
        if directory is None:
            continue
        try:
            for name in walk.names(directory, path):
                node = layers.look_up(0, directory, name)
                if node is None or (not path and name == "extension-release.d"):
                    continue
                if node.type is Type.DIRECTORY:
                    todo.append((*path, name))
                elif node.type in (Type.FILE, Type.LINK):
                    yield "/".join((*path, name))
                    count += 1
                    if count >= FILES_MAX:
                        return
        finally:
            os.close(directory)


def content(etc: int, path: str, known: dict[tuple[int, ...], str]) -> str:
    """What is at a path below a directory, in one word; "" if nothing, or if a link is on the way. Blocks.

    Args:
        known: what was read before, by what stat(2) says of it.
    """
    fd = open_inside(etc, path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if fd is None:
        return ""
    try:
        status = os.fstat(fd)
        if stat.S_ISLNK(status.st_mode):
            return f"link:{_digest(os.fsencode(os.readlink('', dir_fd=fd)))}"
        if not stat.S_ISREG(status.st_mode):
            return f"other:{stat.S_IFMT(status.st_mode):o}"
        if status.st_size > BYTES_MAX:
            return f"large:{status.st_size}:{status.st_mtime_ns}"
        key = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns, status.st_mtime_ns)
        found = known.get(key)
        if found is None:
            with contextlib.closing(os.fdopen(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), "rb")) as file:
                found = known[key] = f"file:{_digest(file.read(BYTES_MAX + 1))}"
        return found
    finally:
        os.close(fd)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
