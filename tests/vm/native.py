# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of the virtual machine, run on this machine: what does not need its kernel is so done ten times as fast."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from vm import disk

WORK = "/mnt"
"""Where a command in there finds its directory."""

# The root file system is the cache's: nothing may be written to it. systemd-repart wants /dev and /proc.
_ENTER = """\
set -e
mount --bind "$0" "$0"
mount --options remount,bind,ro "$0"
mount --bind "$1" "$0/mnt"
for i in dev proc sys; do mount --rbind /$i "$0/$i"; done
for i in tmp run var/tmp; do mount --types tmpfs tmpfs "$0/$i"; done
root=$0
shift
exec env --ignore-environment PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 chroot "$root" "$@"
"""


def run(directory: Path, argv: Sequence[str]) -> str:
    """Run a command of Debian 13 with a directory of this machine at `WORK`, and return what it printed.

    Raises:
        AssertionError: it failed; with all that it said.
    """
    enter = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _ENTER]
    done = subprocess.run(
        [*enter, str(disk.root()), str(directory), *argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{list(argv)} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_all(tree: Path, below: str) -> None:
    """Bytecode for the Python code in a tree that is going to be copied to `/`.

    Args:
        below: where in the tree it is.
    """
    where = ["-s", WORK, "-p", "/", "--invalidation-mode", "unchecked-hash"]
    run(tree, ["python3", "-m", "compileall", "-q", *where, f"{WORK}/{below}"])
