# SPDX-License-Identifier: LGPL-2.1-or-later
"""A way to the system bus that is cut before the N-th piece of what goes over it, in either direction.

    python3 cut_bus.py DIRECTORY

listens at DIRECTORY/bus. While there is a file DIRECTORY/armed that says "N", what goes by is counted; at the N-th
piece every connection is closed, and "armed" becomes "cut". While that is there, nobody gets through. If it says
"N dbus", the bus itself is stopped before that, with systemd's own connection; who arms it has to start it again.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

_BUS = "/run/dbus/system_bus_socket"
_PIECE = 1 << 16
_lock = threading.Lock()
_count = 0


def passes(directory: str) -> bool:
    """Whether the next piece gets through."""
    global _count
    with _lock:
        if os.path.exists(f"{directory}/cut"):
            return False
        try:
            with open(f"{directory}/armed", encoding="ascii") as file:
                number, *how = file.read().split()
        except FileNotFoundError:
            _count = 0
            return True
        _count += 1
        if _count < int(number):
            return True
        if how:
            subprocess.run(["systemctl", "stop", "dbus.socket", "dbus.service"], check=True)
        os.rename(f"{directory}/armed", f"{directory}/cut")
        return False


def relay(directory: str, source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until an end hangs up or the way is cut."""
    try:
        while (data := source.recv(_PIECE)) and passes(directory):
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other direction has ended before


def main(directory: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/bus")
    listener.listen()
    while True:
        client, _ = listener.accept()
        bus = socket.socket(socket.AF_UNIX)
        try:
            if os.path.exists(f"{directory}/cut"):
                raise ConnectionRefusedError
            bus.connect(_BUS)
        except OSError:
            client.close()
            bus.close()
            continue
        for ends in ((client, bus), (bus, client)):
            threading.Thread(target=relay, args=(directory, *ends), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
