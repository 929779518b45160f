# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who runs the services. Both managers give the same plain `Service`; nothing below knows which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from watcher.model import Declared, Entry
from watcher.mounts.process import Process
from watcher.resolve.trust import BY_EXEC, IN_UNIT, Trust
from watcher.settings.config import ServiceSettings


@dataclass(frozen=True, slots=True)
class Service:
    """A service that takes part, as its manager sees it now.

    Attributes:
        name: "nginx.service"; for a template's instance "foo@bar.service".
        declared: where its layers come from.
        settings: its `[X-Confext]`.
        main: its main process, owned (and closed) by the manager; None: not running.
        invocation: changes with every start (InvocationID, or the registration's own); "" when not running.
        failed: it ended by itself, or went down, rather than being stopped by somebody; not known to every manager,
            which then says so.
        restarts: how often its manager has started it again by itself since somebody did (NRestarts).
        starting: main is there but may still be systemd's executor on its way to becoming the service.
        headless: it is active, but systemd knows no main process of it (`RemainAfterExit=`, or `Type=forking` without
            `PIDFile=`): nothing of it can be given another stack before its next start.
        root: path of the root directory whose os-release decides which images match (`RootDirectory=`, else "/"); None:
            only its own processes have that mounted (`RootImage=`), and there are none.
        aliases: other names of it.
        manager: "systemd" or "standalone".
    """

    name: str
    declared: Declared
    settings: ServiceSettings
    main: Process | None = None
    invocation: str = ""
    starting: bool = False
    failed: bool = False
    restarts: int = 0
    headless: bool = False
    root: str | None = "/"
    aliases: tuple[str, ...] = ()
    manager: str = "systemd"

    def went_down_since(self, restarts: int) -> bool:
        """Whether it went down by itself since it had been started again so often; a start by somebody begins at 0."""
        return self.failed or self.restarts not in (0, restarts)

    @property
    def slots(self) -> str:
        """See `slots_of`."""
        return slots_of(self.name, self.manager)

    @property
    def trust(self) -> Trust:
        """Whom it lets drop things."""
        return trust_of(self.settings, self.manager)


def slots_of(name: str, manager: str) -> str:
    """The name that the accepted stacks of a service are kept under.

    A unit's own, where its drop-in looks for its slots. A standalone service may be called like a unit with which it
    has nothing else in common: what it is kept under is the name of no unit.
    """
    return name if manager == "systemd" else f"{name}.exec"


def trust_of(settings: ServiceSettings, manager: str) -> Trust:
    """Whom a service lets drop things."""
    where = IN_UNIT if manager == "systemd" else BY_EXEC
    return Trust(settings.trusted_users, settings.trusted_groups, where)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What became of asking a service to reload.

    Attributes:
        ok: it did, or nothing had to be asked.
        told: what was done, for the log: "reload", "SIGHUP", "restart", "" when nothing was told.
        reason: why it failed, or why nothing was told although there is a way; one line, else "".
        output: what a reload command printed, at most 64 KiB.
        usec: how long it took, microseconds, without what was watched afterwards.
        interrupted: nobody judged: it was canceled or could not be followed; it says nothing about the stack.
    """

    ok: bool
    told: str = ""
    reason: str = ""
    output: str = ""
    interrupted: bool = False
    usec: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        reason: "" for success, else words that follow the name of the command.
        output: what it printed, at most 64 KiB.
    """

    reason: str
    output: str


class Manager(Protocol):
    """A source of services, and the one who can ask them to reload."""

    @property
    def services(self) -> Mapping[str, Service]:
        """All services that take part, by name, as of now."""

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None:
        """Keep `services` current until cancelled.

        Says `task_status.started()` once the first complete answer is there, then calls `changed(name)` for every
        service that appeared, changed (declared sources, settings, start, stop) or went away.
        """

    async def learn(self, service: Service, entries: Sequence[Entry], sysexts: Sequence[Entry] = ()) -> None:
        """Make the next start of the service use exactly these slots, bottom to top (they are in place already).

        Declared entries that are no confexts (`sysexts`) are left to it as they are.

        Under systemd: a daemon-reload, if the set of entries differs from what the loaded drop-in lists; coalesced.
        """

    async def reload(self, service: Service) -> Reloaded:
        """Ask the service to reload as its settings say, and follow that to its end."""

    async def started(self, service: Service) -> bool:
        """Wait until a service whose main process is there has completed its start; False: it is on its way down."""

    async def revive(self, service: Service) -> Reloaded:
        """Start a service again whose main process has ended by itself, if that is the manager's to do."""

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        """Run a command in a mount namespace (a descriptor) as the service itself would run it.

        With its user, groups, environment and root, within its limits, without standard input; what it leaves
        running is killed. `service.main` must be there.

        Raises:
            Gone: the service has ended.
            Later: it could not be run now.
        """

    async def processes(self, service: Service) -> list[int]:
        """PIDs of everything that belongs to the service, its main process included. Hints: hold them by pidfd."""
