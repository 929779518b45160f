# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process in a mount namespace of its own that does as it is told: what the swap is tried on.

Run as a program it is that process: it makes itself a root of its own (with everything of the machine's but `/etc`),
and then evaluates what it reads from its standard input, one expression a line. The functions it can be asked for are
those below "inside".
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    here = Path(__file__).resolve()
    sys.path[:0] = map(str, here.parents[1:3])

from support import fork_server
from watcher.mounts import syscalls
from watcher.mounts.process import Process
from watcher.mounts.table import Mounted, Table

CLONE_NEWUSER = 0x10000000
MS_BIND = 0x1000


class Service:
    """The process, from outside.

    Args:
        root: an existing directory that becomes its root; what is in its `etc` is its base. None: `inside` is given.
        inside: PID of a process in whose mount namespace it starts, to make a copy of that for itself.
        options: "user-first" (a user namespace of its own, which then owns its mount namespace), "user-last" (a mount
            namespace first, as systemd does it for PrivateUsers=); "private", "slave" or "shared": how its mounts
            propagate from and to those it was copied from.
    """

    def __init__(self, root: Path | None, *options: str, inside: int | None = None) -> None:
        self._process = fork_server.Popen(
            [sys.executable, __file__, str(root or ""), str(inside or ""), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert self("'ready'") == "ready"
            self.process = Process(self._process.pid)
            self.namespace = self.process.namespace()
        except BaseException:
            self._process.kill()
            self._process.__exit__(None, None, None)
            raise

    def __call__(self, expression: str) -> Any:
        """What the process says to that: a value that JSON has, or the OSError that it got."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(expression), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '{"died": true}')
        assert "died" not in answer, "the service has died"
        if "error" in answer:
            raise OSError(*answer["error"])
        return answer["value"]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def table(self) -> Table:
        return Table(self("read('/proc/self/mountinfo')"))

    @property
    def mounted(self) -> Mounted:
        return self.table.mounted()

    def read(self, path: str) -> str:
        """A file's content; OSError if it cannot be read."""
        value = self(f"read({path!r})")
        assert isinstance(value, str)
        return value

    def close(self) -> None:
        """End it; may be called twice."""
        if self.namespace < 0:
            return
        self.process.close()
        os.close(self.namespace)
        self.namespace = -1
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_root(directory: Path, files: Mapping[str, str]) -> Path:
    """A root directory with these files in its `etc`; a name that ends in "/" is an empty directory."""
    for name, content in files.items():
        path = directory / "etc" / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return directory


# ---- inside


def read(path: str, dir_fd: int | None = None) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    with open(fd, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return file.read()


def write(path: str, text: str) -> int:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        return file.write(text)


def mode(path: str) -> int:
    return os.stat(path).st_mode & 0o7777


def options(path: str) -> list[str]:
    """The flags of the mount that is uppermost at a path."""
    fd = os.open(path, os.O_PATH)
    try:
        number = next(
            line.split()[1] for line in read(f"/proc/self/fdinfo/{fd}").splitlines() if "mnt_id" in line
        )
    finally:
        os.close(fd)
    rows = (row.split() for row in read("/proc/self/mountinfo").splitlines())
    return next(row[5] for row in rows if row[0] == number).split(",")


def tmpfs(path: str) -> None:
    syscalls.mount("none", path, "tmpfs", 0)


def bind(source: str, target: str, attributes: int = 0) -> None:
    """With everything below it, as systemd does it."""
    syscalls.mount(source, target, None, MS_BIND | syscalls.MS_REC)
    flag(target, attributes)


def flag(path: str, attributes: int, clear: int = 0) -> None:
    syscalls.mount_setattr(syscalls.AT_FDCWD, path, 0, attr_set=attributes, attr_clr=clear)


def set_up(*steps: tuple[str, str]) -> None:
    """Bind mounts (source, target) made as systemd makes them: before its mounts propagate to each other."""
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    for source, target in steps:
        bind(source, target)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SHARED)


def overlay(source: str, *lower: str, target: str = "/etc", flags: int = 0) -> None:
    """Put an overlay of directories on a path, `lower` topmost first; flags of move_mount(2)."""
    context = syscalls.fsopen("overlay")
    syscalls.fsconfig_set_string(context, "source", source)
    for directory in lower:
        syscalls.fsconfig_set_string(context, "lowerdir+", directory)
    syscalls.fsconfig_cmd_create(context, "overlay")
    tree = syscalls.fsmount(context, syscalls.MOUNT_ATTR_RDONLY)
    move = syscalls.MOVE_MOUNT_F_EMPTY_PATH | flags
    syscalls.move_mount(tree, "", syscalls.AT_FDCWD, target, move)
    os.close(tree)
    os.close(context)


def rows() -> list[str]:
    """Of the mount table, what is on `/etc` and below, without the numbers."""
    found = (row.split(" ") for row in read("/proc/self/mountinfo").split("\n") if row)
    return sorted(
        f"{row[4]} {row[2]} {row[3]} {row[5]}" for row in found if (row[4] + "/").startswith("/etc/")
    )


def _start(root: str, inside: str, wanted: list[str]) -> None:
    flags = CLONE_NEWUSER | syscalls.CLONE_NEWNS if "user-first" in wanted else syscalls.CLONE_NEWNS
    if inside:
        with Process(int(inside)) as process:
            fd = process.namespace()
            syscalls.setns(fd, syscalls.CLONE_NEWNS)
            os.close(fd)
    syscalls.unshare(flags)
    if "user-first" in wanted:
        _map_users()
    if root:
        _make_root(root)
    if "user-last" in wanted:
        syscalls.unshare(CLONE_NEWUSER)
        _map_users()
    elif "private" in wanted:
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    elif "slave" in wanted:
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)


def _map_users() -> None:
    for name, line in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(line)


def _make_root(root: str) -> None:
    """As systemd does it for RootDirectory=: what the host mounts arrives, nothing goes back, children follow."""
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.mount(root, root, None, MS_BIND | syscalls.MS_REC)
    for entry in os.scandir("/"):
        target = f"{root}/{entry.name}"
        if entry.name in ("etc", "lost+found"):
            continue
        if entry.is_symlink():
            with contextlib.suppress(FileExistsError):
                os.symlink(os.readlink(entry.path), target)
        elif entry.is_dir():
            os.makedirs(target, exist_ok=True)
            syscalls.mount(entry.path, target, None, MS_BIND | syscalls.MS_REC)
    # It changes the root of every process in the namespace, and libc has no function for it.
    subprocess.run(["pivot_root", ".", "."], cwd=root, check=True)
    syscalls.umount2("/", syscalls.MNT_DETACH)
    os.chdir("/")
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_SHARED)


def main() -> None:
    _start(sys.argv[1], sys.argv[2], sys.argv[3:])
    for line in sys.stdin:
        try:
            answer = {"value": eval(json.loads(line), globals())}
        except OSError as error:
            answer = {"error": [error.errno, error.strerror, error.filename]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
