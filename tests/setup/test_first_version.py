# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is taken of the host's /etc is what is there, with its modes, and nothing besides."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from watcher.records.schema import Failed
from watcher.setup import first_version
from watcher.setup.first_version import Taken


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host's root with a service's files in its /etc."""
    web = tmp_path / "host/etc/web"
    (web / "sites").mkdir(parents=True)
    web.chmod(0o751)
    (web / "web.conf").write_text("port = 80\n")
    (web / "web.conf").chmod(0o644)
    (web / "run.sh").write_text("#!/bin/sh\n")
    (web / "run.sh").chmod(0o755)
    (web / "site.key").write_text("key")
    (web / "secret").write_text("secret")
    (web / "secret").chmod(0o640)
    (web / "web.conf~").write_text("old")
    (web / "sites/on").symlink_to("../off")
    (tmp_path / "host/etc/default").mkdir()
    (tmp_path / "host/etc/default/web").write_text("OPTIONS=\n")
    os.utime(web / "web.conf", ns=(1, 2))
    return tmp_path / "host"


def take(host: Path, *sources: str, target: str = "") -> Taken:
    return first_version.take(sources, lambda path: path.endswith(".key"), 1 << 20, target, str(host))


def test_more_than_an_image_may_have_is_refused_before_it_is_copied(host: Path, tmp_path: Path) -> None:
    """Whoever owns a directory in /etc could fill the disk with one sparse file."""
    os.truncate(host / "etc/web/web.conf", 1 << 40)
    (tmp_path / "copy").mkdir()
    with pytest.raises(Failed, match=r"^what is to be taken is too much: too large: .*ImageMax="):
        take(host, "/etc/web")
    with pytest.raises(Failed, match="ImageMax="):
        take(host, "/etc/web/web.conf", target=str(tmp_path / "copy"))
    assert not (tmp_path / "copy/etc/web/web.conf").exists()


def test_a_copy_is_as_the_host_has_it(host: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    taken = take(host, "/etc/web", "/etc/default/web", "/etc/none", target=str(copy))
    assert sorted(taken.files) == [
        "/etc/default/web",
        "/etc/web/run.sh",
        "/etc/web/secret",
        "/etc/web/sites/on",
        "/etc/web/web.conf",
    ]
    for path in (*taken.files, "/etc", "/etc/web", "/etc/web/sites", "/etc/default"):
        one, other = ((top / path[1:]).lstat() for top in (host, copy))
        assert (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid), path
    assert (copy / "etc/web/web.conf").read_text() == "port = 80\n"
    assert (copy / "etc/web/web.conf").stat().st_mtime_ns == 2
    assert os.readlink(copy / "etc/web/sites/on") == "../off"
    assert taken.missing == ["/etc/none"]
    assert taken.private == [("/etc/web/secret", 0o640)]
    assert sorted(taken.excluded) == ["/etc/web/site.key", "/etc/web/web.conf~"]
    assert sorted(os.listdir(copy / "etc/web")) == ["run.sh", "secret", "sites", "web.conf"]


def test_to_look_is_to_change_nothing_and_finds_the_same(host: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    assert take(host, "/etc/web") == take(host, "/etc/web", target=str(copy))


def test_what_is_named_twice_is_taken_once(host: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    taken = take(host, "/etc/web/sites", "/etc/web", "/etc/web/web.conf", target=str(copy))
    assert len(taken.files) == len(set(taken.files)) == 4


def test_what_is_in_a_closed_directory_is_private(host: Path) -> None:
    (host / "etc/web").chmod(0o750)
    assert ("/etc/web/web.conf", 0o644) in take(host, "/etc/web").private


def test_what_no_image_can_have_is_named(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(host / "etc/web/fifo")
    monkeypatch.chdir(host / "etc/web")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        unusable = [path for path, _ in take(host, "/etc/web").unusable]
    assert sorted(unusable) == ["/etc/web/fifo", "/etc/web/socket"]


def test_no_link_leads_out(host: Path) -> None:
    (host / "etc/link").symlink_to("/root")
    with pytest.raises(Failed, match="/etc/link is a link to /root"):
        take(host, "/etc/link")
    with pytest.raises(OSError):
        take(host, "/etc/link/secrets")


def test_conffiles_are_counted_by_package(tmp_path: Path) -> None:
    (tmp_path / "web:amd64.conffiles").write_text("/etc/web/web.conf\nremove-on-upgrade /etc/web/run.sh\n")
    (tmp_path / "other.conffiles").write_text("/etc/other\n")
    files = ["/etc/web/web.conf", "/etc/web/run.sh", "/etc/web/own"]
    assert first_version.of_packages(files, str(tmp_path)) == {"web": 2}
    assert first_version.of_packages(files, str(tmp_path / "no-dpkg")) == {}
