# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon tells the service manager that started it: sd_notify(3), without libsystemd.

The protocol is one datagram of `KEY=VALUE` lines to the socket that `$NOTIFY_SOCKET` names. Where the
variable is not set nobody asked, and every function here does nothing, so that callers need not care.
"""

from __future__ import annotations

import os
import socket
import time

import trio


def ready(status: str = "") -> None:
    """Say that start-up, or a reload, is complete."""
    global _complete
    _complete = True
    _send("READY=1", _status(status))


def is_starting() -> bool:
    """Whether whoever started us still waits for `ready()`, and with him all that is ordered after us."""
    return bool(os.environ.get("NOTIFY_SOCKET")) and not _complete


def reloading(status: str = "") -> None:
    """Say that the configuration is being read again; `ready()` must follow.

    By `MONOTONIC_USEC=` a `Type=notify-reload` service (systemd.service(5)) tells this from an older one.
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
    """Seconds within which a sign of life is expected; None if nobody waits for one from this process."""
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
        _send("WATCHDOG=1")
        await trio.sleep(interval / 2)


def _status(text: str) -> str:
    return "STATUS=" + text.replace("\n", " ") if text else ""


def _send(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] not in "/@":
        raise ValueError(f"$NOTIFY_SOCKET is {address!r}, neither a path nor an abstract socket")
    if address[0] == "@":
        address = "\0" + address[1:]
    message = "\n".join(line for line in lines if line)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(message.encode("utf-8", "backslashreplace"))


_complete = False
