# SPDX-License-Identifier: LGPL-2.1-or-later
"""The system calls of the new mount interface, and the few others that Python does not have.

All ctypes of the package is in this file. Each function has the call's own name and order of arguments, and raises
OSError with the path, or what else it works on, as the filename. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
import sys
from collections.abc import Callable

# Not from `typing`, which takes longer to import than this: managers/enter.py waits for it, and a check for that.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_BENEATH = 0x200

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_ATIME = 0x70
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

RESOLVE_NO_XDEV = 0x1
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20
RESOLVE_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
"""Below a descriptor: no link is followed, and nothing leads out."""

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSCONFIG_CMD_RECONFIGURE = 7
_FSPICK_CLOEXEC = 1
_FSPICK_EMPTY_PATH = 8

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NS_GET_USERNS = 0xB701

_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_ATTR_MOUNT_ROOT = 0x2000

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4

_ENCODING = sys.getfilesystemencoding()
_ERRORS = sys.getfilesystemencodeerrors()

_libc = ctypes.CDLL(None, use_errno=True)


def _from_libc(name: str, *argtypes: type) -> Any:
    """A function object of its own, with argument types: ctypes then passes each argument in its full width."""
    function = _libc[name]
    function.argtypes = argtypes
    return function


def _system_call(number: int, *argtypes: type) -> Callable[..., int]:
    """A system call that libc may have no wrapper for."""
    function = _from_libc("syscall", ctypes.c_long, *argtypes)
    function.restype = ctypes.c_long
    return functools.partial(function, number)


_int, _uint, _str, _pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_void_p

# The same numbers on every architecture: all calls since 5.1 share one table.
_open_tree = _system_call(428, _int, _str, _uint)
_move_mount = _system_call(429, _int, _str, _int, _str, _uint)
_fsopen = _system_call(430, _str, _uint)
_fsconfig = _system_call(431, _int, _uint, _str, _str, _int)
_fsmount = _system_call(432, _int, _uint, _uint)
_fspick = _system_call(433, _int, _str, _uint)
_openat2 = _system_call(437, _int, _str, _pointer, ctypes.c_size_t)
_mount_setattr = _system_call(442, _int, _str, _uint, _pointer, ctypes.c_size_t)

# struct mount_attr and struct open_how, in their first versions.
_mount_attr = struct.Struct("=QQQQ")
_open_how = struct.Struct("=QQQ")

# struct __user_cap_header_struct, and two of __user_cap_data_struct: effective, permitted, inheritable.
_cap_header = struct.Struct("=Ii")
_cap_data = struct.Struct("=6I")

_StatxBuffer = ctypes.c_char * 256

_prctl = _from_libc("prctl", _int, *[ctypes.c_ulong] * 4)
_capset = _from_libc("capset", _str, _str)
_libc_statx = _from_libc("statx", _int, _str, _int, _uint, _pointer)
_umount2 = _from_libc("umount2", _str, _int)
_setns = _from_libc("setns", _int, _int)
_mount = _from_libc("mount", _str, _str, _str, ctypes.c_ulong, _str)


def _check(result: int, what: str | int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(what))
    return result


def _bytes(path: str) -> bytes:
    # os.fsencode() is slower: it takes other types too.
    return path.encode(_ENCODING, _ERRORS)


def owner(namespace: int) -> tuple[int, int]:
    """Identity of the user namespace that owns a namespace (a descriptor), see ioctl_nsfs(2).

    Raises PermissionError: one that we are not in, nor above.
    """
    fd = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino
    finally:
        os.close(fd)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, nstype: int) -> None:
    _check(_setns(fd, nstype), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    kind = None if fstype is None else fstype.encode()
    options = None if data is None else data.encode()
    _check(_mount(_bytes(source), _bytes(target), kind, flags, options), target)


def umount2(target: str, flags: int) -> None:
    _check(_umount2(_bytes(target), flags), target)


def open_tree(dirfd: int, path: str, flags: int) -> int:
    return _check(_open_tree(dirfd, _bytes(path), flags | OPEN_TREE_CLOEXEC), path)


def move_mount(from_dirfd: int, from_path: str, to_dirfd: int, to_path: str, flags: int) -> None:
    _check(_move_mount(from_dirfd, _bytes(from_path), to_dirfd, _bytes(to_path), flags), to_path)


def fsopen(fstype: str) -> int:
    return _check(_fsopen(fstype.encode(), _FSOPEN_CLOEXEC), fstype)


def fsconfig_set_string(fd: int, key: str, value: str) -> None:
    _check(_fsconfig(fd, _FSCONFIG_SET_STRING, key.encode(), _bytes(value), 0), f"{key}={value}")


def fsconfig_set_flag(fd: int, key: str) -> None:
    _check(_fsconfig(fd, _FSCONFIG_SET_FLAG, key.encode(), None, 0), key)


def fsconfig_cmd_create(fd: int, what: str) -> None:
    """Make the superblock; the error has the messages of the file system in it."""
    try:
        _check(_fsconfig(fd, _FSCONFIG_CMD_CREATE, None, None, 0), what)
    except OSError as error:
        said = "; ".join(_fs_messages(fd))
        raise OSError(error.errno, f"{error.strerror} ({said})" if said else error.strerror, what) from None


def fsconfig_cmd_reconfigure(fd: int, what: str) -> None:
    _check(_fsconfig(fd, _FSCONFIG_CMD_RECONFIGURE, None, None, 0), what)


def _fs_messages(fd: int) -> list[str]:
    """What the kernel logged to a file system context: lines "e overlay: text", without the level."""
    messages = []
    while True:
        try:
            messages.append(os.read(fd, 4096).decode(errors="replace").rstrip("\n")[2:])
        except (
            OSError
        ):  # ENODATA, there are no more; another error matters less than the one that is reported
            return messages


def fsmount(fd: int, attributes: int) -> int:
    return _check(_fsmount(fd, _FSMOUNT_CLOEXEC, attributes), "fsmount")


def fspick(fd: int) -> int:
    """A context of the file system that an open root of a mount belongs to, for fsconfig_cmd_reconfigure()."""
    return _check(_fspick(fd, b"", _FSPICK_CLOEXEC | _FSPICK_EMPTY_PATH), "fspick")


def mount_setattr(
    dirfd: int, path: str, flags: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0
) -> None:
    packed = _mount_attr.pack(attr_set, attr_clr, propagation, 0)
    _check(_mount_setattr(dirfd, _bytes(path), flags, packed, _mount_attr.size), path)


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    packed = _open_how.pack(flags | os.O_CLOEXEC, 0, resolve)
    while True:
        try:
            return _check(_openat2(dirfd, _bytes(path), packed, _open_how.size), path)
        except BlockingIOError:
            continue  # while the kernel resolved a "..", something was renamed or mounted somewhere


def openat2_cached(dirfd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2) that only asks the kernel's cache of names, and never waits: a descriptor, or a negative errno.

    -EAGAIN: a name on the way is not in the cache; -ENOENT: it is, and there is nothing. Raises nothing: a caller asks
    for hundreds of names, most of which are not there.
    """
    packed = _open_how.pack(flags | os.O_CLOEXEC, 0, resolve | RESOLVE_CACHED)
    result = _openat2(dirfd, _bytes(path), packed, _open_how.size)
    return result if result >= 0 else -ctypes.get_errno()


def rename_noreplace(old: str, new: str) -> None:
    """Rename a file unless the new name is taken (renameat2(2), RENAME_NOREPLACE)."""
    _check(_libc.renameat2(AT_FDCWD, _bytes(old), AT_FDCWD, _bytes(new), _RENAME_NOREPLACE), new)


def rename_exchange(one: str, other: str, dirfd: int) -> None:
    """Have two names in a directory change places, in one step (renameat2(2), RENAME_EXCHANGE)."""
    _check(_libc.renameat2(dirfd, _bytes(one), dirfd, _bytes(other), _RENAME_EXCHANGE), other)


def mount_id(path: str, dirfd: int = AT_FDCWD) -> int:
    """ID, as in mountinfo, of the mount that is visible at `path` (statx(2), STATX_MNT_ID)."""
    return int(struct.unpack_from("=Q", _statx(path, dirfd), 0x90)[0])


def unique_mount_id(fd: int) -> int:
    """ID of an open file's mount; the kernel does not reuse it until the next boot (statx(2), STATX_MNT_ID_UNIQUE)."""
    return int(struct.unpack_from("=Q", _statx("", fd, _STATX_MNT_ID_UNIQUE), 0x90)[0])


def is_mount_root(path: str, dirfd: int = AT_FDCWD) -> bool:
    """Whether what is visible at `path` is the root of the mount that it is reached through (statx(2))."""
    return bool(struct.unpack_from("=Q", _statx(path, dirfd), 0x8)[0] & _STATX_ATTR_MOUNT_ROOT)


def _statx(path: str, dirfd: int, mask: int = _STATX_MNT_ID) -> ctypes.Array[ctypes.c_char]:
    found = _StatxBuffer()
    flags = AT_SYMLINK_NOFOLLOW | (0 if path else AT_EMPTY_PATH)
    _check(_libc_statx(dirfd, _bytes(path), flags, mask, found), path)
    return found


def prctl_not_dumpable() -> None:
    """Let only the host's root look into this process or trace it, until it executes a program (PR_SET_DUMPABLE)."""
    _check(_prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def prctl_child_subreaper() -> None:
    """Become the parent of every descendant whose own parent ends (PR_SET_CHILD_SUBREAPER)."""
    _check(_prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def prctl_keepcaps() -> None:
    """Keep the permitted capabilities when the user changes (PR_SET_KEEPCAPS)."""
    _check(_prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")


def prctl_capbset_drop(capability: int) -> None:
    """Remove a capability from the bounding set, if it is in it."""
    if _check(_prctl(_PR_CAPBSET_READ, capability, 0, 0, 0), "PR_CAPBSET_READ"):
        _check(_prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0), "PR_CAPBSET_DROP")


def prctl_cap_ambient_raise(capability: int) -> None:
    """Hand a permitted and inheritable capability on to programs (PR_CAP_AMBIENT_RAISE)."""
    _check(_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0), "PR_CAP_AMBIENT_RAISE")


def prctl_no_new_privs() -> None:
    """From now on no program gets more privileges than this process has (PR_SET_NO_NEW_PRIVS)."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """The capability sets of the calling thread, as masks."""
    sets = (effective, permitted, inheritable)
    low, high = (each & 0xFFFFFFFF for each in sets), (each >> 32 for each in sets)
    header = _cap_header.pack(_LINUX_CAPABILITY_VERSION_3, 0)
    _check(_capset(header, _cap_data.pack(*low, *high)), "capset")


def loop_backing(device: int) -> tuple[int, int]:
    """Device and inode of the file behind a loop device (a descriptor). Raises OSError: it has none (ENXIO)."""
    # struct loop_info64: lo_device and lo_inode come first.
    status = fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(232))
    device_number, inode = struct.unpack_from("=QQ", status)
    return device_number, inode


def loop_attach(backing: int, label: str, offset: int = 0, size: int = 0) -> tuple[int, str]:
    """A read-only loop device over an open file, or over a part of it.

    The kernel frees it with its last user (LO_FLAGS_AUTOCLEAR), also where that is killed.

    Finding a free device and taking it are two steps. If another process takes it in between (EBUSY), try the next.

    Args:
        backing: descriptor of the file, open for reading.
        label: shown by losetup(8), cut at 63 bytes.
        offset, size: of the part, bytes, multiples of 512; size 0: up to the end of the file.

    Returns:
        A descriptor of the device, and its path. While nothing is mounted from it, closing the descriptor frees it.

    Raises:
        OSError: there is no loop device.
    """
    # struct loop_config: fd, block_size, struct loop_info64 (of which lo_offset, lo_sizelimit, lo_flags and
    # lo_file_name), 64 reserved bytes.
    flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
    config = struct.pack("=II24xQQ12xI64s112x64x", backing, 0, offset, size, flags, _bytes(label)[:63])
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    attempts = 64
    try:
        while True:
            attempts -= 1
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = f"/dev/loop{number}"
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY or not attempts:
                    raise OSError(error.errno, error.strerror, path) from None
            else:
                return device, path
    finally:
        os.close(control)
