# SPDX-License-Identifier: LGPL-2.1-or-later
"""Becoming like a service's process: its control group, root directory, user, groups and capabilities.

Standard library only: it is done between fork and exec, or by a program that does nothing else (`enter.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from watcher.mounts import syscalls

with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as _file:
    _LAST_CAPABILITY = int(_file.read())

_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Like:
    """Whose user, groups, environment, root directory, capabilities and limits a command gets.

    Attributes:
        user, group, groups: numbers; the file system's and the real ones are set alike.
        environment: of the process when it was started, and what is added to it.
        bounding: capabilities that a program may get at most, a mask.
        ambient: capabilities that it gets although its user is not root, a mask.
        no_new_privs: as of the process.
        root: its root directory, a path in its mount namespace.
        cgroup: path of `cgroup.procs` of its control group, "" if that is also ours.
    """

    user: int
    group: int
    groups: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    bounding: int = _ALL
    ambient: int = 0
    no_new_privs: bool = False
    root: str = "/"
    cgroup: str = ""


def become(who: Like, group: int, *, other: bool, grouped: bool = False) -> None:
    """In a child that is about to execute a command: system calls only.

    Args:
        group: descriptor of the control group's `cgroup.procs`, -1 to stay.
        other: whether user and groups are to be changed at all.
        grouped: it has the supplementary groups already.

    Raises:
        OSError: it must not execute anything then.
    """
    if group >= 0:
        os.write(group, b"0")
    if who.root != "/":
        os.chroot(who.root)
        os.chdir("/")
    for capability in range(_LAST_CAPABILITY + 1):
        if not who.bounding >> capability & 1:
            syscalls.prctl_capbset_drop(capability)
    if other:
        # All three, or a command of an unprivileged service would keep root's groups.
        syscalls.prctl_keepcaps()
        if not grouped:
            os.setgroups(who.groups)
        os.setresgid(who.group, who.group, who.group)
        os.setresuid(who.user, who.user, who.user)
    if other or who.user != 0:
        # Programs of root get what is in the bounding set, those of others what is ambient.
        syscalls.capset(who.ambient, who.ambient, who.ambient)
        for capability in range(_LAST_CAPABILITY + 1):
            if who.ambient >> capability & 1:
                syscalls.prctl_cap_ambient_raise(capability)
    if who.no_new_privs:
        syscalls.prctl_no_new_privs()
