# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first version of a service's image: what it has of the host's /etc now, with owners, modes and attributes.

Extended attributes: those of people (user.*), of the kernel's security modules and capabilities (security.*), and
access control lists. An image has no use for the rest. How it is copied: images/staging.py.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from watcher.images import attributes
from watcher.images.attributes import Xattrs
from watcher.images.extension import RELEASE_DIRECTORY
from watcher.images.staging import Staging
from watcher.images.tree import in_blocks
from watcher.images.walk import DIRECTORY, Path
from watcher.model import Busy, Refused, shown
from watcher.mounts.descriptors import Descriptors
from watcher.records.schema import Failed
from watcher.resolve import release
from watcher.resolve.trust import READ, SEARCH, Permissions

_ACLS = "system.posix_acl_"
_KEPT = ("user.", "security.", _ACLS)
# A signature over the inode's number, too (ima/evm): of another inode it is wrong. Overlayfs alone gives its own.
_NOT_KEPT = ("security.evm", "user.overlay.")
_DPKG = "/var/lib/dpkg/info"
_OWN = 4
"""Nodes of the copy that the host does not have: its root, and the way to the release file."""


@dataclass(slots=True)
class Taken:
    """What of the host is taken. Paths are absolute.

    Attributes:
        files: regular files and links.
        size: bytes of all files.
        room: bytes that a copy takes; an image of it takes no more.
        private: files that not everybody may read, with their modes.
        listed: what has an access control list.
        excluded: what must not be in an image.
        unusable: what no image can have, with the reason.
        missing: sources that are not there.
    """

    files: list[str] = field(default_factory=list)
    size: int = 0
    room: int = 0
    private: list[tuple[str, int]] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def take(
    sources: Iterable[str],
    excludes: Callable[[str], bool],
    size_max: int,
    target: str = "",
    name: str = "",
    root: str = "/",
) -> Taken:
    """Look at what would be taken, or copy it, and give the copy a release file.

    Args:
        sources: absolute paths below /etc.
        excludes: whether a path must not be in an image.
        size_max: bytes of all files (`ImageMax=`).
        target: an empty directory, which then has an `etc`; "": only look.
        name: of the image, for the release file.
        root: that the paths are below.

    Raises:
        Failed: a source is a link, there is too much, or something is being written.
        OSError: something cannot be read or written.
    """
    with Descriptors() as fds:
        start = fds.add(os.open(root, DIRECTORY))
        copy = fds.add(os.open(target, DIRECTORY)) if target else None
        taking = _Taking(excludes, size_max, copy)
        try:
            for source in sources:
                taking.source(start, source)
            place = (*RELEASE_DIRECTORY.split("/"), release.PREFIX + name)
            if copy is not None and not taking.has(place):
                taking.write(copy, place, "ID=_any\n")
        except (Refused, Busy) as error:
            raise Failed(f"no first version can be made: {error}") from error
    return taking.taken()


def of_packages(files: Iterable[str], info: str = _DPKG) -> dict[str, int]:
    """How many of these files are conffiles of a Debian package, by package; nothing where there is no dpkg."""
    found: dict[str, int] = {}
    wanted = set(files)
    try:
        names = sorted(name for name in os.listdir(info) if name.endswith(".conffiles"))
    except OSError:
        return {}
    for name in names:
        with open(f"{info}/{name}", encoding="utf-8", errors="surrogateescape") as file:
            # "remove-on-upgrade" may stand in front of the path (deb-conffiles(5)).
            count = sum(1 for line in file if line.strip().rpartition(" ")[2] in wanted)
        if count:
            package = name.removesuffix(".conffiles").partition(":")[0]
            found[package] = found.get(package, 0) + count
    return found


class _Taking(Staging):
    def __init__(self, excludes: Callable[[str], bool], size_max: int, target: int | None) -> None:
        super().__init__(size_max)
        self._excludes = excludes
        self._target = target
        self._closed: set[Path] = set()
        """Directories in which not everybody may reach what is there."""
        self._private: list[tuple[str, int]] = []
        self._missing: list[str] = []
        # The keys are what counts: what is named twice is looked at twice.
        self._listed: dict[str, None] = {}
        self._excluded: dict[str, None] = {}
        self._unusable: dict[tuple[str, str], None] = {}

    def taken(self) -> Taken:
        return Taken(
            files=[_whole(path) for path in self._from],
            size=self.size,
            room=self.room + _OWN * in_blocks(0),
            private=self._private,
            listed=list(self._listed),
            excluded=list(self._excluded),
            unusable=list(self._unusable),
            missing=self._missing,
        )

    def source(self, root: int, source: str) -> None:
        """One source, with the directories above it, which are in the image as the host has them, too."""
        path = tuple(source.strip("/").split("/"))
        with Descriptors() as fds:
            above, made = root, self._target
            try:
                for depth, name in enumerate(path[:-1], 1):
                    above = fds.add(os.open(name, DIRECTORY, dir_fd=above))
                    made = self._above(fds, above, made, path[:depth])
                st = os.stat(path[-1], dir_fd=above, follow_symlinks=False)
            except FileNotFoundError:
                self._missing.append(source)
                return
            if stat.S_ISLNK(st.st_mode):
                to = os.readlink(path[-1], dir_fd=above)
                raise Failed(
                    f"{shown(source)} is a link to {shown(to)}: name with --from what is to be taken"
                )
            if self._takes(path):
                self._node(above, path[-1], made, path, _whole(path), follow=False)

    def _above(self, fds: Descriptors, fd: int, parent: int | None, path: Path) -> int | None:
        """The copy of a directory above a source."""
        st = os.fstat(fd)
        self.room += in_blocks(0)
        self._found_directory(fd, st, path)
        if parent is None:
            return None
        made = fds.add(self._made(parent, path, _whole(path)))
        self._finish_directory(fd, st, made, path)
        return made

    def _takes(self, path: Path) -> bool:
        whole = _whole(path)
        if super()._takes(path) and not self._excludes(whole):
            return True
        self._excluded[whole] = None
        return False

    def _special(self, what: str, origin: str) -> None:
        self._unusable[origin, what] = None

    def _found_directory(self, fd: int, st: os.stat_result, path: Path) -> None:
        self._note_list(fd, path)
        if not Permissions.of_descriptor(st, fd).let_everybody(SEARCH):
            self._closed.add(path)

    def _found_file(self, fd: int, st: os.stat_result, path: Path) -> None:
        self._note_list(fd, path)
        reachable = not any(path[:depth] in self._closed for depth in range(1, len(path)))
        if not (reachable and Permissions.of_descriptor(st, fd).let_everybody(READ)):
            self._private.append((_whole(path), stat.S_IMODE(st.st_mode)))

    def _note_list(self, fd: int, path: Path) -> None:
        if any(name.startswith(_ACLS) for name in attributes.names(fd)):
            self._listed[_whole(path)] = None

    def _finish_directory(self, fd: int, st: os.stat_result, made: int, path: Path) -> None:
        self._finish_file(fd, st, made, path)

    def _finish_file(self, fd: int, st: os.stat_result, made: int, path: Path) -> None:
        kept = _kept(fd, path)
        attributes.give(made, st, kept)
        lists = {name for name, _ in kept if name.startswith(_ACLS)}
        if not lists.issubset(attributes.names(made)):
            # The mode alone would let the group do what the list lets others.
            raise Refused(
                f"{shown(_whole(path))} has an access control list, which the directory for temporary files cannot"
                " hold: name another one with TMPDIR="
            )

    def _finish_link(self, node: str, st: os.stat_result, target: int, path: Path) -> None:
        attributes.give_to_link(path[-1], target, st, _kept(node, path))


def _whole(path: Path) -> str:
    return "/" + "/".join(path)


def _kept(node: int | str, path: Path) -> Xattrs:
    """The attributes that the copy of a node gets."""
    found = attributes.read(node, shown(_whole(path)))
    return [
        (name, value) for name, value in found if name.startswith(_KEPT) and not name.startswith(_NOT_KEPT)
    ]
