# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host: kernel, systemd, loop devices, inotify, clock, space, settings, and the daemon itself."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

from watcher.control.client import Client, NotRunning
from watcher.doctor.findings import Examination, Finding, error, ok, warning
from watcher.model import problem, shown
from watcher.records.schema import CallError
from watcher.settings import config, device_mapper
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new

_WATCHES_LEAST = 65536
_FREE_LEAST = 256 << 20
"""Bytes that should be free for copies: few images are larger."""
_FORMATS = {"squashfs": "squashfs", "erofs": "erofs"}
# Nothing of this program is older.
_EPOCH = 1_760_000_000
_UNIT = "confext-watcher.service"


def _kernel(settings: Settings) -> Iterator[Finding]:
    release = platform.release()
    if tuple(int(part) for part in re.findall(r"\d+", release)[:2]) < config.KERNEL_OLDEST:
        yield error(
            "kernel", f"Linux {release} is too old", "use Linux 6.8 or newer: overlayfs has lowerdir+ then"
        )
    else:
        yield ok("kernel", f"Linux {release}")
    if why := why_nothing_new():
        yield error(
            "kernel", f"services get nothing new: {why}", "take it from the kernel command line, and reboot"
        )
    known = _file_systems()
    if "overlay" not in known and not _has_module("overlay"):
        yield error("kernel", "has no overlayfs", "modprobe overlay, or a kernel with CONFIG_OVERLAY_FS")
    missing = [name for name in _FORMATS if name not in known and not _has_module(name)]
    if missing:
        names = " and ".join(missing)
        yield warning(
            "kernel", f"cannot mount {names}", f"drop no {names} images, or use a kernel that has it"
        )


def _file_systems() -> set[str]:
    with open("/proc/filesystems", encoding="ascii") as file:
        return {line.split()[-1] for line in file}


def _has_module(name: str) -> bool:
    return _run(["modprobe", "--dry-run", "--quiet", name]).returncode == 0


def _systemd(settings: Settings) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        yield ok("systemd", "does not run here: services are those that `confext-watcher exec` starts")
        return
    answer = _run(["systemctl", "show", "--property=Version", "--value"])
    version = re.match(r"\d+", answer.stdout)
    if version is None:
        why = shown(answer.stderr.strip()) or "no answer"
        yield error("systemd", f"cannot be asked: {why}", "systemctl status dbus.service")
    elif int(version[0]) < config.SYSTEMD_OLDEST:
        newer = f"use systemd {config.SYSTEMD_OLDEST} or newer"
        yield error("systemd", f"{shown(answer.stdout.strip())} is too old", newer)
    else:
        yield ok("systemd", shown(answer.stdout.strip()))


def _daemon(settings: Settings) -> Iterator[Finding]:
    starts = "systemctl enable --now confext-watcher" if _is_booted() else "confext-watcher run"
    try:
        with Client(settings.runtime_directory, timeout=10) as client:
            count = len(client.status())
    except NotRunning:
        yield error("daemon", "does not run: nothing that is dropped is used", starts)
    except CallError as failed:
        yield error("daemon", f"does not answer as it should: {failed}", f"systemctl restart {_UNIT}")
    else:
        yield ok("daemon", f"runs; {count} {'service takes' if count == 1 else 'services take'} part")
    if _is_booted() and settings.state_directory == Settings().state_directory:
        enabled = _run(["systemctl", "is-enabled", _UNIT]).stdout.strip()
        if enabled not in ("enabled", "enabled-runtime", "static", "linked", "alias"):
            yield warning(
                "daemon", f"is not started at boot: {_UNIT} is {shown(enabled) or 'not installed'}", starts
            )


def _is_booted() -> bool:
    return os.path.isdir("/run/systemd/system")


def _loop_devices(settings: Settings) -> Iterator[Finding]:
    if not os.path.exists("/dev/loop-control"):
        yield error(
            "loop devices",
            "there are none: images cannot be mounted",
            "modprobe loop; in a container, allow them",
        )
        return
    used = sum(name.startswith("loop") for name in os.listdir("/sys/block") if _is_in_use(name))
    if os.geteuid() == 0:
        try:
            os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
        except OSError as failed:
            yield error(
                "loop devices", problem(failed), "allow /dev/loop-control and block-loop to this container"
            )
            return
    yield ok("loop devices", f"{used} in use")


def _is_in_use(name: str) -> bool:
    return os.path.exists(f"/sys/block/{name}/loop/backing_file")


def _device_mapper(settings: Settings) -> Iterator[Finding]:
    if not device_mapper.is_there():
        yield ok("device mapper", "there is none: verity data is verified by reading the copy")
    elif shutil.which("veritysetup") is None:
        text = "veritysetup is missing, so mounts do not go through dm-verity"
        yield warning("device mapper", text, "apt install cryptsetup-bin")
    else:
        yield ok("device mapper", "is there, mounts of signed images go through dm-verity")


def _inotify(settings: Settings) -> Iterator[Finding]:
    watches = _number("/proc/sys/fs/inotify/max_user_watches")
    instances = _number("/proc/sys/fs/inotify/max_user_instances")
    if watches is not None and watches < _WATCHES_LEAST:
        yield warning(
            "inotify",
            f"{watches} watches: changes may be seen late where there are many directories",
            f"sysctl fs.inotify.max_user_watches={_WATCHES_LEAST * 8}",
        )
    else:
        yield ok("inotify", f"{watches} watches, {instances} instances")


def _leases(settings: Settings) -> Iterator[Finding]:
    if _number("/proc/sys/fs/leases-enable") == 0:
        yield warning(
            "leases",
            "are turned off: that an upload is over, only silence tells",
            "sysctl fs.leases-enable=1",
        )


def _clock(settings: Settings) -> Iterator[Finding]:
    now = time.time()
    if now < _EPOCH:
        day = time.strftime("%Y-%m-%d", time.gmtime(now))
        yield error("clock", f"says {day}: the history will be wrong", "timedatectl set-ntp yes")
        return
    if _is_booted() and shutil.which("timedatectl"):
        synchronized = _run(["timedatectl", "show", "--property=NTPSynchronized", "--value"]).stdout.strip()
        if synchronized == "no":
            yield warning("clock", "is not synchronized", "timedatectl set-ntp yes")
            return
    yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S %z"))


def _space(settings: Settings) -> Iterator[Finding]:
    path = settings.state_directory
    if not os.path.isdir(path):
        yield ok("space", f"{shown(path)} is not there yet")
        return
    status = os.statvfs(path)
    free, inodes = status.f_bavail * status.f_frsize, status.f_favail
    text = f"{free >> 20} MiB free in {shown(path)}, StoreMax= is {settings.store_max >> 20} MiB"
    if free < _FREE_LEAST:
        yield error("space", text, "make room: an image that cannot be copied does not get in")
    elif status.f_files and not inodes:
        yield error("space", f"no inode left in {shown(path)}", "remove files there")
    elif free < settings.store_max // 4:
        yield warning("space", text, "make room, or lower StoreMax= in watcher.conf")
    else:
        yield ok("space", text)


def _settings(settings: Settings) -> Iterator[Finding]:
    _, remarks = config.load()
    for remark in remarks:
        text = f"{shown(remark.path)}: {remark.text}"
        yield warning("settings", text, "mend that line, then systemctl reload confext-watcher")
    if not remarks:
        count = len(settings.written)
        yield ok("settings", f"{count} differ from the defaults" if count else "all are the defaults")


def _tools(settings: Settings) -> Iterator[Finding]:
    if shutil.which("openssl") is None:
        yield warning("tools", "openssl is missing: no signature can be verified", "apt install openssl")


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A command that asks, for ten seconds at most; one that is not there has failed."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as failed:
        return subprocess.CompletedProcess([*words], 127, "", str(failed))


EXAMINATIONS: Sequence[tuple[str, Examination]] = (
    ("kernel", _kernel),
    ("systemd", _systemd),
    ("daemon", _daemon),
    ("settings", _settings),
    ("loop devices", _loop_devices),
    ("device mapper", _device_mapper),
    ("inotify", _inotify),
    ("leases", _leases),
    ("clock", _clock),
    ("space", _space),
    ("tools", _tools),
)
