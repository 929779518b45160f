# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small confexts for tests: directory trees, and images of them by the real tools."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from support import CHECKOUT
from support.needs import which
from watcher.images.formats.btrfs import BTRFS
from watcher.images.formats.erofs import EROFS
from watcher.images.formats.ext4 import EXT4
from watcher.images.formats.image import Image
from watcher.images.formats.squashfs import SQUASHFS

FORMATS = {one.name: Image(one, 0) for one in (SQUASHFS, EROFS, EXT4, BTRFS)}
"""Of images without a partition table."""
TOOLS = {"squashfs": "mksquashfs", "erofs": "mkfs.erofs", "ext4": "mkfs.ext4", "btrfs": "mkfs.btrfs"}
_BTRFS = "--quiet --mixed --metadata single --data single --nodesize 4096 --shrink --rootdir".split()
"""As small as it gets: 8 MiB."""


def confext(root: Path, name: str, files: dict[str, bytes] | None = None, release: str = "ID=_any\n") -> Path:
    """A confext tree in the new directory `root`, with files by their path below it."""
    directory = root / "etc/extension-release.d"
    directory.mkdir(parents=True)
    (directory / f"extension-release.{name}").write_text(release)
    for path, content in (files or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def image(tree: Path, path: Path, fstype: str = "squashfs", *options: str) -> Path:
    """An image of the tree at `path`; pad it with `noise` for a size that compression leaves alone."""
    tool = which(TOOLS[fstype])
    assert tool is not None, f"{TOOLS[fstype]} is missing: mark the test"
    arguments: list[str | Path] = [tree, path, *options, "-quiet", "-no-progress", "-noappend"]
    if fstype == "erofs":
        arguments = ["--quiet", *options, path, tree]
    elif fstype == "ext4":
        arguments = ["-q", "-d", tree, *options, path, "4M"]
    elif fstype == "btrfs":
        with path.open("wb") as file:
            file.truncate(16 << 20)
        arguments = [*_BTRFS, tree, *options, path]
    subprocess.run([tool, *(os.fspath(argument) for argument in arguments)], check=True, capture_output=True)
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file, as the store has it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def program(module: str, function: str, *arguments: object) -> list[str]:
    """A command that calls a function of a test module, with strings, in a process that shares nothing with ours."""
    path = [str(CHECKOUT / "tests"), str(CHECKOUT), *sys.path]
    source = f"import sys; sys.path[:0] = {path!r}; import {module}; {module}.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", source, *map(str, arguments)]


def noise(size: int) -> bytes:
    return os.urandom(size)
