# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts the program's processes in a few milliseconds: a fork of a process that has imported all of it already.

`Popen` is `subprocess.Popen`, a child of the caller like any other. It forks where the words are those of the program
(`confext-watcher`, `python -m watcher`, a file of `support/`), and really starts what is anything else, or is to be
started in a way that a fork cannot have. What a real start is like is tested with `subprocess` itself, and in the beds.

Run as a program it is the process that forks.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from support import CHECKOUT

COMMAND: Final = Path(sys.executable).with_name("confext-watcher")
"""The command as it is installed beside the interpreter."""

_SUPPORT = Path(__file__).resolve().parent
# What an interpreter asks for as it starts, and a fork can no longer heed.
_AT_START = ("LANG", "LC_", "TZ", "PYTHON", "LD_", "GLIBC_", "MALLOC_")
_IGNORED = frozenset({"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"})
_MESSAGE_MAX = 1 << 20
_SYS_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220}.get(os.uname().machine)


class Popen(subprocess.Popen[Any]):
    """As `subprocess.Popen`.

    Args:
        inside: PID of a process into whose user and mount namespace the new one goes, with its own credentials.
    """

    def __init__(self, args: Sequence[str], *, inside: int | None = None, **options: Any) -> None:
        self._inside = inside
        super().__init__(args, **options)

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        # In this order in CPython 3.11 to 3.14: executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        # creationflags, shell; the two ends of each pipe; and what else a child can be given.
        (*first, cwd, env, _, _, shell), pipes, more = rest[:9], rest[9:15], rest[15:]
        words = [os.fspath(word) for word in args]
        target = _target(words)
        environment = dict(os.environ if env is None else env)
        plain = (first, shell, more) == (
            [None, None, True, ()],
            False,
            (True, None, None, None, -1, False, -1),
        )
        if target is None or not plain or _at_start(environment) != _at_start(os.environ):
            words = [*(() if self._inside is None else entering(self._inside)), *words]
            super()._execute_child(words, *rest)  # type: ignore[misc]
            return
        order = {
            "target": target,
            "words": words,
            "env": environment,
            "cwd": os.fspath(cwd or os.getcwd()),
            "inside": self._inside,
        }
        theirs = pipes[0], pipes[3], pipes[5]
        self.pid = server().fork(order, [own if fd == -1 else fd for own, fd in enumerate(theirs)])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run(args: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run(..., capture_output=True)`, with the `input`, `timeout` and `check` of that."""
    sent, timeout, check = (
        options.pop("input", None),
        options.pop("timeout", None),
        options.pop("check", False),
    )
    options.setdefault("stdin", subprocess.DEVNULL if sent is None else subprocess.PIPE)
    with Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        try:
            out, err = process.communicate(sent, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def entering(pid: int) -> list[str]:
    """The command that runs another one in the user and mount namespace of a process."""
    return ["nsenter", "--preserve-credentials", "--user", "--mount", f"--target={pid}", "--"]


def _target(words: Sequence[str]) -> tuple[str, int] | None:
    """The module that these words start, and how many of them come before its arguments; None: something else."""
    if _SYS_CLONE is None:
        return None
    if words[0] == str(COMMAND):
        return "watcher.cli.main", 1
    if words[:3] == [sys.executable, "-m", "watcher"]:
        return "watcher.cli.main", 3
    if words[0] == sys.executable and len(words) > 1 and Path(words[1]).parent == _SUPPORT:
        return f"support.{Path(words[1]).stem}", 2
    return None


def _at_start(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_AT_START) and name not in _IGNORED
    }


class Server:
    """The process that forks, from outside.

    Attributes:
        forks: how many it has made.
    """

    def __init__(self) -> None:
        self.forks = 0
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs.fileno(),
                env=os.environ | {"PYTHONPATH": f"{CHECKOUT}/tests:{CHECKOUT}"},
            )
        self.pid = self._process.pid

    def fork(self, order: dict[str, Any], streams: Sequence[int]) -> int:
        """The PID of a new child of ours."""
        sent = json.dumps(order, ensure_ascii=True).encode()
        passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
        with self._lock:
            try:
                self._socket.sendmsg([sent], [passed])
                answer = self._socket.recv(_MESSAGE_MAX)
            except BaseException:
                # An answer that was not read would be taken for the next one.
                stop()
                raise
            self.forks += 1
        assert answer, "the process that forks has died"
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_server: Server | None = None


def server() -> Server:
    """The one of this process; it lasts until `stop()`."""
    global _server
    if _server is None:
        _server = Server()
    return _server


def pid() -> int:
    """Its PID, 0 if there is none."""
    return 0 if _server is None else _server.pid


def stop() -> None:
    global _server
    if _server is not None:
        _server.close()
    _server = None


# ---- inside


def _main() -> Any:
    _import_all()
    order = _serve()
    _become(order)
    # What follows is an ordinary program with an ordinary end.
    return importlib.import_module(order["target"][0]).main()


def _import_all() -> None:
    package = importlib.import_module("watcher")
    for module in pkgutil.walk_packages(package.__path__, "watcher."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("dying", "portrait", "service"):
        importlib.import_module(f"support.{name}")
    gc.collect()
    gc.freeze()  # so that a child copies fewer pages


def _serve() -> dict[str, Any]:
    """Fork for each order; returns in the child, with its order."""
    orders = socket.socket(fileno=0)
    while True:
        message, ancillary, _, _ = orders.recvmsg(_MESSAGE_MAX, socket.CMSG_SPACE(3 * 4))
        if not message:
            os._exit(0)
        streams = array.array("i", b"".join(data for _, _, data in ancillary))
        pid = _fork_sibling()
        if pid == 0:
            orders.detach()
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            os.closerange(3, max(streams) + 1)
            order: dict[str, Any] = json.loads(message)
            return order
        for fd in streams:
            os.close(fd)
        orders.send(str(pid).encode())


def _fork_sibling() -> int:
    """fork(), but the child is our parent's, which then can wait for it: CLONE_PARENT, see clone(2)."""
    clone_parent = 0x00008000
    ctypes.pythonapi.PyOS_BeforeFork()
    # As fork() itself is called, with the interpreter's lock held. There is no other thread.
    pid = int(ctypes.PyDLL(None).syscall(_SYS_CLONE, clone_parent | signal.SIGCHLD, 0, 0, 0, 0))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    assert pid >= 0, "no process could be made"
    return pid


def _become(order: dict[str, Any]) -> None:
    """What a program that was just started finds."""
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    if order["inside"] is not None:
        _enter(order["inside"])
    words, before = order["words"], order["target"][1]
    sys.argv = words[before - 1 :]
    with open("/proc/self/comm", "w", encoding="utf-8") as comm:
        comm.write(os.path.basename(words[0])[:15])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _stream(number, getattr(sys, f"__{name}__")))


def _stream(number: int, before: io.TextIOWrapper) -> io.TextIOWrapper:
    """As the interpreter makes them when it starts; `before` is what it made for us."""
    unbuffered = before.write_through  # -u, PYTHONUNBUFFERED=
    buffering = 0 if unbuffered and number else -1
    return io.TextIOWrapper(
        open(number, "wb" if number else "rb", buffering, closefd=False),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
        write_through=unbuffered,
    )


def _enter(pid: int) -> None:
    """As `nsenter` does it: look at both, then enter the user namespace first."""
    from watcher.mounts import syscalls

    with open(f"/proc/{pid}/ns/user", "rb") as users, open(f"/proc/{pid}/ns/mnt", "rb") as mounts:
        syscalls.setns(users.fileno(), 0x10000000)
        syscalls.setns(mounts.fileno(), syscalls.CLONE_NEWNS)


if __name__ == "__main__":
    sys.exit(_main())
