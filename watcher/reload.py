# SPDX-License-Identifier: LGPL-2.1-or-later
"""After the swap: ask the service to reload, and judge how it takes it.

Judged are the reload's own result, the main process (the same, and alive), and what the unit asks for: `HealthCheck=`,
tried again until it succeeds or `HealthCheckSec=` is over, and `HealthWatchSec=`, for which the service must stay up.
"""

from __future__ import annotations

import os
from dataclasses import replace

import trio

from watcher.check import run_all
from watcher.managers import Manager, Reloaded, Service
from watcher.process import Gone, Process

_RETRY_SEC = 0.2


async def reload_and_judge(manager: Manager, service: Service, main: Process) -> Reloaded:
    """Ask a running service to reload; `ok` only if it came through.

    Args:
        main: its main process, held by the caller.
    """
    reloaded = await manager.reload(service)
    if not reloaded.ok:
        return reloaded
    if reloaded.told == "restart":
        return reloaded  # another process now, which its manager has seen come up
    if not main.alive():
        return _ended(reloaded, "when it was told to reload")
    reloaded = await _health(manager, service, main, reloaded)
    watch = service.settings.health_watch_usec
    if reloaded.ok and watch:
        with trio.move_on_after(watch / 1_000_000):
            await trio.lowlevel.wait_readable(main.pidfd)
            return _ended(reloaded, f"within {watch / 1_000_000:g} s of its reload")
    return reloaded


async def _health(manager: Manager, service: Service, main: Process, reloaded: Reloaded) -> Reloaded:
    settings = service.settings
    if not settings.health_check:
        return reloaded
    deadline = trio.current_time() + settings.health_check_usec / 1_000_000
    try:
        namespace = main.namespace()
    except Gone:
        return _ended(reloaded, "after its reload")
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
                return _ended(reloaded, "after its reload")
            if not verdict.reason:
                return reloaded
            if trio.current_time() + _RETRY_SEC >= deadline:
                return replace(reloaded, ok=False, reason=verdict.reason, output=verdict.output)
            await trio.sleep(_RETRY_SEC)
    finally:
        os.close(namespace)


def _ended(reloaded: Reloaded, when: str) -> Reloaded:
    return replace(reloaded, ok=False, reason=f"its main process ended {when}")
