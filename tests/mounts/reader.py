# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads files of a service as fast as it can, in the service's own mount namespace, until it is told to stop.

    reader.py PID WHAT...

Prints one JSON object: for each WHAT (a method of `Reader`) how many reads there were, and how many went wrong, by how.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter

SECRET = b"to be hidden"
ETC = os.O_PATH | os.O_DIRECTORY


def content(path: str, directory: int | None = None) -> bytes:
    fd = os.open(path, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(fd, 64)
    finally:
        os.close(fd)


class Reader:
    """Each method is one round of reads; what goes wrong is counted by name."""

    def __init__(self) -> None:
        self.reads = 0
        self.wrong: Counter[str] = Counter()
        self.kept = os.open("/etc", ETC)
        self.kept_app = os.open("/etc/app", ETC)

    def path(self) -> None:
        """Files of the stack and of the base, by path."""
        for path in ("/etc/one", "/etc/app/two", "/etc/base.conf"):
            if content(path) not in (b"1", b"2", b"base"):
                self.wrong["content"] += 1
            self.reads += 1

    def pair(self) -> None:
        """Two files of the stack through one descriptor, opened anew each time."""
        directory = os.open("/etc", ETC)
        try:
            if content("one", directory) != content("app/two", directory):
                self.wrong["mixed"] += 1
        finally:
            os.close(directory)
        self.reads += 2

    def hidden(self) -> None:
        """What a sandbox mount hides, by path."""
        for path in ("/etc/secret", "/etc/app/private"):
            if content(path) == SECRET:
                self.wrong["hidden file shown"] += 1
            self.reads += 1

    def held(self) -> None:
        """The same through descriptors kept from before: from the beginning, and for a while."""
        for path, directory in (
            ("secret", self.kept),
            ("private", self.kept_app),
            ("app/private", self.kept),
        ):
            if content(path, directory) == SECRET:
                self.wrong["hidden file shown"] += 1
            self.reads += 1
        if self.reads % 64 < 3 and self.reads > 64:
            os.close(self.kept_app)
            self.kept_app = os.open("/etc/app", ETC)


def main() -> None:
    namespace = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
    from watcher.mounts import syscalls

    syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    readers = {what: Reader() for what in sys.argv[2:]}
    rounds = [(reader, getattr(reader, what)) for what, reader in readers.items()]
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    print("reading", flush=True)
    while not stopped:
        for reader, read in rounds:
            try:
                read()
            except OSError as error:
                reader.wrong[str(error)] += 1
    print(
        json.dumps({what: {"reads": one.reads, "wrong": one.wrong} for what, one in readers.items()}),
        flush=True,
    )


if __name__ == "__main__":
    main()
