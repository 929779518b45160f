# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: has the rooms work together in one nursery, and nothing else.

A change of a directory or of a service touches the service's name in `Settle`. When the burst of changes is over, a
round of the service starts. However often a round is asked for while one runs, one more follows it.
"""

from __future__ import annotations

import functools
import itertools
import math
import signal
import traceback
from collections.abc import AsyncIterator

import trio

from watcher.control import metrics
from watcher.control.commands import Commands
from watcher.control.peers import Readers
from watcher.control.server import serve
from watcher.images.scrub import Scrub
from watcher.managers.base import Service
from watcher.managers.systemd import sd_notify
from watcher.managers.systemd.manager import check as systemd_check
from watcher.model import Busy, Event, Later, Remark, problem, shown
from watcher.mounts.whereabouts import WorkerLost
from watcher.records import journal
from watcher.records.alone import alone
from watcher.rounds import looks
from watcher.rounds.drift import Drift
from watcher.rounds.fresh import Fresh
from watcher.rounds.notify import Notifier
from watcher.rounds.round import Rounds
from watcher.rounds.tools import Tools
from watcher.settings import config
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new
from watcher.watch.offload import Unanswered
from watcher.watch.settle import Settle
from watcher.wiring import on_systemd, tools_of

# So long what no service needs is left for the next drop to go first.
_TIDY_SEC = 0.25

# So many rounds of a burst begin together, when some of those before are done.
_AT_ONCE_MAX = 16

# In whose turn images are unmounted: no service has such a name.
_TIDYING = "/tidying"

# After what was unexpected: no drop is lost by it.
_AGAIN_SEC = 30.0

# Well below the unit's TimeoutStartSec=.
_LOOKED_AT_SEC = 30.0


def main(settings: Settings) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    Raises:
        AlreadyRunning: there is one.
        Unsupported, BusLost: systemd is too old, or cannot be reached.
        OSError: a directory, inotify or the mounts cannot be had.
    """
    with alone(settings.runtime_directory), tools_of(settings) as tools:
        trio.run(_run, settings, tools)


async def _run(settings: Settings, tools: Tools) -> None:
    if on_systemd(settings):
        await systemd_check()
    await Daemon(settings, tools).run()


class Daemon:
    """One daemon.

    Args:
        settings: of the watcher.
        tools: what rounds work with.
    """

    def __init__(self, settings: Settings, tools: Tools) -> None:
        self._settings = settings
        self._tools = tools
        self._control = Commands(tools, self.changed, self._in_round, self._reload_settings)
        every = functools.partial(self._control.status, None, deep=False)
        self._metrics = metrics.Metrics(every, tools.store)
        self._notifier = Notifier(lambda: tools.manager.services, lambda: self._settings, tools.run_aside)
        self._rounds = Rounds(tools, self._recorded, self.changed, self._looked_at, self._control.stepped)
        self._control.rounds = self._rounds
        self._drift = self._control.drift = Drift(tools)
        memories = self._rounds.memories
        self._fresh = Fresh(tools, memories, self._settled_change, self._say_remarks, self._drift.look)
        self._scrub = Scrub(tools.store, lambda: self._settings.scrub_usec, self._look_at_everything)
        self._readers = Readers()
        tools.offload.returned = self._answers_again
        self._settle = Settle()
        # By service: when the first change was noticed that its next round is for.
        self._since: dict[str, float] = {}
        # And the last: a look that began after it has seen all of them, `looks.now()`.
        self._last_change: dict[str, float] = {}
        # Services of which a round runs, and those of them that get another one after it.
        self._running: set[str] = set()
        self._again: set[str] = set()
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._remarks: set[Remark] = set()
        self._untidy = ""
        # By service: what was unexpected in its last round, and where.
        self._bugs: dict[str, str] = {}
        # Services that are there from the start, and not looked at yet.
        self._unseen: set[str] = set()
        self._all_seen = trio.Event()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Services keep their stacks."""
        self._scrub.begin()
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._tools.manager.run, self.changed)
                self._unseen = set(self._tools.manager.services)
                self._look_at_everything()
                directory = self._settings.runtime_directory
                await nursery.start(serve, self._control, directory, self._readers)
                if on_systemd(self._settings):
                    nursery.start_soon(metrics.serve, self._metrics)
                nursery.start_soon(self._follow_directories)
                nursery.start_soon(self._start_rounds, nursery)
                nursery.start_soon(self._fresh.run)
                nursery.start_soon(self._drift.run)
                nursery.start_soon(self._notifier.run)
                nursery.start_soon(self._ready_then_scrub)
                nursery.start_soon(self._when_idle)
                nursery.start_soon(sd_notify.keep_alive)
                await self._follow_signals(signals)
                sd_notify.stopping()
                nursery.cancel_scope.cancel()
        self._scrub.close()

    def changed(self, name: str, quiet_usec: int = 0) -> None:
        """Look at a service, after `quiet_usec` microseconds without another change of it."""
        now = trio.current_time()
        self._since.setdefault(name, now)
        self._last_change[name] = looks.now()
        self._settle.touch(name, _usec(now), quiet_usec, self._settings.settle_max_usec)
        self._wake.set()

    def _answers_again(self, name: str) -> None:
        """The files of a service, where they did not for a while."""
        if name in self._tools.manager.services:
            self.changed(name)

    def _recorded(self, event: Event) -> None:
        """An outcome is in the history."""
        self._control.tell(event)
        self._metrics.tell(event)
        self._notifier.tell(event)

    def _in_round(self, name: str) -> bool:
        """Whether a round of a service goes on or is due."""
        return name in self._running or name in self._since

    def _look_at_everything(self) -> None:
        for name in self._tools.manager.services:
            self.changed(name)

    async def _follow_directories(self) -> None:
        async for names in self._tools.watcher.changes():
            for name in names:
                self._settled_change(name)

    def _settled_change(self, name: str) -> None:
        service = self._tools.manager.services.get(name)
        if service is not None:
            quiet = service.settings.settle_usec
            self.changed(name, self._settings.settle_usec if quiet is None else quiet)

    async def _start_rounds(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            due = iter(self._settle.due(_usec(trio.current_time())))
            at_once = 1
            while some := tuple(itertools.islice(due, at_once)):
                if at_once > 1:
                    # The first service must not wait until all the others have begun.
                    await self._tools.offload.lull()
                for name in some:
                    self._start_round(nursery, name)
                for _ in range(2):  # trio runs tasks in any order: after two turns each has submitted its job
                    await trio.sleep(0)
                at_once = min(at_once * 4, _AT_ONCE_MAX)
            if not self._running and not self._since:
                self._idle.set()
            deadline = self._settle.deadline()
            with trio.move_on_at(math.inf if deadline is None else deadline / 1_000_000):
                await self._wake.wait()

    def _start_round(self, nursery: trio.Nursery, name: str) -> None:
        if name in self._running:
            self._again.add(name)
        else:
            self._running.add(name)
            nursery.start_soon(self._rounds_of, name)

    async def _rounds_of(self, name: str) -> None:
        """Rounds of one service, one after the other, until no other is asked for."""
        while True:
            self._again.discard(name)
            since = self._since.pop(name, trio.current_time())
            looks_from = self._last_change.pop(name, looks.now())
            service = await self._tools.manager.current(name)
            if service is None:
                self._rounds.forget(name)
                self._bugs.pop(name, None)
                again = None
            else:
                again = await self._round(service, since, looks_from)
            self._looked_at(name)
            self._fresh.look(name)
            self._drift.look(name)
            self._control.round_over(name)
            self._say_remarks()
            if name not in self._again:
                break
        self._running.discard(name)
        if again is not None:
            self._settle.again(name, _usec(trio.current_time() + again))
        self._wake.set()

    async def _round(self, service: Service, since: float, looks_from: float) -> float | None:
        try:
            again = await self._rounds.round(service, since, looks_from)
        except Exception as error:  # noqa: BLE001 -- a bug in a round of one service must not end those of the others
            if self._bugs.get(service.name) != (bug := _place_of(error)):
                self._bugs[service.name] = bug
                text = f"{service.name}: a bug in confext-watcher; it keeps what it has, and is tried again"
                journal.log.exception(text, service=service.name)
            return _AGAIN_SEC
        self._bugs.pop(service.name, None)
        return again

    def _looked_at(self, name: str) -> None:
        """A round has set the slots of a service, or has failed to."""
        self._unseen.discard(name)
        if not self._unseen:
            self._all_seen.set()

    async def _ready_then_scrub(self) -> None:
        """Reading what nobody waits for comes last."""
        await self._when_looked()
        await self._scrub.run()

    async def _when_looked(self) -> None:
        """Tell systemd that start-up is complete, once each service was looked at.

        Units start after the watcher, so that they get what was dropped while the host was down. Reloads and health
        watches that follow, and files that do not answer, must delay no unit, nor let systemd end the watcher.

        A look reads all copies that a service would start on: that they are whole is known then.
        """
        if self._unseen:
            with trio.move_on_after(_LOOKED_AT_SEC):
                await self._all_seen.wait()
        if self._unseen:
            names = ", ".join(shown(name) for name in sorted(self._unseen))
            late = f"not looked at within {_LOOKED_AT_SEC:g} s, so their copies may not have been read again"
            journal.log.warning(f"{late}; if they start now, it is on what was accepted last: {names}")
        count = len(self._tools.manager.services)
        journal.log.info(f"watching for {count} {'service' if count == 1 else 'services'}")
        if why := why_nothing_new():
            journal.log.warning(f"services keep what they have, and get nothing new: {why}")
        sd_notify.ready()

    async def _when_idle(self) -> None:
        """Tidy up soon after no round runs or is due: what is dropped one after the other leaves much to tidy up."""
        while True:
            await self._idle.wait()
            await trio.sleep(_TIDY_SEC)
            if self._running or self._since:
                self._idle = trio.Event()
                await self._idle.wait()
            # Before tidying up: a round that begins and ends meanwhile leaves something to tidy up, too.
            self._idle = trio.Event()
            mounted = self._rounds.mounted
            if mounted is not None:
                await self._tidy(mounted)

    async def _tidy(self, mounted: frozenset[str]) -> None:
        """Forget services that are gone, remove copies and unmount images that no service needs."""
        tools = self._tools
        untidy = ""
        try:
            await self._rounds.forget_gone(units=on_systemd(self._settings))
            worn = self._rounds.worn
            removed = await trio.to_thread.run_sync(
                tools.store.collect, mounted, worn, abandon_on_cancel=True
            )
            tools.admission.forget(removed)
            images = tools.workers.images
            await tools.offload.run(_TIDYING, tools.workers.call, images.retain, mounted)
        except (Later, Unanswered, WorkerLost, OSError) as error:
            untidy = problem(error)
        except Busy:
            return  # `exec` starts a service just now; the end of the next round tidies up
        if untidy and untidy != self._untidy:
            journal.log.warning(f"not tidied up, it is tried again: {untidy}")
        self._untidy = untidy

    async def _follow_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number != signal.SIGHUP:
                return
            sd_notify.reloading()
            self._reload_settings()
            sd_notify.ready()

    def _reload_settings(self) -> None:
        try:
            settings, remarks = config.load()
        except OSError as error:
            journal.log.error(f"settings not read again, the old ones stay: {problem(error)}")
            return
        journal.configure(level=settings.log_level)
        for remark in remarks:
            journal.say(remark)
        self._settings = self._tools.settings = settings
        self._readers.look_up()
        self._tools.store.configure(settings.store_max, settings.image_max, settings.keep_stacks)
        self._tools.watcher.retry()
        self._fresh.retry()
        self._scrub.wake()
        journal.log.info("settings read again")
        self._look_at_everything()

    def _say_remarks(self) -> None:
        """Say what cannot be watched, and what is wrong with the ledger; each once for as long as it lasts."""
        remarks = {*self._tools.watcher.remarks(), *self._tools.ledger.remarks, *self._fresh.remarks()}
        for remark in remarks - self._remarks:
            journal.say(remark)
        self._remarks = remarks


def _place_of(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {last.filename}:{last.lineno}"


def _usec(seconds: float) -> int:
    return round(seconds * 1_000_000)
