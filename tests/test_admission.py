# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image must be made for: the os-release of the service's own root."""

import os
from pathlib import Path

import pytest

from watcher.admission import host


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
