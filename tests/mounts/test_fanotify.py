# SPDX-License-Identifier: LGPL-2.1-or-later
"""What fanotify tells, on the file systems that people drop things on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import root
from watcher.mounts import fanotify

pytestmark = root


@pytest.fixture(params=["as it is", "tmpfs", "overlay"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "place"
    place.mkdir()
    if request.param == "as it is":
        yield place
        return
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        if request.param == "tmpfs":
            yield place
            return
        for name in ("lower", "upper", "work", "merged"):
            (place / name).mkdir()
        options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", place / "merged", "-o", options], check=True)
        try:
            yield place / "merged"
        finally:
            subprocess.run(["umount", place / "merged"], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def test_who_opens_and_who_closes_after_writing(directory: Path) -> None:
    group = fanotify.init()
    try:
        fanotify.mark(group, str(directory))
        fanotify.mark(group, str(directory))
        odd = directory / os.fsdecode(b"web \xff\n.raw")
        with odd.open("wb") as file:
            opened = list(fanotify.read(group))
            handle = fanotify.name_to_handle_at(file.fileno())
        place = fanotify.name_to_handle_at(fd := os.open(directory, os.O_PATH)), odd.name
        os.close(fd)
        closed = list(fanotify.read(group))
        assert opened == [fanotify.Event(fanotify.OPEN, os.getpid(), handle, place)]
        assert closed == [fanotify.Event(fanotify.CLOSE_WRITE, os.getpid(), handle, place)]
        odd.read_bytes()
        subprocess.run(["touch", odd], check=True)
        read, touched = fanotify.read(group)
        assert (read.mask, read.pid) == (fanotify.OPEN | fanotify.CLOSE_NOWRITE, os.getpid())
        assert touched.mask == fanotify.OPEN | fanotify.CLOSE_WRITE and touched.pid != os.getpid()
    finally:
        os.close(group)


@pytest.mark.parametrize("path", ["/nothing/there", "/etc/passwd"])
def test_what_cannot_be_watched_is_an_error(path: str) -> None:
    group = fanotify.init()
    try:
        with pytest.raises(OSError, match=path):
            fanotify.mark(group, path)
    finally:
        os.close(group)
