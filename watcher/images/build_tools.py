# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tools that make an image of a tree: mksquashfs, mkfs.erofs, and systemd-repart for disk images.

Each is told all that would otherwise come from the machine: owners, times, UUIDs. With the same tool the same tree is
then the same image. mksquashfs with gzip (zlib) has been compared from 4.5.1 to 4.7.5: the same bytes. mkfs.erofs and
systemd-repart lay things out in other ways from time to time.

A disk image gets the squashfs as it is (`CopyBlocks=`), so systemd-repart has no file to copy: it needs no root and no
loop device for it, and cannot bring the owners of the build machine in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import uuid

from watcher.model import Later, Refused, shown
from watcher.settings.signals import reason_of
from watcher.text import telling

_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
"""An ordinary user's PATH leaves these out."""
_BLOCK = 4096
_DIGEST = 32
_REPART = 255
"""Of systemd: since then it can be told the block sizes of verity data."""
# An erofs has an UUID. The same for all: what differs would make other bytes of the same content.
_UUID = "6a9ac1f4-1f42-4a0e-8a3f-6c2a3f0b7e51"

#: else the holes of the copy count, which file systems make as they like. -no-recovery: no file in $HOME.
_SQUASHFS = """
    -noappend -comp gzip -root-mode 0755 -no-sparse -no-recovery -exit-on-error -quiet -no-progress
""".split()


def squashfs(tree: str, target: str, epoch: int, *, kept: bool = False) -> None:
    """Make a squashfs of all in a directory; all times in it are `epoch`, seconds since 1970.

    Args:
        kept: owners and extended attributes are as in the directory, but for access control lists, which no squashfs
            has; without, all belongs to root, and has none.

    Raises:
        Later: the tool is not installed.
        Refused: it failed.
    """
    times = ("-all-time", str(epoch), "-mkfs-time", str(epoch))
    plain = () if kept else ("-all-root", "-no-xattrs")
    _run("mksquashfs", "squashfs-tools", tree, target, *_SQUASHFS, *plain, *times)


def erofs(tree: str, target: str, epoch: int, *, kept: bool = False) -> None:
    """The same as erofs, which has access control lists, too. Raises as `squashfs()`."""
    plain = () if kept else ("--all-root", "-x-1")
    _run("mkfs.erofs", "erofs-utils", "--quiet", *plain, f"-T{epoch}", f"-U{_UUID}", target, tree)


def disk(content: str, target: str, epoch: int, key: str, certificate: str) -> None:
    """Make a disk image of a file system: a root partition, its hash tree, and a signature where there is a key.

    Args:
        content: path of the file system; its size is a multiple of 4096 bytes.
        key, certificate: paths of PEM files, "" for none.

    Raises:
        Later: systemd-repart is not installed, or too old.
        Refused: it failed.
    """
    _require_repart()
    with open(content, "rb") as file:
        seed = uuid.UUID(bytes=hashlib.file_digest(file, "sha256").digest()[:16])
    definitions = f"{target}.repart"
    os.mkdir(definitions)
    for name, text in _definitions(content, os.path.getsize(content), signed=bool(key)).items():
        with open(f"{definitions}/{name}.conf", "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    signing = (f"--private-key={os.path.abspath(key)}", f"--certificate={os.path.abspath(certificate)}")
    _run(
        *(
            "systemd-repart",
            "systemd-repart",
            f"--definitions={definitions}",
            "--dry-run=no",
            "--empty=create",
        ),
        *("--size=auto", "--offline=yes", "--no-pager", f"--seed={seed}", *(signing if key else ()), target),
        SOURCE_DATE_EPOCH=str(epoch),
    )


def _definitions(content: str, size: int, *, signed: bool) -> dict[str, str]:
    """repart.d(5), by file name. All sizes are given: what systemd-repart chooses depends on its version."""

    def partition(type_: str, what: str, size: int, *lines: str) -> str:
        verity = f"Verity={what}\nVerityMatchKey=root\n"
        sizes = f"SizeMinBytes={size}\nSizeMaxBytes={size}\n" if size else ""
        return f"[Partition]\nType={type_}\n{verity}{sizes}" + "".join(f"{line}\n" for line in lines)

    blocks = (f"VerityDataBlockSizeBytes={_BLOCK}", f"VerityHashBlockSizeBytes={_BLOCK}")
    source = content.replace("%", "%%")
    made = {
        "10-root": partition("root", "data", size, f"CopyBlocks={source}", *blocks),
        "20-root-verity": partition("root-verity", "hash", _hash_tree_size(size), *blocks),
    }
    if signed:
        made["30-root-verity-sig"] = partition("root-verity-sig", "signature", 0)
    return made


def _hash_tree_size(size: int) -> int:
    """Bytes that dm-verity takes for so many: a superblock, and a digest for each block of each level."""
    total, blocks = 1, size // _BLOCK
    while blocks > 1:
        blocks = -(-blocks // (_BLOCK // _DIGEST))
        total += blocks
    return max(total, 2) * _BLOCK


def _require_repart() -> None:
    said = _run("systemd-repart", "systemd-repart", "--version")
    version = re.match(r"systemd (\d+)", said)
    if version is None or int(version[1]) < _REPART:
        raise Later(
            f"systemd-repart is too old for disk images: {shown(said.partition(chr(10))[0])}, and {_REPART} or newer is"
            " needed"
        )


def _run(program: str, package: str, *words: str, **environment: str) -> str:
    """Run a tool, and return what it printed. Its package is named where it is missing."""
    path = os.environ.get("PATH", os.defpath) + _SBIN
    found = shutil.which(program, path=path)
    if found is None:
        raise Later(f"{program} is not installed: apt install {package}")
    # Not all of the environment: SOURCE_DATE_EPOCH beside -all-time is an error to mksquashfs.
    kept = {key: os.environ[key] for key in ("TMPDIR", "TMP", "TEMP", "HOME") if key in os.environ}
    done = subprocess.run(
        [found, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={"PATH": path, "LC_ALL": "C.UTF-8", **kept, **environment},
    )
    if done.returncode:
        said = telling(done.stderr or done.stdout) or "no message"
        raise Refused(f"{program} {reason_of(done.returncode)}: {said}")
    return done.stdout
