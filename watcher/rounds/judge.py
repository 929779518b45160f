# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the swap: ask the service to reload, and judge how it takes it.

The reload must succeed, the main process must be the same and alive, the unit must not have failed. Then comes what the
unit asks for: `HealthCheck=`, tried again until it succeeds or `HealthCheckSec=` is over, and `HealthWatchSec=`, for
which the service must stay up. A service that was started on its stack is judged likewise, without the reload.
"""

from __future__ import annotations

import os
from dataclasses import replace

import trio

from watcher.managers.base import Manager, Reloaded, Service
from watcher.model import Later
from watcher.mounts.process import Gone, Process
from watcher.rounds import messages
from watcher.rounds.outcomes import say
from watcher.rounds.service_check import run_all

_RETRY_SEC = 0.2
_POLL_SEC = 0.02

# How long a manager may take to notice what has become of a process, in seconds.
_NOTICED_SEC = 2.0

# With Rollout=rolling others follow a good verdict: the end of one that a reload signal kills must be seen before.
_ROLLING_WATCH_USEC = 1_000_000


async def reload_and_judge(manager: Manager, service: Service, main: Process) -> Reloaded | None:
    """Ask a running service to reload; `ok` only if it came through.

    Args:
        main: its main process, held by the caller.

    Returns:
        None if an operator stopped it or started it anew while it was watched.

    Raises:
        Later: whether it has reloaded could not be found out.
    """
    begun = trio.current_time()
    reloaded = await manager.reload(service)
    reloaded = replace(reloaded, usec=round((trio.current_time() - begun) * 1_000_000))
    say("debug", service.name, messages.told(reloaded))
    if reloaded.interrupted:
        if not main.alive() and not await _went_down(manager, service, main):
            return None
        raise Later(f"its {reloaded.told or 'reload'} was interrupted: {reloaded.reason}")
    if not reloaded.ok:
        return reloaded
    if reloaded.told == "restart":
        after = await _restarted(manager, service)
        if after is None:
            return reloaded  # an operator has stopped it meanwhile
        if after.main is None:
            return _ended(reloaded, "after its restart")
        with after.main.hold() as new:
            return await _judge(manager, after, new, reloaded)
    if not main.alive():
        return await _why_ended(manager, service, main, reloaded, "when it was told to reload")
    return await _judge(manager, service, main, reloaded)


async def judge_start(manager: Manager, service: Service, main: Process) -> Reloaded | None:
    """Judge a service that was started on its stack.

    Args:
        main: its main process, held by the caller.

    Returns:
        None if its main process has ended and it did not go down: it was done (`Type=oneshot`), or was stopped.
    """
    up = False

    async def ended() -> None:
        await trio.lowlevel.wait_readable(main.pidfd)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ended)
        up = await manager.started(service)
        nursery.cancel_scope.cancel()
    if not up:
        return await _why_ended(manager, service, main, Reloaded(ok=True), "before its start was complete")
    return await _judge(manager, service, main, Reloaded(ok=True), "its start")


async def _judge(
    manager: Manager, service: Service, main: Process, reloaded: Reloaded, since: str = "its reload"
) -> Reloaded | None:
    health = await _health(manager, service, main, reloaded, since)
    if health is None:
        return None
    reloaded = health
    watch = service.settings.health_watch_usec
    if service.settings.rollout == "rolling":
        watch = max(watch, _ROLLING_WATCH_USEC)
    if reloaded.ok and watch:
        say("debug", service.name, f"on trial for {watch / 1_000_000:g} s more")
        with trio.move_on_after(watch / 1_000_000):
            await trio.lowlevel.wait_readable(main.pidfd)
            when = f"within {watch / 1_000_000:g} s of {since}"
            return await _why_ended(manager, service, main, reloaded, when)
    return _as_before(manager, service, main, reloaded) if reloaded.ok else reloaded


def _as_before(manager: Manager, service: Service, main: Process, reloaded: Reloaded) -> Reloaded:
    """`reloaded`, unless the manager says that the service is not what it was."""
    now = manager.services.get(service.name)
    if now is None or now.invocation != service.invocation:
        return reloaded
    if now.failed:
        return replace(reloaded, ok=False, reason="its unit failed")
    if now.main is not None and now.main.pid != main.pid:
        return replace(reloaded, ok=False, reason="another process took the place of its main process")
    return reloaded


async def _why_ended(
    manager: Manager, service: Service, main: Process, reloaded: Reloaded, when: str
) -> Reloaded | None:
    """The verdict on a service whose main process has ended; None if it was done, or was stopped."""
    return _ended(reloaded, when) if await _went_down(manager, service, main) else None


async def _went_down(manager: Manager, service: Service, main: Process) -> bool:
    """Whether a service whose main process has ended went down by itself, rather than being stopped or restarted."""
    with trio.move_on_after(_NOTICED_SEC):
        while (now := manager.services.get(service.name)) and now.main and now.main.pid == main.pid:
            await trio.sleep(_POLL_SEC)
    now = manager.services.get(service.name)
    return now is not None and now.went_down_since(service.restarts)


async def _restarted(manager: Manager, service: Service) -> Service | None:
    """The service after a restart, without a main process if that has failed; None if it was stopped."""
    with trio.move_on_after(_NOTICED_SEC):
        while True:
            now = manager.services.get(service.name)
            if now is not None and now.main is not None and now.invocation != service.invocation:
                return now
            if now is not None and now.main is None and now.failed:
                return now
            await trio.sleep(_POLL_SEC)
    return None


async def _health(
    manager: Manager, service: Service, main: Process, reloaded: Reloaded, since: str
) -> Reloaded | None:
    settings = service.settings
    if not settings.health_check:
        return reloaded
    deadline = trio.current_time() + settings.health_check_usec / 1_000_000
    try:
        namespace = main.namespace()
    except Gone:
        return await _why_ended(manager, service, main, reloaded, f"after {since}")
    try:
        while True:
            left = max(deadline - trio.current_time(), _RETRY_SEC)
            try:
                verdict = await run_all(
                    manager,
                    service,
                    namespace,
                    settings.health_check,
                    round(left * 1_000_000),
                    "health check",
                )
            except Gone:
                return await _why_ended(manager, service, main, reloaded, f"after {since}")
            if not verdict.reason:
                say("debug", service.name, "health check passed")
                return reloaded
            if not main.alive():
                return await _why_ended(manager, service, main, reloaded, f"after {since}")
            if trio.current_time() + _RETRY_SEC >= deadline:
                return replace(reloaded, ok=False, reason=verdict.reason, output=verdict.output)
            await trio.sleep(_RETRY_SEC)
    finally:
        os.close(namespace)


def _ended(reloaded: Reloaded, when: str) -> Reloaded:
    return replace(reloaded, ok=False, reason=f"its main process ended {when}")
