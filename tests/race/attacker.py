# SPDX-License-Identifier: LGPL-2.1-or-later
"""The owner of the drop directory, who does all that he can, at random, until his time is over.

`python -m race.attacker HOME SEED SECONDS [KIND ...]` as root; becomes uid 65534 in HOME, where there are

    drops/                the drop directory
    aside/A.raw ... A/    contents that are whole; broken-*.raw, which are not
    ../pristine/          the same, to be copied
    ../secret/            root's own

What is at rest is always whole (or one of the broken): a rewriting keeps the file open until it is done. That an image
which is rewritten half and then left alone cannot be told from a whole one, the README says.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable

from race.contents import LETTERS
from support.nobody import become_nobody

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)
VERSIONS = range(1, 6)
DELIVERIES = {"rename_into_place", "copy_into_place", "swap_two", "rewrite", "swap_trees", "tree_into_place"}
PERIOD_SEC, PEACE_SEC = 0.25, 0.1
_FILLED = 4096
IMAGES, TREES = "drops/web.raw.v", "drops/www.v"


def exchange(one: str, other: str) -> None:
    """renameat2(2): both at once."""
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), one)


def opened(path: str, flags: int) -> int:
    """A descriptor of a regular file: a FIFO of another attacker's would have us wait for ever.

    For one attacker at a time, by flock(2): what two have written at once would be a mixture by itself.
    """
    fd = os.open(path, flags | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class Attacker:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = itertools.count()
        self.name = f"{os.getpid()}"
        self.broken = sorted(name for name in os.listdir("aside") if name.startswith("broken"))

    # --- what is taken, and where it goes ---

    def content(self) -> str:
        """A whole image, or now and then one that is not."""
        if self.broken and self.random.random() < 0.15:
            return f"aside/{self.random.choice(self.broken)}"
        return f"../pristine/{self.random.choice(LETTERS)}.raw"

    def own(self) -> str:
        """One that is ours: what is done to a link of it is done to it as well."""
        return f"aside/{self.random.choice(LETTERS)}.raw"

    def image(self) -> str:
        return f"{IMAGES}/web_{self.random.choice(VERSIONS)}.raw"

    def tree(self) -> str:
        return f"{TREES}/www_{self.random.choice(VERSIONS)}"

    def fresh(self) -> str:
        """A name of our own for what is to be moved."""
        return f"aside/.{self.name}-{next(self.numbers)}"

    def pause(self) -> None:
        time.sleep(self.random.random() * 0.002)

    # --- what is done ---

    def rename_into_place(self) -> None:
        made = shutil.copyfile(self.content(), self.fresh())
        os.rename(made, self.image())

    def copy_into_place(self) -> None:
        with open(self.content(), "rb") as source:
            data = source.read()
        with open(opened(self.image(), os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.truncate()
            file.write(data)

    def swap_two(self) -> None:
        exchange(self.image(), self.image())

    def rewrite(self) -> None:
        """In place, piece by piece, all of it: another content of the same size."""
        with open(f"../pristine/{self.random.choice(LETTERS)}.raw", "rb") as source:
            data = source.read()
        with open(opened(self.image(), os.O_RDWR), "r+b", buffering=0) as file:
            step = self.random.choice((4096, 16384, 65536))
            for at in range(0, len(data), step):
                file.write(data[at : at + step])
                if self.random.random() < 0.1:
                    self.pause()
            file.truncate(len(data))

    def rewrite_mapped(self) -> None:
        """The same in memory; in a process of its own: whoever truncates the file has it killed (SIGBUS)."""
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        try:
            self._write_mapped()
        finally:
            os._exit(0)

    def _write_mapped(self) -> None:
        with open(f"../pristine/{self.random.choice(LETTERS)}.raw", "rb") as source:
            data = source.read()
        with open(opened(self.image(), os.O_RDWR), "r+b", buffering=0) as file:
            file.truncate(len(data))
            with mmap.mmap(file.fileno(), len(data)) as view:
                for at in range(0, len(data), 16384):
                    view[at : at + 16384] = data[at : at + 16384]
                    if self.random.random() < 0.1:
                        self.pause()

    def truncate(self) -> None:
        """By more than mksquashfs has filled it up with: without that it is as whole as before."""
        with open(opened(self.image(), os.O_RDWR), "r+b") as file:
            file.truncate(self.random.randrange(max(os.fstat(file.fileno()).st_size - _FILLED, 0) + 1))

    def hard_link(self) -> None:
        made = self.fresh()
        os.link(self.own(), made)
        os.rename(made, self.image())

    def link(self) -> None:
        made = self.fresh()
        os.symlink(f"../../{self.own()}", made)
        os.rename(made, self.image())

    def link_to_roots(self) -> None:
        made = self.fresh()
        target = self.random.choice(
            ("secret/S.raw", "secret/web.raw.v/web_9.raw", "home/aside/through/S.raw")
        )
        os.symlink(f"{os.path.dirname(os.getcwd())}/{target}", made)
        os.rename(made, self.image())

    def hard_link_to_roots(self) -> None:
        os.link("../secret/S.raw", self.image())

    def link_to_roots_tree(self) -> None:
        made = self.fresh()
        os.symlink(f"{os.path.dirname(os.getcwd())}/secret/S", made)
        shutil.rmtree(tree := self.tree(), ignore_errors=True)
        os.rename(made, tree)

    def etc_of_a_tree_to_roots(self) -> None:
        """The directory in a tree becomes a link to root's, and is itself again."""
        tree, aside = self.tree(), self.fresh()
        os.symlink(f"{os.path.dirname(os.getcwd())}/secret/S/etc", aside)
        exchange(f"{tree}/etc", aside)
        self.pause()
        exchange(f"{tree}/etc", aside)

    def directory_to_roots(self) -> None:
        """The `.v/` itself becomes a link to root's, and is itself again."""
        aside = self.fresh()
        os.symlink(f"{os.path.dirname(os.getcwd())}/secret/web.raw.v", aside)
        exchange(IMAGES, aside)
        self.pause()
        exchange(IMAGES, aside)

    def directory_elsewhere(self) -> None:
        exchange(
            self.random.choice((IMAGES, TREES)), self.random.choice(("aside/other.v", "aside/another.v"))
        )

    def swap_trees(self) -> None:
        exchange(self.tree(), self.random.choice((self.tree(), f"aside/{self.random.choice(LETTERS)}")))

    def tree_into_place(self) -> None:
        made, tree = shutil.copytree(f"../pristine/{self.random.choice(LETTERS)}", self.fresh()), self.tree()
        if os.path.lexists(tree):
            exchange(made, tree)
            shutil.rmtree(made, ignore_errors=True)
        else:
            os.rename(made, tree)

    def swap_what_is_in_trees(self) -> None:
        """All that a tree holds lies in one directory of it, so that each is whole at any time."""
        exchange(f"{self.tree()}/etc", f"{self.tree()}/etc")

    def link_to_tree(self) -> None:
        made = self.fresh()
        os.symlink(f"../../aside/{self.random.choice(LETTERS)}", made)
        exchange(made, self.tree())

    def modes(self) -> None:
        path = self.random.choice((self.image(), IMAGES, TREES, f"{self.tree()}/etc"))
        before = os.stat(path).st_mode & 0o7777
        os.chmod(path, self.random.choice((0, 0o444, 0o600, 0o666, 0o777, 0o1777)))
        self.pause()
        os.chmod(path, before | 0o700)

    def lease(self) -> None:
        """Whoever opens it waits for us, or is told to come again."""
        with open(opened(self.image(), os.O_RDONLY), "rb") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            self.pause()

    def something_else(self) -> None:
        made = self.fresh()
        self.random.choice((os.mkfifo, os.mkdir))(made)
        os.rename(made, self.image())

    def remove(self) -> None:
        path = self.random.choice((self.image(), self.tree()))
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def restore(self) -> None:
        """What another of us left half done."""
        for path in (IMAGES, TREES):
            if os.path.islink(path):
                os.unlink(path)
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o755)
        letter = self.random.choice(LETTERS)
        os.rename(shutil.copyfile(f"../pristine/{letter}.raw", self.fresh()), f"aside/{letter}.raw")
        old = shutil.copytree(f"../pristine/{letter}", self.fresh())
        exchange(old, f"aside/{letter}")
        if os.path.islink(old):
            os.unlink(old)
        else:
            shutil.rmtree(old, ignore_errors=True)


_TOOLS = {"content", "own", "image", "tree", "fresh", "pause", "restore"}
KINDS: dict[str, Callable[[Attacker], None]] = {
    name: method
    for name, method in vars(Attacker).items()
    if callable(method) and not name.startswith("_") and name not in _TOOLS
}


def attack(seed: int, seconds: float, kinds: list[str]) -> dict[str, int]:
    """How often each thing was tried."""
    attacker = Attacker(seed)
    tried: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(attacker.random.randrange(1, 12)):
            # Half of it is what people do: for all the rest there is something to be done to.
            common = attacker.random.random() < 0.5 and set(kinds) >= DELIVERIES
            kind = attacker.random.choice(sorted(DELIVERIES) if common else kinds)
            tried[kind] += 1
            with contextlib.suppress(OSError, ValueError, shutil.Error):
                KINDS[kind](attacker)
            if attacker.random.random() < 0.3:
                attacker.pause()
        # Now and then there is peace on all sides, or hardly anything would ever count as settled.
        rest = PERIOD_SEC - time.monotonic() % PERIOD_SEC
        if rest < PEACE_SEC:
            with contextlib.suppress(OSError):
                attacker.restore()
            time.sleep(rest)
    return dict(tried)


def main(home: str, seed: str, seconds: str, *kinds: str) -> None:
    os.chdir(home)
    become_nobody()
    signal.alarm(int(float(seconds)) + 20)  # whatever it may hang in
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # somebody opened what we had a lease on
    print(json.dumps(attack(int(seed), float(seconds), list(kinds) or sorted(KINDS))))


if __name__ == "__main__":
    main(*sys.argv[1:])
