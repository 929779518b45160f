# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bed: a container of namespaces in which a real systemd is PID 1.

    with Bed("262") as bed:
        bed.run(["systemctl", "start", "nginx"])

Nothing of the host's systemd is needed or used (there may be none). The container has a copy of a cached root file
system, not an overlay of it: overlayfs stacks to a depth of two, and the stacks under test would be the third. The
copy (200 MB) is in a tmpfs: ext4 takes seconds to make as many files where it has just deleted as many. The container
has a cgroup of its own in whichever cgroup2 hierarchy the host has, and a network with nothing but loopback.

All of its processes live in one PID namespace and die with its systemd, which dies with the process that booted it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from beds import payload, roots
from beds.systemd import ENVIRONMENT, Systemd

BOOT_SECONDS = 150
_CREDENTIALS = struct.Struct("3i")


class BootFailed(Exception):
    """systemd did not come up: `str()` ends with what the console says."""


class LeftBehind(Exception):
    """The container is gone, something of it was not: `str()` names it."""


class Bed(Systemd):
    """A container with real systemd.

    Attributes:
        version: "262", "257" or "254": systemd's, a key of `roots.SUITES`.
        name: host name, unique on this machine.
        root: its root directory on the host; use `path()` while it runs.
        pid: PID of its systemd as the host sees it, 0 when not booted.
    """

    def __init__(
        self, version: str, *, project: bool = True, arguments: Sequence[str] = (), services: bool = False
    ) -> None:
        """Prepare a bed; nothing happens before `boot()` or `with`.

        Args:
            project: also put the checkout's program into it (`payload.install`).
            arguments: of its systemd: in a container they are the kernel command line.
            services: with all of `roots.SERVICES`.
        """
        self.version = version
        self.name = f"bed{version}-{uuid.uuid4().hex[:6]}"
        self.pid = 0
        self._project = project
        self._arguments = arguments
        self._services = services
        self._run = roots.cache_directory() / "run" / self.name
        self._cgroup = cgroup2() / f"confext-{self.name}"
        self.root = self._run / "root"
        self._lock: IO[str] | None = None
        self._unshare: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def boot(self) -> None:
        """Build the root if need be, copy it, start systemd and wait until it has started everything.

        Raises:
            roots.BuildFailed, BootFailed
            RuntimeError: not in the main thread (the container dies with the thread that booted it).
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a bed must be booted in the main thread")
        build = roots.build_services if self._services else roots.build
        cached = build(roots.SUITES[self.version])
        sweep()
        try:
            self._copy(cached)
            self._start()
        except BaseException:
            self.stop()
            raise

    def _copy(self, cached: Path) -> None:
        self._run.mkdir(parents=True)
        self._lock = (self._run / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.root.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", self.name, str(self.root)], check=True)
        subprocess.run(["cp", "--archive", f"{cached}/.", str(self.root)], check=True)
        # One of its own, and so not the first boot of an image that is yet to be set up.
        (self.root / "etc/machine-id").write_text(uuid.uuid4().hex + "\n")
        (self.root / "etc/hostname").write_text(self.name + "\n")
        if self._project:
            payload.install(self.root, vendored=self.version == "254")

    def _start(self) -> None:
        self._cgroup.mkdir()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as boot,
            (self._run / "console").open("wb") as console,
        ):
            boot.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            _bind(boot, self.root / ".boot")
            self._unshare = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "--"),
                    *("sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(self._cgroup)),
                    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"),
                    *("--uts", "--ipc", "--net", "--cgroup"),
                    *(str(Path(__file__).with_name("inside")), str(self.root), self.name, *self._arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
            self.pid = self._booted(boot, self._unshare)
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        if state not in ("running", "degraded"):
            raise BootFailed(f"{self.name}: systemd is {state or 'not there'}\n{self.console()}")

    def _booted(self, boot: socket.socket, unshare: subprocess.Popen[bytes]) -> int:
        """Wait for the READY=1 that systemd sends to its container's manager; the kernel adds the sender's PID."""
        deadline = time.monotonic() + BOOT_SECONDS
        ended = os.pidfd_open(unshare.pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([boot.fileno(), ended], [], [], left)
                if boot.fileno() in ready:
                    message, ancillary, _, _ = boot.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
                    if b"READY=1" in message.splitlines():
                        return int(_CREDENTIALS.unpack(ancillary[0][2][: _CREDENTIALS.size])[0])
                elif ended in ready:
                    raise BootFailed(f"{self.name}: ended while booting\n{self.console()}")
        finally:
            os.close(ended)
        raise BootFailed(f"{self.name}: not up after {BOOT_SECONDS} s\n{self.console()}")

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line on the host that runs `argv` in the container, with nothing but `env` added to it."""
        variables = [f"{key}={value}" for key, value in {**ENVIRONMENT, **(env or {})}.items()]
        enter = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--net",
            "--cgroup",
        ]
        return [*enter, "--root", "--wd", "--", "/usr/bin/env", "--ignore-environment", *variables, *argv]

    def path(self, inside: str) -> Path:
        """Path on the host of a file in the container, its mounts (/run, /tmp) included.

        An absolute symlink on the way would lead out of the container: do not go through one.
        """
        base = Path(f"/proc/{self.pid}/root") if self.pid else self.root
        return base / inside.lstrip("/")

    def console(self, lines: int = 30) -> str:
        """The last lines of what systemd and the shell before it printed."""
        try:
            said = (self._run / "console").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(said.splitlines()[-lines:])

    def connect(self, other: Bed, subnet: int = 1) -> tuple[str, str]:
        """A network cable between two beds: addresses (ours, the other's) in 10.99.SUBNET.0/24."""
        near, far = f"to-{other.name}"[:15], f"to-{self.name}"[:15]
        cable = ["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", str(other.pid)]
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", *cable], check=True)
        addresses = f"10.99.{subnet}.1", f"10.99.{subnet}.2"
        for bed, link, address in zip((self, other), (near, far), addresses, strict=True):
            bed.run(["ip", "address", "add", f"{address}/24", "dev", link])
            bed.run(["ip", "link", "set", link, "up"])
        return addresses

    def reboot(self) -> None:
        """As after a power cut: nothing is stopped, then systemd starts on the same root directory.

        Raises:
            BootFailed
        """
        self._end()
        _detach_loops(self.root)
        (self.root / ".boot").unlink(missing_ok=True)
        self._start()

    def _end(self) -> None:
        """End all of its processes."""
        if self._unshare is not None:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(
                        self.pid, signal.SIGKILL
                    )  # cannot be another's: unshare has not reaped it before it ends
            else:
                self._unshare.kill()
            self._unshare.wait()
            self._unshare, self.pid = None, 0
        _remove_cgroup(self._cgroup)

    def stop(self) -> None:
        """End it and take everything away: processes, cgroup, root directory. May be called twice.

        Raises:
            LeftBehind: a loop device or a mount outlived it (loop devices are detached all the same).
        """
        self._end()
        left = _detach_loops(self.root)
        _remove_tree(self._run)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if left:
            raise LeftBehind(f"{self.name} left behind: {', '.join(left)}")


def cgroup2() -> Path:
    """Where the host has a cgroup2 hierarchy: /sys/fs/cgroup, or unified/ below it beside the old ones.

    Raises:
        FileNotFoundError: nowhere.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise FileNotFoundError("no cgroup2 hierarchy is mounted")


def sweep() -> None:
    """Remove what beds left whose owner was killed: nobody holds their lock any more."""
    for lock_file in (roots.cache_directory() / "run").glob("*/lock"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), lock_file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_cgroup(cgroup2() / f"confext-{lock_file.parent.name}")
            _detach_loops(lock_file.parent / "root")
            _remove_tree(lock_file.parent)


def _bind(listener: socket.socket, path: Path) -> None:
    """Bind by a short path: that of a UNIX socket holds 108 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def _remove_cgroup(cgroup: Path) -> None:
    if not cgroup.exists():
        return
    (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 10
    while "populated 1" in (cgroup / "cgroup.events").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    for directory, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(directory)


def _detach_loops(root: Path) -> list[str]:
    """Detach the loop devices over files below `root`, and name them. Those that go by themselves get a moment."""
    deadline = time.monotonic() + 5
    found = loops_over(root)
    while any(passing for _, passing in found) and time.monotonic() < deadline:
        time.sleep(0.02)  # nothing announces it
        found = loops_over(root)
    for device, _ in found:
        subprocess.run(["losetup", "--detach", device], check=True)
    return [device for device, _ in found]


def loops_over(root: Path) -> list[tuple[str, bool]]:
    """Loop devices over files below `root`, and whether each goes by itself (LO_FLAGS_AUTOCLEAR)."""
    columns = "--output=NAME,AUTOCLEAR,BACK-MAJ:MIN,BACK-INO,BACK-FILE"
    listed = subprocess.run(
        ["losetup", "--list", "--json", columns], capture_output=True, text=True, check=True
    )
    found = []
    rows = json.loads(listed.stdout)["loopdevices"] if listed.stdout else ()
    for row in rows:
        if not row["back-file"] or not row["back-maj:min"]:
            continue  # it is being detached
        # The kernel tells the path as the container knew it.
        with contextlib.suppress(OSError):
            there = (root / row["back-file"].lstrip("/")).lstat()
            file = f"{os.major(there.st_dev)}:{os.minor(there.st_dev)}", there.st_ino
            if file == (row["back-maj:min"].strip(), row["back-ino"]):
                found.append((row["name"], row["autoclear"]))
    return found


def _remove_tree(run: Path) -> None:
    if not run.exists():
        return
    if os.path.ismount(run / "root"):
        subprocess.run(["umount", str(run / "root")], check=True)
    # Its mounts were in a namespace that is gone; had one got out, what it shows must not be deleted.
    if f" {run}/" in Path("/proc/self/mountinfo").read_text():
        raise LeftBehind(f"something is mounted below {run}")
    shutil.rmtree(run)
