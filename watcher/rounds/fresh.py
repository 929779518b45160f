# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which overlays are kept fresh for which service, and what is done where that is not enough (`BaseChanged=`).

After a round that has found another start or another stack of a service, its overlays are opened anew. That can wait a
moment: a new stack is fresh, and what has changed since is made good when it is followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress

import trio

from watcher.managers.base import Service
from watcher.model import Later, Refused, Remark, problem
from watcher.mounts.etc import Moved
from watcher.mounts.process import Elsewhere, Gone
from watcher.mounts.refresh import View, views_of
from watcher.mounts.renew import renew
from watcher.mounts.whereabouts import WorkerLost
from watcher.mounts.workers import Hung
from watcher.records.together import Gathering
from watcher.rounds.afterwards import Afterwards
from watcher.rounds.memory import Memory
from watcher.rounds.outcomes import say
from watcher.rounds.tools import Tools
from watcher.watch.freshness import Freshness, Held
from watcher.watch.offload import Unanswered
from watcher.watch.watcher import RETRY_SEC

_LATER_SEC = 0.02

_FAULTS = (OSError, Refused, Later, Hung, WorkerLost, Moved, Unanswered)


class Fresh:
    """Follows services. Everything here runs in the event loop.

    Args:
        memories: what is remembered of each service.
        changed: asks for a round of a service, after its quiet time.
        remarked: called when there is something else to say about what cannot be watched.
        base_changed: called with each service on a base that has changed.
    """

    def __init__(
        self,
        tools: Tools,
        memories: Mapping[str, Memory],
        changed: Callable[[str], None],
        remarked: Callable[[], None],
        base_changed: Callable[[str], None],
    ) -> None:
        self._tools, self._memories, self._changed = tools, memories, changed
        self._remarked, self._base_changed = remarked, base_changed
        self._keys: dict[str, object] = {}
        self._renewed: dict[str, int] = {}
        self._renewing: set[str] = set()
        self._said: dict[str, str] = {}
        self._nursery: trio.Nursery | None = None
        self._afterwards = Afterwards(self._follow, _LATER_SEC, lambda: tools.offload.is_busy)
        self._freshness: Freshness | None = None

    async def run(self) -> None:
        """Follow services until cancelled."""
        token = trio.lowlevel.current_trio_token()

        def in_loop(what: Callable[[], None]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(what)

        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._freshness = Freshness(
                held=lambda held: in_loop(functools.partial(self._held, nursery, held)),
                changed=lambda name, tells: in_loop(functools.partial(self._tell, name, tells)),
                remarked=lambda: in_loop(self._remarked),
                begin=self._tools.workers.stand,
            )
            try:
                await self._afterwards.run()
            finally:
                self._freshness.close()

    def retry(self) -> None:
        """See `Freshness.retry()`."""
        if self._freshness is not None:
            self._freshness.retry()

    def remarks(self) -> tuple[Remark, ...]:
        """What cannot be watched, and why; the caller remembers what it has said."""
        return self._freshness.remarks() if self._freshness is not None else ()

    def look(self, name: str) -> None:
        """A round of a service is over, or it takes no part any more."""
        if self._key(name) != self._keys.get(name):
            self._afterwards.due(name)

    def _key(self, name: str) -> object:
        """What its overlays depend on; None: it has none to follow."""
        service, memory = self._tools.manager.services.get(name), self._memories.get(name)
        if service is None or service.main is None or memory is None:
            return None
        if service.settings.base_changed == "ignore":
            return None
        return service.invocation, service.settings.base_changed, memory.swaps, self._renewed.get(name, 0)

    async def _follow(self, name: str) -> None:
        assert self._freshness is not None and self._nursery is not None
        try:
            await self._try_to_follow(name, self._freshness)
        except _FAULTS as error:
            text = f"what the host replaces in /etc may not be seen: {problem(error)}"
            if self._said.get(name) != text:
                self._said[name] = text
                say("warning", name, text)
            self._nursery.start_soon(self._look_later, name)
        else:
            self._said.pop(name, None)

    async def _look_later(self, name: str) -> None:
        await trio.sleep(RETRY_SEC)
        self.look(name)

    async def _try_to_follow(self, name: str, freshness: Freshness) -> None:
        key = self._key(name)
        service, memory = self._tools.manager.services.get(name), self._memories.get(name)
        if key is None or service is None or memory is None:
            self._keys.pop(name, None)
            self._renewed.pop(name, None)
            freshness.drop(name)
            return
        try:
            views = await self._views(service)
        except (Gone, Elsewhere):
            views = []
        if key != self._key(name):  # what was opened may be gone by now
            for view in views:
                view.close()
            self._afterwards.due(name)
            return
        self._keys[name] = key
        tells = service.settings.base_changed == "reload"
        freshness.follow(name, (service.invocation, memory.swaps), views, tells=tells)

    async def _views(self, service: Service) -> list[View]:
        """What it shows now; nothing if it has ended."""
        tools = self._tools

        def find(held: Service) -> Gathering[list[View]]:
            yield from ()
            if held.main is None:
                return []
            kept = functools.partial(tools.store.stacks, held.slots)
            others = functools.partial(tools.other_mains, held)
            pids = tools.manager.processes(held)
            return tools.workers.call(views_of, tools.workers, held.main, pids, kept, others)

        return await tools.in_turn(service, find)

    def _tell(self, name: str, tells: bool) -> None:
        """A base has changed. `BaseChanged=reload`: the next round tells the service."""
        self._base_changed(name)
        memory = self._memories.get(name)
        if tells and memory is not None:
            memory.base_changed = True
            self._changed(name)

    def _held(self, nursery: trio.Nursery, held: Held) -> None:
        if held.service not in self._renewing:
            self._renewing.add(held.service)
            nursery.start_soon(self._renew, held)

    async def _renew(self, held: Held) -> None:
        """Mount the stack of a service anew. Nobody is told of it."""
        name = held.service
        service, memory = self._tools.manager.services.get(name), self._memories.get(name)
        names = ", ".join(held.paths[:3]) + (" ..." if len(held.paths) > 3 else "")
        try:
            if service is not None and service.main is not None and memory is not None:
                count = await self._mount_anew(held, service, memory)
                if count:
                    self._renewed[name] = self._renewed.get(name, 0) + 1
                    say("debug", name, f"the host's own /etc has changed, and it holds {names}: mounted anew")
                    self.look(name)
        except Gone:
            pass  # its next start is fresh
        except (*_FAULTS, Elsewhere) as error:
            text = f"it may keep what the host had in /etc before: {names}: {problem(error)}"
            say("warning", name, text)
        finally:
            self._renewing.discard(name)

    async def _mount_anew(self, held: Held, service: Service, memory: Memory) -> int:
        tools = self._tools

        def mount(service: Service) -> Gathering[int]:
            yield from ()
            if service.main is None:
                return 0
            with tools.store.using():
                stack = tools.store.state(service.slots).accepted.stack
                return tools.workers.call(
                    renew,
                    tools.workers,
                    service.main,
                    tools.manager.processes(service),
                    stack,
                    {layer.digest: tools.store.copy(layer) for layer in stack.layers},
                    memory.compared,
                    old=held.paths,
                    devices=held.devices,
                    kept=lambda: (stack, *tools.store.stacks(service.slots)),
                    other_mains=lambda: tools.other_mains(service),
                )

        return await tools.in_turn(service, mount)
