# SPDX-License-Identifier: LGPL-2.1-or-later
"""`managers/aside.py` on systemd: a command is run in a transient unit, a template unit gets an instance of its own.

A transient unit's properties are for everybody to read (`systemctl show`), so what a command reads comes in a file. So
it does for an instance, by `StandardInput=file:/run/confext-watcher/notify/%i.json`: D-Bus has no other way to hand it
over.
"""

from __future__ import annotations

import contextlib
import os
import secrets

import trio

from watcher.managers.aside import environment
from watcher.managers.base import Ended
from watcher.managers.systemd.transient import Transient
from watcher.model import Event, Later
from watcher.records import durable
from watcher.settings.unit_names import is_template
from watcher.settings.values import split

_DIRECTORY = "notify"


class Aside:
    """Runs programs that are about a service and not of it.

    Args:
        transient: runs commands, and starts units.
        runtime_directory: the watcher's.
    """

    def __init__(self, transient: Transient, runtime_directory: str) -> None:
        self._transient = transient
        self._directory = os.path.join(runtime_directory, _DIRECTORY)

    async def run(self, event: Event, command: str, text: bytes, timeout_sec: float) -> Ended:
        """`RunAside`; Later also if systemd does not tell how it ended."""
        if is_template(command):
            return await self._start(command, text, timeout_sec)
        words = split(command)
        return await self._transient.run_aside(event.service, words, text, environment(event), timeout_sec)

    async def _start(self, template: str, text: bytes, timeout_sec: float) -> Ended:
        instance = secrets.token_hex(8)
        path = os.path.join(self._directory, f"{instance}.json")
        try:
            await trio.to_thread.run_sync(self._write, path, text)
            reason = await self._transient.start(template.replace("@.", f"@{instance}."), timeout_sec)
        except OSError as error:
            raise Later(f"could not be started: {error.strerror}") from error
        finally:
            # systemd has opened it: a start is done when the unit's program runs (Type=exec), or has ended (oneshot).
            with contextlib.suppress(OSError):
                os.unlink(path)
        return Ended(reason, "")

    def _write(self, path: str, text: bytes) -> None:
        durable.make(self._directory, 0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(text)
