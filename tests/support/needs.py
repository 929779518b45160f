# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs of the machine: `@root`, `@tool("mksquashfs")`, `pytestmark = [root, userns]`.

Each is a mark that `conftest.py` looks at before the test's fixtures are made: where the machine lacks it, the test is
skipped with the reason, and the summary counts the skipped tests by reason.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CAP_SYS_ADMIN = 21
SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def which(program: str) -> str | None:
    """Path of a program, also from the sbin directories that an ordinary user's PATH leaves out."""
    return shutil.which(program, path=SBIN)


@functools.cache
def _no_root() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    status = Path("/proc/self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*(\w+)$", status, re.MULTILINE)[0], 16)
    return None if effective >> CAP_SYS_ADMIN & 1 else "needs root that may mount (CAP_SYS_ADMIN)"


@functools.cache
def _no_tool(program: str) -> str | None:
    return None if which(program) else f"needs {program}"


@functools.cache
def _no_userns() -> str | None:
    unshare = which("unshare")
    if unshare is None:
        return "needs unshare"
    tried = subprocess.run(
        [unshare, "--user", "--map-root-user", "--mount", "true"],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    return None if tried.returncode == 0 else "needs user namespaces, which are forbidden here"


@functools.cache
def _no_loop() -> str | None:
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"needs loop devices (/dev/loop-control: {error.strerror})"
    return None


@functools.cache
def _no_filesystem(name: str) -> str | None:
    known = Path("/proc/filesystems")
    if name not in known.read_text().split():
        modprobe = which("modprobe")
        if modprobe and os.geteuid() == 0:
            subprocess.run([modprobe, "--quiet", name], check=False, stdin=subprocess.DEVNULL)
    return None if name in known.read_text().split() else f"needs a kernel with {name}"


@functools.cache
def _no_kernel(version: str) -> str | None:
    def numbers(release: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", release)[:2]))

    running = os.uname().release
    return None if numbers(running) >= numbers(version) else f"needs Linux {version} or newer"


@functools.cache
def _no_cgroup2() -> str | None:
    mounted = re.search(r" - cgroup2 ", Path("/proc/self/mountinfo").read_text())
    return None if mounted else "needs a mounted cgroup2 hierarchy"


@functools.cache
def _no_bed() -> str | None:
    reasons = (
        _no_root(),
        _no_cgroup2(),
        _no_loop(),
        *map(_no_tool, ("unshare", "nsenter", "setpriv", "ip", "mmdebstrap")),
    )
    lack = next((reason for reason in reasons if reason), None)
    return f"real systemd in a container: {lack}" if lack else None


@functools.cache
def _no_vm() -> str | None:
    # Elsewhere qemu would do too, but Debian's own programs would be foreign where its disk is built.
    machine = os.uname().machine
    reasons = (
        _no_root(),
        None if machine == "x86_64" else f"needs x86_64, not {machine}",
        *map(
            _no_tool,
            ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "ssh", "ssh-keygen", "setpriv", "unshare"),
        ),
    )
    lack = next((reason for reason in reasons if reason), None)
    return f"a virtual machine: {lack}" if lack else None


_LACKING: dict[str, Callable[..., str | None]] = {
    "root": _no_root,
    "tool": _no_tool,
    "userns": _no_userns,
    "loop": _no_loop,
    "filesystem": _no_filesystem,
    "kernel": _no_kernel,
    "cgroup2": _no_cgroup2,
    "bed": _no_bed,
    "vm": _no_vm,
}


def lacking(mark: pytest.Mark) -> str | None:
    """Why the machine does not fulfil a `needs` mark; None if it does."""
    what, *arguments = mark.args
    return _LACKING[what](*arguments)


root = pytest.mark.needs("root")
"""Root that may mount. Such modules are also checked for leaks (conftest.py)."""

userns = pytest.mark.needs("userns")
"""An unprivileged user namespace can be made."""

loop = pytest.mark.needs("loop")
"""Loop devices can be had."""

cgroup2 = pytest.mark.needs("cgroup2")
"""A cgroup2 hierarchy is mounted somewhere."""

bed = pytest.mark.needs("bed")
"""Containers with real systemd can be made; the fixtures of `beds/conftest.py` ask for it by themselves."""

vm = pytest.mark.needs("vm")
"""A virtual machine can be emulated."""


def tool(program: str) -> pytest.MarkDecorator:
    """A program, by its name."""
    return pytest.mark.needs("tool", program)


def filesystem(name: str) -> pytest.MarkDecorator:
    """A file system of the kernel, "erofs"; its module is loaded if need be."""
    return pytest.mark.needs("filesystem", name)


def kernel(version: str) -> pytest.MarkDecorator:
    """A kernel at least this new, "6.12"."""
    return pytest.mark.needs("kernel", version)
