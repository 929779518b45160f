# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program of a transient unit that runs a service's check: enters namespaces, becomes like the service, executes.

systemd has no setting for an existing mount namespace, and nsenter(1) does not know a service's capabilities. What to
do is read from a file that only root can open: the service's environment may hold secrets, and what is in a unit's
properties or in a command line everybody can read. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from watcher.become import Like, become
from watcher.mounts import syscalls

EXIT_EXEC = 203
"""The command could not be executed, as systemd.exec(5) has it."""


def order(namespaces: Sequence[str], who: Like, words: Sequence[str]) -> bytes:
    """What `main()` reads; `namespaces` are paths of namespaces in the order in which they are to be entered."""
    return json.dumps({"namespaces": list(namespaces), "like": asdict(who), "words": list(words)}).encode()


def main(path: str) -> None:
    """Does not return."""
    with open(path, "rb") as file:
        told = json.load(file)
    who = Like(**told["like"])
    words = told["words"]
    other = (who.user, who.group) != (0, 0)
    try:
        if other:
            # First of all: a user namespace may not allow it (PrivateUsers= does not).
            os.setgroups(who.groups)
        # All are opened first: their paths mean nothing any more inside.
        for fd in [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in told["namespaces"]]:
            syscalls.setns(fd, 0)
        os.chdir("/")
        become(who, -1, other=other, grouped=True)
        os.execvpe(words[0], words, who.environment)
    except OSError as error:
        print(f"{words[0]}: {error.strerror}", flush=True)
    sys.exit(EXIT_EXEC)
