# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a manager of services is. systemd and `exec` give the same plain `Service`: the rounds need not know which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from watcher.model import Copy, Declared, Setting
from watcher.mounts.process import Process
from watcher.resolve.trust import BY_EXEC, IN_UNIT, Trust
from watcher.settings.config import ServiceSettings

if TYPE_CHECKING:
    import trio  # `origin` and `diff`, which need none, start in half the time without


@dataclass(frozen=True, slots=True)
class Service:
    """A service that takes part, as its manager knows it now.

    Attributes:
        name: "nginx.service"; for a template's instance "foo@bar.service".
        declared: where its layers come from.
        settings: its `[X-Confext]`.
        main: its main process, which the manager closes; None: it does not run, or is `headless`.
        invocation: changes with every start (InvocationID, or a registration's PID and start time); "" if it does not
            run. One that is `headless` has one, too, and one that is on its way down.
        starting: it is being started: `ExecStartPre=` runs, or a process that is still systemd's executor, on its way
            to becoming the service.
        failed: it went down by itself rather than being stopped. The standalone manager cannot tell these apart: it
            sets this at every end.
        failed_start: of one that failed, the start that did (as `invocation`); "" where that is not known.
        blameless: why its last end says nothing about its configuration, as a kill from outside does not; "" if it may.
        restarts: how often systemd has started it again by itself since its last other start (NRestarts).
        headless: it runs, but systemd knows no main process of it (`Type=forking` without `PIDFile=`): it gets another
            stack only at its next start. What has done its work (`RemainAfterExit=`) does not run.
        root: path of the root directory whose os-release decides which images match (`RootDirectory=`, else "/"); None:
            only its own processes have that mounted (`RootImage=`), and it has none.
        aliases: its other names.
        unit_policy: the unit's `ExtensionImagePolicy=`, None without one.
        manager: "systemd" or "standalone".
    """

    name: str
    declared: Declared
    settings: ServiceSettings
    main: Process | None = None
    invocation: str = ""
    starting: bool = False
    failed: bool = False
    failed_start: str = ""
    restarts: int = 0
    blameless: str = ""
    headless: bool = False
    root: str | None = "/"
    aliases: tuple[str, ...] = ()
    unit_policy: Setting | None = None
    manager: str = "systemd"

    def went_down_since(self, restarts: int) -> bool:
        """Whether it went down by itself since it had so many `restarts`; any other start sets them to 0.

        Not if that says nothing about its configuration.
        """
        return (self.failed or self.restarts not in (0, restarts)) and not self.blameless

    @property
    def slots(self) -> str:
        """See `slots_of`."""
        return slots_of(self.name, self.manager)

    @property
    def trust(self) -> Trust:
        """See `trust_of`."""
        return trust_of(self.settings, self.manager)


_EXEC = ".exec"


def slots_of(name: str, manager: str) -> str:
    """The name under which the accepted stacks of a service are kept.

    For a unit it is the unit's own: its drop-in looks for its slots there. A standalone service may have the same name
    as a unit that it has nothing to do with: so it gets one that no unit can have.
    """
    return name if manager == "systemd" else f"{name}{_EXEC}"


def starts_by_systemd(slots: str) -> bool:
    """Whether the service whose stacks are kept under that name is a unit, which systemd starts on its slots."""
    return not slots.endswith(_EXEC)


def trust_of(settings: ServiceSettings, manager: str) -> Trust:
    """The users and groups who may write to what a service is configured from."""
    where = IN_UNIT if manager == "systemd" else BY_EXEC
    return Trust(settings.trusted_users, settings.trusted_groups, where)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What came of asking a service to reload. `rounds/judge.py` comes to the verdict.

    Attributes:
        ok: it did, or did not have to be asked.
        told: what was done, for the log: "reload", "SIGHUP", "restart", "" when nothing was told.
        reason: why it failed, or why nothing was told; one line, "" where there is no way to tell it.
        output: what a reload command printed, at most 64 KiB.
        interrupted: it was canceled, or did not get to its end: that is no verdict on the stack. If `ok`, there was
            nothing to do.
        blocked: it was interrupted because the reload before it has not ended.
    """

    ok: bool
    told: str = ""
    reason: str = ""
    output: str = ""
    interrupted: bool = False
    blocked: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        reason: "" for success, else words that follow the name of the command.
        output: what it printed, at most 64 KiB.
    """

    reason: str
    output: str


class NoShadow(Exception):
    """What the next start of a service would see cannot be made: `str()` says why. That is no verdict on a stack."""


class Manager(Protocol):
    """Knows services, starts them, and asks them to reload."""

    @property
    def services(self) -> Mapping[str, Service]:
        """All services that take part now, by name."""

    async def run(self, changed: Callable[[str], None], task_status: trio.TaskStatus[None]) -> None:
        """Keep `services` current until cancelled.

        Calls `task_status.started()` once `services` is complete, and then `changed(name)` for every service that
        appeared, changed (declared sources, settings, start, stop) or went away.
        """

    async def current(self, name: str) -> Service | None:
        """A service by what stands in its files at this moment, before any signal or event tells of a change; None: it
        takes no part any more."""

    async def learn(self, service: Service) -> None:
        """Have the next start of the service use the accepted stack, whose slots are in place already.

        Under systemd this takes a daemon-reload if the loaded drop-in does not list these slots.

        Raises:
            Later: it could not be done now. `reload()` and `revive()` do it first, then.
        """

    def learned(self, service: Service) -> bool:
        """Whether the next start uses the accepted stack anyway: then there is no need to `learn()`. Blocks."""

    def tell(self, service: Service, main: Process) -> Reloaded | None:
        """Ask the service to reload, if a signal is all that takes; None: it takes `reload()`. Blocks.

        Args:
            main: its main process, held by the caller.

        Raises:
            Gone: it has ended.
        """

    async def reload(self, service: Service) -> Reloaded:
        """Ask the service to reload as its settings say, and wait for the end, for `ReloadSec=` at most."""

    async def started(self, service: Service) -> bool:
        """Wait until a service with a main process has completed its start; False: it is on its way down.

        Raises:
            Later: that could not be found out.
        """

    async def revive(self, service: Service) -> Reloaded:
        """Start a service again whose main process has ended by itself, if the manager starts services at all."""

    def hold_start(self, service: Service, other: str | None) -> None:
        """Whether the next start of a service is on trial: if it fails, that ends for who waits for it only after
        `revive()` has asked for another, if the manager can do that.

        Args:
            other: the start (`Service.invocation`) that is not meant, "" if there is none; None: none is on trial.
        """

    async def execute(
        self, service: Service, namespace: int, words: Sequence[str], timeout_sec: float
    ) -> Ended:
        """Run a command in a mount namespace (a descriptor) as the service itself would run it.

        The command has the service's user, groups, environment, root and limits, and no standard input. What it leaves
        running is killed.

        Raises:
            Gone: the service has ended.
            Later: the command could not be run now.
        """

    async def execute_at_start(
        self, service: Service, copies: Sequence[Copy], words: Sequence[str], timeout_sec: float
    ) -> Ended:
        """Run a command as the next start of a service would run it, with these layers on its `/etc`.

        The service itself need not run, and does not see anything of that.

        Args:
            copies: of the layers, bottom to top.

        Raises:
            NoShadow: what that start would see cannot be made here.
            Later: the command could not be run now.
        """

    def processes(self, service: Service) -> list[int]:
        """PIDs of all processes of the service, its main process included. They are hints: hold them by pidfd. Blocks.

        There may be tens of thousands.
        """

    async def logged(self, service: Service, since: int) -> str:
        """Lines of priority err and worse that the service has logged itself, at most 4 KiB.

        Without systemd there is no log that we know of: "".

        Args:
            since: microseconds since the epoch.
        """
