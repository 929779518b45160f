# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system that stops answering when it is told to: `/dev/fuse` by hand, in a process of its own.

It shows a directory as it is, read-only, and remembers nothing: every step on a path is a request. `hang()` has it read
no request any more: who asks then waits in the kernel, and can only be killed. `hang(operation)` makes it take requests
of that kind, and leave them without an answer: who asks cannot even be killed. `answer()` lets all go on; `end()`
aborts what waits, as `fusermount -u` with a killed server does.
"""

from __future__ import annotations

import os
import selectors
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 25, 26, 27, 28, 29, 36, 38, 42
RENAME2 = 45

NO_ANSWER = (FORGET, BATCH_FORGET, INTERRUPT)
_IN = struct.Struct("<IIQQIIII")
_OUT = struct.Struct("<IiQ")
_ENOENT, _ENOSYS = 2, 38


class Hanging:
    """The mount, for a test."""

    def __init__(self, shown: Path, where: Path) -> None:
        self.shown, self.where = shown, where
        words = [sys.executable, "-IS", __file__, str(shown), str(where)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def hang(self, *operations: int) -> None:
        """From now on these have no answer; nothing has one if none is named."""
        self._say("hang " + " ".join(map(str, operations)))

    def slow(self, seconds: float) -> None:
        """Each answer takes so long from now on."""
        self._say(f"slow {seconds}")

    def answer(self) -> None:
        """Everything has an answer again, also what was asked meanwhile."""
        self._say("answer")

    def wait_until_asked(self) -> None:
        """Until one waits for an answer to what `hang()` has named."""
        self._say("asked?")

    def end(self) -> None:
        """As a server that is killed: what waits fails with ENOTCONN, and so does everything after."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None
        print(words, file=self._process.stdin, flush=True)
        self._heard()

    def _heard(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "done\n"


@contextmanager
def hanging(shown: Path, where: Path) -> Iterator[Hanging]:
    """`shown` on `where`; unmounted at the end, when nothing hangs any more."""
    mounted = Hanging(shown, where)
    try:
        yield mounted
    finally:
        if mounted._process.poll() is None:
            mounted.end()
        subprocess.run(["umount", "--lazy", where], check=True)


# What follows is the server.


def _attributes(path: str) -> bytes:
    st = os.lstat(path)
    times = [divmod(ns, 1_000_000_000) for ns in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns)]
    facts = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, 4096, 0)
    seconds, rest = [time[0] for time in times], [time[1] for time in times]
    return struct.pack("<6Q10I", st.st_ino, st.st_size, st.st_blocks, *seconds, *rest, *facts)


class _Server:
    def __init__(self, shown: str, device: int) -> None:
        self.device = device
        self.hangs: set[int] | None = set()  # None: nothing is read
        self.kept: list[bytes] = []
        self.delay = 0.0
        self._paths = {1: shown}
        self._nodes = {shown: 1}

    def read(self) -> None:
        request = os.read(self.device, 1 << 20)
        assert self.hangs is not None
        if _IN.unpack_from(request)[1] in self.hangs:
            self.kept.append(request)
        else:
            self.handle(request)

    def go_on(self) -> None:
        self.hangs = set()
        kept, self.kept = self.kept, []
        for request in kept:
            self.handle(request)

    def handle(self, request: bytes) -> None:
        _, operation, unique, node = _IN.unpack_from(request)[:4]
        if operation in NO_ANSWER:
            return
        time.sleep(self.delay)
        try:
            error, answer = 0, self._answer(operation, self._paths.get(node, ""), request[_IN.size :])
        except OSError as problem:
            error, answer = problem.errno or _ENOSYS, b""
        try:
            os.write(self.device, _OUT.pack(_OUT.size + len(answer), -error, unique) + answer)
        except FileNotFoundError:
            pass  # who has asked was interrupted

    def _answer(self, operation: int, path: str, body: bytes) -> bytes:
        if operation == INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 16, 0, 0)
        if operation == LOOKUP:
            return self._entry(os.path.join(path, os.fsdecode(body.rstrip(b"\0"))))
        if operation == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + _attributes(path)
        if operation == READLINK:
            return os.fsencode(os.readlink(path))
        if operation in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, 1 if operation == OPEN else 0, 0)  # FOPEN_DIRECT_IO
        if operation == READ:
            return self._read(path, body)
        if operation == READDIR:
            return self._names(path, body)
        if operation == STATFS:
            return struct.pack("<5Q4I24x", 1, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if operation == RENAME2:
            return self._rename(path, body)
        if operation in (RELEASE, RELEASEDIR, FLUSH, DESTROY):
            return b""
        raise OSError(_ENOSYS, "not here")

    def _entry(self, path: str) -> bytes:
        attributes = _attributes(path)
        node = self._nodes.setdefault(path, len(self._nodes) + 1)
        self._paths[node] = path
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + attributes

    def _read(self, path: str, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _names(self, path: str, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        for number, name in enumerate(sorted(os.listdir(path))[offset:], offset + 1):
            st = os.lstat(os.path.join(path, name))
            entry = struct.pack(
                "<QQII", st.st_ino, number, len(os.fsencode(name)), stat.S_IFMT(st.st_mode) >> 12
            )
            entry += os.fsencode(name)
            entry += b"\0" * (-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def _rename(self, path: str, body: bytes) -> bytes:
        (to,) = struct.unpack_from("<Q", body)
        old, new = body[16:].rstrip(b"\0").split(b"\0")
        os.rename(os.path.join(path, os.fsdecode(old)), os.path.join(self._paths[to], os.fsdecode(new)))
        return b""


def _serve(shown: str, where: str) -> None:
    import ctypes

    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if ctypes.CDLL(None, use_errno=True).mount(b"hangs", os.fsencode(where), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount", where)
    server = _Server(shown, device)
    selector = selectors.DefaultSelector()
    selector.register(device, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    print("done", flush=True)
    asked = False
    while True:
        for key, _ in selector.select():
            if key.fd == device:
                if server.hangs is None:
                    continue  # since just now
                server.read()
                if asked and server.kept:
                    asked = False
                    print("done", flush=True)
                continue
            command, *numbers = os.read(0, 4096).decode().split() or ["end"]
            if command == "end":
                return
            if command == "asked?" and not server.kept:
                asked = True
                continue
            if command == "hang" and numbers:
                server.hangs = set(map(int, numbers))
            elif command == "slow":
                server.delay = float(numbers[0])
            elif command == "hang":
                server.hangs = None
                selector.unregister(device)
            elif command == "answer":
                if server.hangs is None:
                    selector.register(device, selectors.EVENT_READ)
                server.go_on()
            print("done", flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
