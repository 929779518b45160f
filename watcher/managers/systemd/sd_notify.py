# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon tells the service manager that started it: sd_notify(3), without libsystemd.

The protocol is one datagram of `KEY=VALUE` lines to the socket that `$NOTIFY_SOCKET` names. If the variable is not set,
every function here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

import trio

from watcher.records import journal
from watcher.records.backlog import Backlog, wait_for_room


def ready(status: str = "") -> None:
    """Say that start-up, or a reload, is complete."""
    global _complete
    _complete = True
    _send("READY=1", _status(status))


def is_starting() -> bool:
    """Whether the service manager still waits for `ready()`, and with it all units that are ordered after us."""
    return bool(os.environ.get("NOTIFY_SOCKET")) and not _complete


def reloading(status: str = "") -> None:
    """Say that the configuration is being read again; `ready()` must follow.

    By `MONOTONIC_USEC=` the service manager tells this reload from an older one (`Type=notify-reload`,
    systemd.service(5)).
    """
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    _send("RELOADING=1", f"MONOTONIC_USEC={now}", _status(status))


def stopping(status: str = "") -> None:
    """Say that shutting down has begun."""
    _send("STOPPING=1", _status(status))


def status(text: str) -> None:
    """Set the one line that `systemctl status` shows."""
    _send(_status(text))


def watchdog_interval() -> float | None:
    """Seconds within which the service manager expects a sign of life; None: it expects none of this process."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if pid.isdecimal() and int(pid) != os.getpid():
        return None
    return int(usec) / 1_000_000


async def keep_alive() -> None:
    """Feed the watchdog from the event loop while the loop turns; returns at once if there is none."""
    interval = watchdog_interval()
    while interval is not None:
        if os.environ.get("NOTIFY_SOCKET", ""):
            with contextlib.suppress(OSError):  # a service manager that is busy hears the next one
                _send_now(b"WATCHDOG=1")
        await trio.sleep(interval / 2)


def _status(text: str) -> str:
    return "STATUS=" + text.replace("\n", " ") if text else ""


def _send(*lines: str) -> None:
    """Send now, or as soon as there is room: the event loop does not wait for a service manager that is busy."""
    if os.environ.get("NOTIFY_SOCKET", ""):
        message = "\n".join(line for line in lines if line)
        _backlog.put(message.encode("utf-8", "backslashreplace"))


def _send_now(message: bytes) -> None:
    """Raises BlockingIOError when there is no room."""
    with _connected() as sock:
        sock.send(message)


def _wait_for_room() -> None:
    with _connected() as sock:
        wait_for_room(sock)


def _connected() -> socket.socket:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        raise ValueError(f"$NOTIFY_SOCKET is {address!r}, neither a path nor an abstract socket")
    if address[0] == "@":
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _refused(message: bytes, error: OSError) -> None:
    journal.log.warning(f"the service manager was not told {message.decode()!r}: {error}")


def _lost(count: int) -> bytes:
    return f"STATUS={count} messages were lost".encode()


_backlog = Backlog(_send_now, _wait_for_room, _refused, _lost)
_complete = False
