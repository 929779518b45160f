# SPDX-License-Identifier: LGPL-2.1-or-later
"""Becoming like a service's process: its root directory, user, groups and capabilities.

Standard library only: it is done by a program that does nothing else (`enter.py`).
"""

from __future__ import annotations

import errno
import os

from watcher.mounts import syscalls

TYPE_CHECKING = False  # typing's own costs more than all that is done here
if TYPE_CHECKING:
    from watcher.managers.exec_context import ExecContext

with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as _file:
    _LAST_CAPABILITY = int(_file.read())


def become(who: ExecContext, *, other: bool) -> None:
    """In the service's namespaces, about to execute a command. The groups are set by then.

    Args:
        other: whether user and group are to be changed at all.

    Raises:
        OSError: it must not execute anything then.
    """
    _enter_root(who)
    for capability in range(_LAST_CAPABILITY + 1):
        if not who.bounding >> capability & 1:
            syscalls.prctl_capbset_drop(capability)
    if other:
        syscalls.prctl_keepcaps()
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


def _enter_root(who: ExecContext) -> None:
    """Enter the root directory of the process. The owner of a directory above it may have exchanged it since.

    A descriptor of it would not do: in a shadow of the mount namespace it leads to the original.
    """
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if who.root != "/":
        fd = syscalls.openat2(fd, who.root.lstrip("/"), os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_INSIDE)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != tuple(who.root_id):
        raise OSError(errno.ESTALE, "its root directory is not where it was")
    os.fchdir(fd)
    if who.root != "/":
        os.chroot(".")
