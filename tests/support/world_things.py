# SPDX-License-Identifier: LGPL-2.1-or-later
"""What there is in a world (`support/world.py`): files, services as the kernel has them, records."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from watcher.images import integrity
from watcher.managers.base import Service
from watcher.model import Candidate, Declared, Entry, Kind, Stack
from watcher.records.state import Accepted, State
from watcher.records.together import Gathering
from watcher.settings.config import ServiceSettings

FATES = ("good", "check fails", "reload fails", "unhealthy", "dies", "dies later")
"""What becomes of a service that reads an image. One that dies does so at each reload and at each start."""

ENTRIES = ("base", "web")


_KEPT = 4  # KeepStacks=


@dataclass(frozen=True)
class File:
    name: str
    version: int
    fate: str
    left: int | None = None
    done: int = 0

    @property
    def path(self) -> str:
        tried = f"-{self.done}" if self.done else ""
        counters = "" if self.left is None else f"+{self.left}{tried}"
        return f"/srv/{self.name}.raw.v/{self.name}_{self.version}{counters}.raw"

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.name} {self.version} {self.fate}".encode()).hexdigest()

    @property
    def candidate(self) -> Candidate:
        filename = os.path.basename(self.path)
        done = None if self.left is None else self.done
        return Candidate(
            self.path,
            filename,
            self.name,
            str(self.version),
            Kind.IMAGE,
            tries_left=self.left,
            tries_done=done,
        )


@dataclass
class Unit:
    """A service as the kernel and its manager know it; `shown` and `told` are identities of stacks.

    Its manager starts it again by itself (`restarting`); so many ticks after its end (`slowly`), while a round goes on;
    not more often than `restarts_max`.
    """

    name: str
    settings: ServiceSettings
    manager: str = "systemd"
    restarting: bool = False
    slowly: int = 0
    restarts_max: int = 3
    to_start: bool = False
    host: bool = False
    headless: bool = False
    alive: bool = False
    starting: bool = False
    failed: bool = False
    starts: int = 0
    restarts: int = 0
    shown: Stack = field(default_factory=Stack)
    told: Stack = field(default_factory=Stack)
    doomed: int | None = None
    was_killed: bool = False

    @property
    def service(self) -> Service:
        main: Any = Main(self, self.starts) if self.alive and not self.headless else None
        invocation = str(self.starts) if self.alive else ""
        return Service(
            self.name,
            Declared(),
            self.settings,
            main,
            invocation,
            starting=self.starting,
            headless=self.alive and self.headless,
            failed=self.failed,
            failed_start=str(self.starts) if self.failed and self.manager == "systemd" else "",
            restarts=self.restarts,
            manager=self.manager,
        )


@dataclass
class Main:
    unit: Unit
    start: int
    pid: int = 1
    started: int = field(default_factory=lambda: int(integrity.now() * os.sysconf("SC_CLK_TCK")))

    def alive(self) -> bool:
        return self.unit.alive and self.unit.starts == self.start

    def namespace(self) -> int:
        return os.open("/dev/null" if self.unit.host else "/dev/zero", os.O_RDONLY)

    def hold(self) -> Main:
        return self

    def __enter__(self) -> Main:
        return self

    def __exit__(self, *exc: object) -> None: ...


@dataclass
class Records:
    """The store, as far as it is known to rounds.

    Attributes:
        kept: the accepted stacks of each service, newest first.
        ever: all that were ever accepted, by identity.
        superseded: those that another took the place of before there was anything to say of them.
    """

    tick: Callable[[], None]
    tried: Callable[[str, State, Stack], None]
    kept_out: Callable[[str, State, State], None]
    states: dict[str, State] = field(default_factory=dict)
    kept: dict[str, list[Stack]] = field(default_factory=dict)
    ever: dict[str, dict[str, Stack]] = field(default_factory=dict)
    damaged: frozenset[str] = frozenset()
    replaced: dict[str, float] = field(default_factory=dict)
    superseded: set[tuple[str, str]] = field(default_factory=set)
    state_directory = "/nowhere"
    copies = "/nowhere/store"

    def state(self, slots: str) -> State:
        return self.states.get(slots, State())

    def stacks(self, slots: str) -> tuple[Stack, ...]:
        return tuple(self.kept.get(slots, ()))

    def change(self, slots: str, change: Callable[[State], State]) -> State:
        if change(self.state(slots)) != self.state(slots):
            self.tick()
            before = self.state(slots)
            self.states[slots] = change(before)
            self.kept_out(slots, before, self.states[slots])
            self.tick()
        return self.state(slots)

    def accept(
        self, slots: str, stack: Stack, entries: Sequence[Entry], change: Callable[[State], State]
    ) -> State:
        self.tick()
        state = self.state(slots)
        if stack.id not in self.ever.get(slots, {"": Stack()}):
            self.tried(slots, state, stack)
        self.states[slots] = change(replace(state, accepted=Accepted(stack, tuple(entries), when=1)))
        if state.replaced is not None and self.states[slots].undoing is None:
            self.superseded.add((slots, state.accepted.stack.id))
        others = [one for one in self.kept.get(slots, ()) if one.id != stack.id]
        self.kept[slots] = [stack, *others][:_KEPT]
        self.ever.setdefault(slots, {"": Stack()})[stack.id] = stack
        self.tick()
        return self.state(slots)

    def changing(self, slots: str, change: Callable[[State], State]) -> Gathering[State]:
        yield from ()
        return self.change(slots, change)

    def accepting(
        self, slots: str, stack: Stack, entries: Sequence[Entry], change: Callable[[State], State]
    ) -> Gathering[State]:
        yield from ()
        return self.accept(slots, stack, entries, change)

    def settle(self) -> None:
        """Nobody cuts the power here."""

    @property
    def whole(self) -> Records:
        return self

    def replaced_since(self, digests: Iterable[str], since: float) -> bool:
        return any(self.replaced.get(digest, -1.0) >= since for digest in digests)

    def heal(self, digest: str) -> None:
        """It is copied anew."""
        if digest in self.damaged:
            self.damaged -= {digest}
            self.replaced[digest] = integrity.now()

    def verify(self, digest: str) -> bool:
        return digest not in self.damaged

    def is_whole(self, stack: Stack) -> bool:
        return not self.damaged.intersection(stack.digests)

    def was_damaged(self, slots: str, since: float) -> bool:
        return not self.is_whole(self.state(slots).accepted.stack)

    def copy(self, layer: Any) -> None: ...

    def doubt(self, slots: str) -> None: ...

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        yield

    def hold(self, wait: bool = True) -> Any:
        return self.using()
