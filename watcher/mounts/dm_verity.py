# SPDX-License-Identifier: LGPL-2.1-or-later
"""dm-verity: a block device of which the kernel verifies each block when it reads it.

veritysetup(8) sets it up, as systemd does by the same library: what is in a verity superblock, how a signature gets to
the kernel and when udev is done with a device is that library's to know. For the signature there is the kernel's own
keyring, whose keys come with the kernel or from the firmware.

A device is removed when it is mounted (deferred: dmsetup(8)), and so the kernel frees it with its last user, as it does
a loop device. A service may be the last, long after us. Only if the watcher is killed between the two steps it stays:
its name says who has made it, and the next start of a watcher removes it. PIDs count in one PID namespace only, and
names of devices on the whole machine: what a watcher in a container makes is for one in that container to remove.

A veritysetup that is killed while it waits for udev leaves the semaphore by which udev would have answered, "cookie" in
dmsetup(8). Nothing says whose a cookie is, so it stays: one at most for a start of the watcher, which then makes no
more devices. `dmsetup udevcomplete_all 10` removes those that are older than ten minutes, of all programs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from watcher.model import shown
from watcher.mounts.process import Gone, namespace_id, start_time
from watcher.records import journal
from watcher.settings import device_mapper
from watcher.settings.signals import reason_of

PREFIX = "confext-watcher-"
DEVICES = "/dev/mapper"
BLOCK = "/sys/class/block"
_DIGITS = 16
_TIMEOUT_SEC = 10
"""It takes 30 ms, most of it udev's. A worker that waits longer counts as hanging (workers.py)."""
# "device-mapper: reload ioctl on NAME (253:3) failed: ...": what is the same for all is said once.
_WHICH = re.compile(r"ioctl on \S+ \([0-9:]+\)")
_PACKAGE = "cryptsetup-bin"


class Unavailable(Exception):
    """The device cannot be had: `str()` says why, for a line that says what is done instead.

    Attributes:
        refused: the kernel will not have it so, which may be for the signature: it does not know the key.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class Verified(NamedTuple):
    """What is to be verified.

    Attributes:
        data, tree: paths of block devices: the file system, and its verity superblock with the hash tree.
        signature: for the kernel's keyring, PKCS#7 (DER); None: without.
        digest: names the device.
    """

    data: str
    tree: str
    root_hash: bytes
    signature: bytes | None
    digest: str


class Devices:
    """Makes them. Threads may share it."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._owner = f"{_pid_namespace()}-{os.getpid()}-{start_time(os.getpid())}"
        self._hung = ""

    @contextlib.contextmanager
    def opened(self, verified: Verified) -> Iterator[str]:
        """The path of a device. After the block the kernel frees it as soon as no file system on it is mounted.

        Raises Unavailable: before the block.
        """
        if not device_mapper.is_there():
            raise Unavailable("there is no device mapper here")
        if self._hung:
            raise Unavailable(self._hung)
        name = f"{PREFIX}{verified.digest[:_DIGITS]}-{self._owner}-{next(self._numbers)}"
        try:
            self._open(name, verified)
            yield f"{DEVICES}/{name}"
        finally:
            self._remove(name)

    def _open(self, name: str, verified: Verified) -> None:
        words = ["veritysetup", "open", verified.data, name, verified.tree, verified.root_hash.hex()]
        with contextlib.ExitStack() as stack:
            fds = []
            if verified.signature is not None:
                fds.append(os.memfd_create("signature", os.MFD_CLOEXEC))
                stack.callback(os.close, fds[0])
                with open(fds[0], "wb", closefd=False) as file:
                    file.write(verified.signature)
                words.append(f"--root-hash-signature=/proc/self/fd/{fds[0]}")
            try:
                done = _run(words, fds)
            except Unavailable as error:
                # Something on this machine does not answer. One more that waits for it would help nobody.
                self._hung = f"{error}; not tried again before the watcher's next start"
                raise
        if done.returncode:
            said = done.stderr.strip().splitlines() or [reason_of(done.returncode)]
            raise Unavailable(f"veritysetup: {shown(_WHICH.sub('ioctl', said[0]))}", refused=True)

    def _remove(self, name: str) -> None:
        """Also of what could not be opened: it may be there in part, where veritysetup was killed."""
        why = _removed(name) if self._hung or os.path.lexists(f"{DEVICES}/{name}") else ""
        if why and not self._hung:
            journal.log.warning(f"the device {name} could not be removed, try dmsetup remove: {why}")


def remove_leftovers() -> None:
    """Remove the devices of watchers that were killed while they set them up. What is mounted of one stays mounted."""
    if not device_mapper.is_there() or not any(True for _ in _kernel_has()):
        return
    try:
        listed = _run(["dmsetup", "info"]).stdout
    except Unavailable as error:
        journal.log.warning(f"devices that a killed watcher has left are not looked for: {error}")
        return
    for block in listed.split("\n\n"):
        words = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        name = words.get("Name", "").strip()
        if not name.startswith(PREFIX) or "DEFERRED REMOVE" in words.get("State", "") or not _is_left(name):
            continue
        why = _removed(name)
        said = f"could not be removed: {why}" if why else "is removed"
        journal.log.info(f"the device {name}, which a killed watcher has left, {said}")


def _kernel_has() -> Iterator[str]:
    """The names of our devices, without a program that has to be there for it."""
    with contextlib.suppress(OSError):
        for device in os.listdir(BLOCK):
            with contextlib.suppress(OSError), open(f"{BLOCK}/{device}/dm/name") as file:
                name = file.read().strip()
                if name.startswith(PREFIX):
                    yield name


def _is_left(name: str) -> bool:
    """Whether the process that has made a device is known to be gone: else it goes on, and will remove it itself."""
    try:
        namespace, pid, started = map(int, name.split("-")[-4:-1])
    except ValueError:
        return False
    if namespace != _pid_namespace():
        return False
    try:
        return start_time(pid) != started
    except Gone:
        return True


def _pid_namespace() -> int:
    """Its inode number (namespaces(7)). That of the host is the same on all machines, at each boot."""
    return namespace_id("/proc/self/ns/pid")[1]


def _removed(name: str) -> str:
    """Remove a device when it is not in use any more. Why that fails, "" if it does not."""
    try:
        done = _run(["dmsetup", "remove", "--deferred", name])
    except Unavailable as error:
        return str(error)
    return shown(done.stderr.strip() or reason_of(done.returncode)) if done.returncode else ""


def _run(words: list[str], fds: list[int] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of the device mapper's. Raises Unavailable: it is not installed, or does not answer."""
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_TIMEOUT_SEC,
            pass_fds=fds or (),
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise Unavailable(f"the program {words[0]} is not installed (package {_PACKAGE})") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"{words[0]} has not answered in {_TIMEOUT_SEC} s: it may wait for udev, see systemctl status systemd-udevd"
        ) from None
    except (OSError, MemoryError) as error:
        raise Unavailable(f"{words[0]} cannot be run: {error}") from error
