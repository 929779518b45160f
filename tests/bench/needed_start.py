# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least that Python with trio needs to start beside services that have their stacks: see `needed.py`.

    python -m bench.needed_start RUNTIME-DIRECTORY STATE-DIRECTORY DROP-DIRECTORY

It reads what is kept of each service, whether it still runs, and what it shows; it reads each copy once, and watches
from where the next drop comes, and each service's end. A program of its own: what it imports is all that it needs.
"""

import hashlib
import json
import os
import sqlite3
import sys

import trio
from inotify_simple import INotify, flags

from watcher.mounts import syscalls


class Looking:
    """What the thread does, which enters namespaces."""

    def __init__(self, runtime_directory: str, state_directory: str) -> None:
        self._registrations = f"{runtime_directory}/services"
        self._state = state_directory
        self._whole: set[str] = set()
        self._open: list[int] = []
        syscalls.unshare(syscalls.CLONE_FS)
        self._own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._task = os.open("/proc/thread-self", os.O_PATH | os.O_CLOEXEC)

    def all(self) -> None:
        for entry in os.listdir(self._registrations):
            with open(f"{self._registrations}/{entry}", encoding="utf-8") as file:
                self._one(json.load(file))

    def _one(self, service: dict[str, object]) -> None:
        pid, unit = service["pid"], service["name"]
        assert isinstance(pid, int)
        self._open.append(os.pidfd_open(pid))
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            assert int(file.read().rsplit(")", 1)[1].split()[19]) == service["started"]
        with open(f"{self._state}/units/{unit}.exec/.state.json", encoding="utf-8") as file:
            layers = json.load(file)["accepted"]["stack"]["layers"]
        for layer in layers:
            self._verify(layer["digest"])
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
        table = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._task)
        rows = b""
        while part := os.read(table, 1 << 16):
            rows += part
        shown = [row for row in rows.splitlines() if row.split(b" ", 5)[4] == b"/etc"][-1]
        assert all(layer["digest"].encode() in shown for layer in layers)
        # To see to it that it sees what the host replaces.
        self._open.append(syscalls.open_tree(syscalls.AT_FDCWD, "/etc", os.O_CLOEXEC))
        syscalls.setns(self._own, syscalls.CLONE_NEWNS)
        os.close(table)
        os.close(namespace)

    def _verify(self, digest: str) -> None:
        path = f"{self._state}/store/{digest}"
        os.stat(path)
        if digest not in self._whole:
            with open(path, "rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == digest
            self._whole.add(digest)


async def main(runtime_directory: str, state_directory: str, drops: str) -> None:
    inotify = INotify(nonblocking=True)
    for path in (drops, f"{runtime_directory}/services"):
        inotify.add_watch(path, flags.MOVED_TO | flags.CLOSE_WRITE | flags.DELETE | flags.MOVED_FROM)
    history = sqlite3.connect(f"{state_directory}/history.sqlite")
    await trio.to_thread.run_sync(lambda: Looking(runtime_directory, state_directory).all())
    print("ready", flush=True)
    await trio.to_thread.run_sync(sys.stdin.read)
    history.close()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
