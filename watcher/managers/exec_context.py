# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `enter.py` is told. It does not import this itself: dataclasses take longer than all that it does."""

from __future__ import annotations

import marshal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

_ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ExecContext:
    """Whose user, groups, environment, root directory, capabilities and limits a command gets.

    Attributes:
        user, group, groups: numbers, as the watcher's user namespace has them.
        environment: of the command.
        bounding: capabilities that a program may get at most, a mask.
        ambient: capabilities that it gets although its user is not root, a mask.
        no_new_privs: as of the process.
        root: its root directory, a path in its mount namespace.
        root_id: device and inode of that directory.
        cgroup: directory of its control group, "" if that is also ours.
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
    """What to run.

    Attributes:
        namespaces: paths by which root finds them, by their kind.
        context: whose user, rights and environment the command gets.
        words: the command.
        contained: whether to see to it that nothing of the command survives (else systemd does).
        group: directory of a control group below which the command gets one of its own; "": it gets none.
        private_pids: where it gets none, whether it gets a PID namespace.
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
