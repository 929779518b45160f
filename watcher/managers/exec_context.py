# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a command gets from a service: read off the service's main process, written down for `enter.py`.

A command may do what the main process may do at this moment, as the kernel tells it of one execution. Two things do not
count: rights in a user namespace that the service has made itself are none on the host, and those of a set-user-ID
program that it has executed (`su`, asking for a password) are lent. Of one that is root in part (squid: its real user
is another) a command gets the real user and group alone.

`enter.py` does not import this module: importing dataclasses takes longer than all that it does.
"""

from __future__ import annotations

import marshal
import os
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from watcher.managers import cgroup
from watcher.model import Later
from watcher.mounts.process import Gone, Process, namespace_id

_ALL = (1 << 64) - 1

# How often a process that executes another program is looked at again, and after how many seconds.
_TRIES, _EXECUTING_SEC = 20, 0.005

# Keys of the auxiliary vector (getauxval(3)): what a process had when it executed its program.
_AT_PAGESZ, _AT_UID, _AT_EUID, _AT_GID, _AT_EGID, _AT_SECURE = 6, 11, 12, 13, 14, 23


@dataclass(frozen=True, slots=True)
class ExecContext:
    """What a command gets from a service, as in systemd.exec(5).

    Attributes:
        user, group, groups: numbers, in the watcher's user namespace.
        environment: of the command.
        bounding: capabilities that a program may get at most, a mask.
        ambient: capabilities that it gets although its user is not root, a mask.
        no_new_privs: `NoNewPrivileges=`.
        root: path of its root directory in its mount namespace.
        root_id: device and inode of that directory.
        cgroup: directory of the service's control group; "": it is the watcher's too, or cannot be seen from here.
    """

    user: int
    group: int
    groups: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    bounding: int = _ALL
    ambient: int = 0
    no_new_privs: bool = False
    root: str = "/"
    root_id: tuple[int, int] = (0, 0)
    cgroup: str = ""


@dataclass(frozen=True, slots=True)
class ExecOrder:
    """What to run, and where.

    Attributes:
        namespaces: their paths, by kind.
        context: what the command gets from its service.
        words: the command.
        contained: `enter.py` kills what the command leaves running (else systemd does).
        group: directory of a control group below which the command gets one of its own; "": it gets none.
        private_pids: without a control group of its own it gets a PID namespace.
    """

    namespaces: dict[str, str]
    context: ExecContext
    words: Sequence[str]
    contained: bool = False
    group: str = ""
    private_pids: bool = False

    def dump(self) -> bytes:
        """What `enter.py` reads, with the same interpreter."""
        return marshal.dumps(asdict(self))


def context_of(main: Process, environment: Mapping[str, str] | None = None) -> ExecContext:
    """What a service's main process has and is limited to. Blocks.

    Args:
        environment: what the service was started with; None: what its main process says now, which may be anything.

    Raises:
        Gone: it has ended.
        Later: its rights are not its own.
    """
    vector, status, environ = _of_one_execution(main, with_environment=environment is None)
    fields = dict(line.partition(":")[::2] for line in status.split("\n"))
    # Uid: and Gid: list real, effective, saved and file system's.
    users, groups = (tuple(map(int, fields[key].split())) for key in ("Uid", "Gid"))
    in_part = _is_in_part(main, vector, users, groups)
    user, group = (users[0], groups[0]) if in_part else (users[1], groups[1])
    if environment is None:
        pairs = (pair.partition("=") for pair in environ.split("\0"))
        environment = {name: value for name, _, value in pairs if name}
    bounding = int(fields["CapBnd"], 16)
    root, root_id = _root(main)
    return ExecContext(
        user,
        group,
        () if in_part else tuple(int(group) for group in fields["Groups"].split()),
        {**environment, "MAINPID": str(main.pid)},
        # A program that root executes gets the whole bounding set: also what this root process has dropped.
        bounding=bounding & int(fields["CapPrm"], 16) if user == 0 else bounding,
        ambient=0 if in_part else int(fields["CapAmb"], 16),
        no_new_privs=fields["NoNewPrivs"].strip() == "1",
        root=root,
        root_id=root_id,
        cgroup=_cgroup(main),
    )


def _of_one_execution(main: Process, *, with_environment: bool) -> tuple[dict[int, int], str, str]:
    """The auxiliary vector, the status and the environment of a process, with no execve(2) between them.

    Its user may write a false vector into his own program (PR_SET_MM_MAP), and execute a set-user-ID one next.
    """
    for _ in range(_TRIES):
        vector = _auxiliary_vector(main)
        status, environ = main.read("status"), main.read("environ") if with_environment else ""
        if vector and vector == _auxiliary_vector(main):
            return vector, status, environ
        time.sleep(_EXECUTING_SEC)
    raise Later("could not be run: it is not known as whom its main process was executed")


def _auxiliary_vector(main: Process) -> dict[int, int]:
    """{} while the process executes another program."""
    content = main.read_bytes("auxv")
    for pair in (struct.Struct("=QQ"), struct.Struct("=II")):  # of a 64-bit program, of a 32-bit one
        found = dict(pair.iter_unpack(content[: len(content) // pair.size * pair.size]))
        if found.get(_AT_PAGESZ) == os.sysconf("SC_PAGESIZE"):
            return found
    return {}


def _is_in_part(
    main: Process, vector: Mapping[int, int], users: Sequence[int], groups: Sequence[int]
) -> bool:
    """Whether the main process has rights of two users, of which a command gets those of the real one alone.

    Root has executed it, and it has made itself another user but for some of root's rights (squid).

    Raises:
        Later: it was lent rights. A program that another user than root has executed can only change its user if it is
            set-user-ID or set-group-ID, or has a capability for it. In another user namespace than ours numbers mean
            something else; but that one is entered.
    """
    # The kernel says this. The vector a user can forge in his own program, before he executes another, and after that:
    # so its word is good for no more than what the real user may do anyway.
    in_part = users[0] != 0 and (len(set(users)) > 1 or len(set(groups)) > 1)
    user = vector[_AT_UID]
    before, after = (user, vector[_AT_GID]), (vector[_AT_EUID], vector[_AT_EGID])
    ours = namespace_id(f"/proc/{main.pid}/ns/user") == namespace_id("/proc/self/ns/user")
    other = user != 0 and (in_part or (ours and set(users) != {user}))
    if other or (vector[_AT_SECURE] and before != after):
        raise Later(
            "could not be run: its main process runs a program with rights that are not its own;"
            " start it as the user that it is to be"
        )
    return in_part


def _root(main: Process) -> tuple[str, tuple[int, int]]:
    try:
        path = f"/proc/{main.pid}/root"
        found = os.readlink(path), namespace_id(path)
    except FileNotFoundError:
        raise Gone(f"process {main.pid} has ended") from None
    if not main.alive():
        raise Gone(f"process {main.pid} has ended")
    return found


def _cgroup(main: Process) -> str:
    path = cgroup.directory(main.read("cgroup"))
    other = path not in ("", cgroup.own_directory())
    return path if other and os.access(f"{path}/cgroup.procs", os.W_OK) else ""
