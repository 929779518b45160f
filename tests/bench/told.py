# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service of `systemd.py`, a program of its own: `told.py NAME` says when it was told to reload, and what it saw.

Type=notify-reload or ExecReload=kill: it does as $NOTIFY_SOCKET says.
"""

import os
import signal
import socket
import sys
import time

STAMP = "/etc/bench/version"
PIPE = "/run/bench/told"


def notify(text: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(text.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def seen() -> str:
    try:
        with open(STAMP, "rb") as file:
            return file.read(17).decode()
    except FileNotFoundError:
        return "-"


def main() -> None:
    # Never runs, but has to be there: 262 does not start a Type=notify-reload service without one.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    told = os.open(PIPE, os.O_WRONLY)
    notify("READY=1")
    while True:
        signal.sigwait({signal.SIGHUP})
        when = time.monotonic_ns()
        notify(f"RELOADING=1\nMONOTONIC_USEC={when // 1000}")
        os.write(told, f"{sys.argv[1]} {when} {seen()}\n".encode())
        notify("READY=1")


if __name__ == "__main__":
    main()
