# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling a process by a signal to reload."""

from __future__ import annotations

import trio

from watcher.managers.base import Reloaded
from watcher.mounts.process import Process
from watcher.settings.signals import signal_name

_HANDLER_SEC = 5.0


async def send_signal(main: Process, number: int) -> Reloaded:
    """Send a signal that asks for a reload, but not to a process that it would end.

    One that was started just now is given the time to install its handler.

    Raises:
        Gone: it has ended.
    """
    deadline = trio.current_time() + _HANDLER_SEC
    while not main.survives(number):
        if trio.current_time() > deadline:
            reason = f"{signal_name(number)} was not sent, it has no handler and would be ended by it"
            return Reloaded(ok=True, reason=reason)
        await trio.sleep(0.02)
    main.signal(number)
    return Reloaded(ok=True, told=signal_name(number))
