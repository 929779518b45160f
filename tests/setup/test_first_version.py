# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is taken of the host's /etc is what is there, with its modes, and nothing besides."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from support.images import program
from support.needs import root, tool
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
    return first_version.take(sources, lambda path: path.endswith(".key"), 1 << 20, target, "web", str(host))


def test_more_than_an_image_may_have_is_refused_before_it_is_copied(host: Path, tmp_path: Path) -> None:
    """Whoever owns a directory in /etc could fill the disk with one sparse file."""
    os.truncate(host / "etc/web/web.conf", 1 << 40)
    (tmp_path / "copy").mkdir()
    with pytest.raises(Failed, match=r"^no first version can be made: too large: .*ImageMax="):
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
    assert (copy / "etc/extension-release.d/extension-release.web").read_text() == "ID=_any\n"
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


def said(command: list[str], top: Path) -> str:
    """What a command says of all in the `etc` of a tree."""
    found = sorted(str(path.relative_to(top)) for path in (top / "etc").rglob("*"))
    kept = [
        path
        for path in found
        if "extension-release" not in path and "site.key" not in path and "~" not in path
    ]
    done = subprocess.run([*command, "etc", *kept], cwd=top, check=True, capture_output=True, text=True)
    return done.stdout


CAPABILITY = b"\x00\x00\x00\x02\x00\x04" + bytes(14)
"""cap_net_bind_service, permitted: struct vfs_cap_data in linux/capability.h."""


@root
@tool("getfattr")
def test_the_attributes_are_those_of_the_host(host: Path, tmp_path: Path) -> None:
    copy, web = tmp_path / "copy", host / "etc/web"
    copy.mkdir()
    os.setxattr(web / "web.conf", "user.origin", b"\0 from\n")
    os.setxattr(web / "sites", "user.note", b"")
    os.setxattr(host / "etc", "security.confext", b"label")
    os.setxattr(web / "sites/on", "security.confext", b"label", follow_symlinks=False)
    os.setxattr(web / "run.sh", "security.capability", CAPABILITY)
    take(host, "/etc/web", "/etc/default/web", target=str(copy))
    getfattr = ["getfattr", "--no-dereference", "--dump", "--match=-", "--encoding=hex"]
    assert said(getfattr, copy) == said(getfattr, host)
    assert said(getfattr, copy).count("=0x") == 5
    os.setxattr(web / "secret", "trusted.confext", b"x")
    os.setxattr(web / "secret", "security.evm", b"\3of another inode")
    again = tmp_path / "again"
    again.mkdir()
    take(host, "/etc/web", "/etc/default/web", target=str(again))
    assert said(getfattr, again) == said(getfattr, copy)


@root
@tool("setfacl")
def test_the_access_control_lists_are_those_of_the_host(host: Path, tmp_path: Path) -> None:
    copy, web = tmp_path / "copy", host / "etc/web"
    copy.mkdir()
    for path, entries in (
        ("etc/web/secret", "user:1234:r,group::-"),
        ("etc/web/sites", "group:4321:rx,default:user:1234:rw"),
        ("etc/web/run.sh", "user:1234:rwx"),
        ("etc/default", "user:1234:rx"),
    ):
        subprocess.run(["setfacl", f"--modify={entries}", host / path], check=True)
    taken = take(host, "/etc/web", "/etc/default/web", target=str(copy))
    getfacl = ["getfacl", "--physical", "--numeric"]
    assert said(getfacl, copy) == said(getfacl, host)
    assert said(getfacl, copy).count(":1234:") == 4
    assert sorted(taken.listed) == ["/etc/default", "/etc/web/run.sh", "/etc/web/secret", "/etc/web/sites"]
    assert take(host, "/etc/web", "/etc/default/web") == taken
    assert taken.private == [("/etc/web/secret", 0o640)], "a list that lets more do more hides nothing"
    subprocess.run(["setfacl", "--modify=user:1234:-", web / "run.sh"], check=True)
    assert ("/etc/web/run.sh", 0o755) in take(host, "/etc/web").private


@root
@tool("setfacl")
@tool("unshare")
def test_a_list_that_the_copy_cannot_hold_is_not_lost(host: Path, tmp_path: Path) -> None:
    """The group's bits of a mode say what the list lets others do: alone they would let the group."""
    (tmp_path / "copy").mkdir()
    subprocess.run(["setfacl", "--modify=user:1234:r,group::-", host / "etc/web/secret"], check=True)
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            *program("setup.test_first_version", "take_into_ramfs", tmp_path),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "/etc/web/secret has an access control list, which" in done.stderr and "TMPDIR=" in done.stderr


def take_into_ramfs(place: str) -> None:
    subprocess.run(["mount", "-t", "ramfs", "none", f"{place}/copy"], check=True)
    take(Path(place, "host"), "/etc/web", target=f"{place}/copy")


@root
def test_what_hides_something_by_an_attribute_is_refused(host: Path) -> None:
    os.setxattr(host / "etc/web/sites", "trusted.overlay.opaque", b"y")
    with pytest.raises(Failed, match=r"/etc/web/sites has the extended attribute trusted\.overlay\.opaque"):
        take(host, "/etc/web")


def test_a_file_that_is_being_written_is_not_taken(host: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    problem = (
        "no first version can be made: /etc/web/web.conf: open for writing: try again when it is written"
    )
    with (host / "etc/web/web.conf").open("a"), pytest.raises(Failed, match=problem):
        take(host, "/etc/web", target=str(tmp_path / "copy"))


def test_what_only_some_may_reach_is_private(host: Path) -> None:
    (host / "etc/default").chmod(0o700)
    assert take(host, "/etc/default/web").private == [("/etc/default/web", 0o644)]
    (host / "etc/default").chmod(0o755)
    (host / "etc/default/web").chmod(0o604)
    assert take(host, "/etc/default/web").private == [("/etc/default/web", 0o604)], (
        "its group may not read it"
    )


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
