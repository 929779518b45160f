# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image must be made for: the os-release of the service's own root; and what is in it."""

import os
from pathlib import Path

import pytest

from support.images import FORMATS, confext, image
from support.needs import loop, root, tool
from watcher.images.admission import Admission, host
from watcher.images.store import Store
from watcher.model import Copy, Kind, Later
from watcher.mounts import workers as workers_module
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers


def test_the_host_is_what_the_root_says(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/os-release").write_text("ID=other\nVERSION_ID=7\n")
    assert host(str(tmp_path)).os_release == {"ID": "other", "VERSION_ID": "7"}


def test_etc_comes_first(tmp_path: Path) -> None:
    for directory, text in (("usr/lib", "ID=a\n"), ("etc", "ID=b\n")):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "os-release").write_text(text)
    assert host(str(tmp_path)).os_release == {"ID": "b"}


def test_links_stay_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("ID=outside\n")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/os-release").write_text("ID=inside\n")
    (root / "etc/os-release").symlink_to("/usr/lib/os-release")
    assert host(str(root)).os_release == {"ID": "inside"}
    (root / "etc/os-release").unlink()
    (root / "etc/os-release").symlink_to(f"{tmp_path}/outside")
    assert host(str(root)).os_release == {"ID": "inside"}


def test_a_fifo_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    os.mkfifo(tmp_path / "etc/os-release")
    assert host(str(tmp_path)).os_release == {}


def test_a_root_without_os_release_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no os-release"):
        host(str(tmp_path))


@root
@pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
@loop
@tool("mksquashfs")
def test_an_image_that_the_kernel_gives_no_answer_about_is_later_and_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy is on a dead network file system, say."""
    monkeypatch.setattr(workers_module, "HANGS_SEC", 0.5)
    os.mkfifo(tmp_path / "hangs")
    path = image(confext(tmp_path / "web", "web"), tmp_path / "web.raw")
    hangs = Copy("f" * 64, str(tmp_path / "hangs"), 0, Kind.IMAGE, FORMATS["squashfs"])
    good = Copy("a" * 64, str(path), 0, Kind.IMAGE, FORMATS["squashfs"])
    with Store(str(tmp_path / "state"), 1 << 30, 1 << 30, 2) as store, MountWorkers(1) as workers:
        admission = Admission(store, workers)
        with pytest.raises(Later, match=r"^no answer from the kernel for 0.5 s$"):
            admission._release(hangs)
        monkeypatch.undo()
        assert admission._release(good)[0] == {"extension-release.web": "ID=_any\n"}
        (tmp_path / "hangs").write_text("")
