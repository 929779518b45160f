# SPDX-License-Identifier: LGPL-2.1-or-later
"""Control groups (cgroups(7)), read from the kernel: which processes are a unit's (a swap has no time to ask over the
bus), and where a command can be kept together."""

from __future__ import annotations

import os
from collections.abc import Iterator

from watcher.mounts.mountinfo import mounts

_DELEGATED = ("trusted.delegate", "user.delegate")

# Where the hierarchy is, by the directory for processes; it stays there. Our mount table, with all images, is long.
_hierarchies: dict[str, str] = {}


def processes(pid: int, unit: str, root: str = "/proc") -> list[int]:
    """PIDs in the control group of the unit whose main process is `pid`, without those in delegated subtrees.

    A delegated subtree (`Delegate=`, systemd.resource-control(5)) belongs to the service's own containers. If the
    unit's group itself is delegated, only the processes directly in it count.
    """
    group = unit_group(_read(f"{root}/{pid}/cgroup"), unit)
    mount = _hierarchies.get(root) or mount_point(_read(f"{root}/self/mountinfo"))
    _hierarchies[root] = mount
    if not group or not mount:
        return [pid]
    found = [pid]
    for directory in _groups(f"{mount}{group}"):
        found += [int(line) for line in _read(f"{directory}/cgroup.procs").split()]
    return [process for process in dict.fromkeys(found) if process > 0]


def unit_group(text: str, unit: str) -> str:
    """Path of the unit's control group, by `/proc/PID/cgroup` of its main process; "" if the unit has none of its own.

    systemd's own hierarchy is "0::" or, on hosts with the first version of control groups, "name=systemd".
    """
    rows = (line.split(":", 2) for line in text.split("\n") if line.count(":") >= 2)
    groups = {controllers: path for _, controllers, path in rows}
    parts = (groups.get("") or groups.get("name=systemd") or "").split("/")
    # systemd puts a "_" before a name that clashes with a file of the kernel's: cg_escape().
    for name in (unit, f"_{unit}"):
        if name in parts:
            return "/".join(parts[: parts.index(name) + 1])
    return ""


def mount_point(text: str) -> str:
    """Where the hierarchy that systemd uses is mounted, by `/proc/self/mountinfo`; "" if nowhere.

    Only a mount of the whole hierarchy counts: a unit's sandbox binds single files of it onto themselves.
    """
    found: dict[str, str] = {}
    for mount in mounts(line for line in text.split("\n") if " - cgroup" in line):
        named = "name=systemd" in mount.super_options.split(",")
        if mount.root == "/" and (mount.fstype == "cgroup2" or (mount.fstype == "cgroup" and named)):
            found.setdefault(mount.fstype, mount.point)
    return found.get("cgroup2") or found.get("cgroup", "")


def directory(text: str) -> str:
    """Directory of a process's control group in the unified hierarchy, by its `/proc/PID/cgroup`.

    Returns:
        "" where there is none, or it lies outside of our cgroup namespace.
    """
    rows = (line.removeprefix("0::") for line in text.split("\n") if line.startswith("0::"))
    group, mount = next(rows, ""), mount_point(_read("/proc/self/mountinfo"))
    return f"{mount}{group}" if mount and group and not group.startswith("/..") else ""


def own_directory() -> str:
    """`directory()` of this process."""
    return directory(_read("/proc/self/cgroup"))


def _groups(directory: str) -> Iterator[str]:
    yield directory
    if _is_delegated(directory):
        return
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for name in names:
        if not _is_delegated(f"{directory}/{name}"):
            yield from _groups(f"{directory}/{name}")


def _is_delegated(directory: str) -> bool:
    for attribute in _DELEGATED:
        try:
            if os.getxattr(directory, attribute) == b"1":
                return True
        except OSError:
            continue  # not set, not supported, not ours to see: not delegated
    return False


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return file.read()
    except OSError:
        return ""  # the process has ended, which the caller notices by its pidfd
