# SPDX-License-Identifier: LGPL-2.1-or-later
"""`build` makes the image that was meant, the same bytes of the same content, and nothing where it would be wrong.

What may go in (images/build_sources.py), the copy of it (images/build_stage.py, images/staging.py), the tools
(images/build_tools.py), and the command (cli/build.py). Disk images and other versions of the tools:
tests/beds/test_systemd_build.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.images import confext, digest
from support.needs import root, tool
from support.nobody import become_nobody
from watcher.cli import main
from watcher.images import build, build_tools
from watcher.images.build import Built, Order
from watcher.model import Busy, Refused
from watcher.resolve.content import is_content

pytestmark = tool("mksquashfs")

IMAGE_MAX = 1 << 30
RELEASE = "etc/extension-release.d/extension-release.web"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own to work in; nothing is left in the one for temporary files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield work
    assert list(scratch.iterdir()) == []
    assert [path for path in work.rglob(".#*") if path.is_file() and "confext" in path.name] == []


def put(path: str, content: str = "x\n", mode: int = 0o644) -> Path:
    made = Path(path)
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(content)
    made.chmod(mode)
    return made


def make(*sources: str, output: str = "web_1.4.raw", image_max: int = IMAGE_MAX, **order: object) -> Built:
    return build.build(Order(sources, output, **order), image_max)  # type: ignore[arg-type]


def unpacked(image: str, target: str = "unpacked", fstype: str = "squashfs") -> Path:
    shutil.rmtree(target, ignore_errors=True)
    words = {
        "squashfs": ["unsquashfs", "-no-progress", "-quiet", "-d", target, image],
        "erofs": ["fsck.erofs", f"--extract={target}", image],
    }
    subprocess.run(words[fstype], check=True, capture_output=True)
    return Path(target)


def listed(image: str) -> dict[str, str]:
    """Mode and owner of each path, as unsquashfs has them."""
    said = subprocess.run(["unsquashfs", "-lls", image], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(\S{10}) (\S+) +\d+ (\S+ \S+) squashfs-root/?(.*)$", said, re.MULTILINE)
    return {path: f"{mode} {owner}" for mode, owner, _, path in found}


# --- what goes in ---


def test_of_a_directory_its_etc_and_a_release_file() -> None:
    put("web/etc/web.conf", "port = 1\n")
    put("web/README")
    put("web/.git/config")
    put("web/usr/lib/x")
    made = make("web")
    assert (made.path, made.unchecked, made.notes) == ("web_1.4.raw", "", ())
    assert made.examined and (made.examined.candidate.name, made.examined.candidate.version) == ("web", "1.4")
    assert listed("web_1.4.raw") == {
        "": "drwxr-xr-x root/root",
        "etc": "drwxr-xr-x root/root",
        "etc/extension-release.d": "drwxr-xr-x root/root",
        RELEASE: "-rw-r--r-- root/root",
        "etc/web.conf": "-rw-r--r-- root/root",
    }
    tree = unpacked("web_1.4.raw")
    assert (tree / RELEASE).read_text() == "ID=_any\n"
    assert (tree / "etc/web.conf").read_text() == "port = 1\n"


def test_files_go_where_their_path_says_or_where_it_is_said(place: Path) -> None:
    put("etc/nginx/nginx.conf", "a")
    put("etc/nginx/conf.d/x.conf", "b")
    put("conf/sites/y", "c")
    Path("link").symlink_to("conf/sites/y")
    make(
        "./etc/nginx/",
        "etc/nginx/sites=conf/sites",
        "/etc/z.conf=link",
        "/etc/passwd",
        f"etc/q={place}/conf/sites/y",
    )
    tree = unpacked("web_1.4.raw")
    files = {str(path.relative_to(tree)): path.read_text() for path in tree.rglob("*") if path.is_file()}
    assert files == {
        RELEASE: "ID=_any\n",
        "etc/nginx/nginx.conf": "a",
        "etc/nginx/conf.d/x.conf": "b",
        "etc/nginx/sites/y": "c",
        "etc/z.conf": "c",
        "etc/passwd": Path("/etc/passwd").read_text(),
        "etc/q": "c",
    }
    assert not (tree / "etc/z.conf").is_symlink()


def test_what_is_named_twice_is_there_once() -> None:
    put("etc/a/x")
    put("etc/a/x~")
    made = make("etc/a", "etc/a/x", "etc/a")
    assert (unpacked("web_1.4.raw") / "etc/a/x").read_text() == "x\n"
    assert made.notes == ("left out, as editors and package managers leave such files behind: etc/a/x~",)


def test_links_stay_as_they_are_also_one_that_leads_nowhere() -> None:
    put("etc/a/x")
    Path("etc/a/l").symlink_to("/no/where")
    Path("etc/b").symlink_to("a")
    make("etc/a", "etc/b/")
    tree = unpacked("web_1.4.raw")
    assert os.readlink(tree / "etc/a/l") == "/no/where"
    assert os.readlink(tree / "etc/b") == "a"


def test_a_path_with_an_equals_sign_that_is_there_is_that_path() -> None:
    put("etc/a=b", "here")
    put("b", "there")
    make("etc/a=b")
    assert (unpacked("web_1.4.raw") / "etc/a=b").read_text() == "here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["conf"], "conf: there is no etc/ in it; say where in /etc it goes: etc/conf=conf"),
        (["../work/conf"], "../work/conf: there is no etc/ in it; say where in /etc it goes: etc/conf=../work/conf"),
        (["conf/x"], "conf/x: say where in /etc it goes: etc/x=conf/x"),
        (["linked"], "linked: etc in it is a link, and must be a directory"),
        (["opt/x=conf"], "opt/x=conf: what stands before = is a place in /etc: etc/NAME=conf"),
        (["etc/../x=conf"], "etc/../x=conf: what stands before = is a place in /etc: etc/NAME=conf"),
        (["etc/x="], "etc/x=: what stands before = is a place in /etc: etc/NAME=PATH"),
        (["etc=conf/x"], "etc=conf/x: conf/x is no directory, and etc is one"),
        (["/"], "/: that is all of this host's /etc, with its passwords: name what of it"),
        (["/etc/"], "/etc/: that is all of this host's /etc, with its passwords: name what of it"),
        (["etc=/etc"], "etc=/etc: that is all of this host's /etc, with its passwords: name what of it"),
        (["etc/x=/etc/"], "etc/x=/etc/: that is all of this host's /etc, with its passwords: name what of it"),
        (["etc/x=conf/x", "etc/x=conf/y"], "etc/x comes from conf/x and from conf/y: leave out one"),
        (["etc/x=conf/x", "etc/x=conf"], "etc/x comes from conf/x and from conf: leave out one"),
        (["etc/x=conf/x", "etc/x/z=conf/y"], "etc/x comes from conf/x and from conf/y: leave out one"),
        (["etc/x=conf", "etc/x=conf/x"], "etc/x comes as a directory and from conf/x: leave out one"),
        (["etc/f=fifo"], "fifo is a FIFO: remove it"),
        (["etc/d=special"], "special/socket is a socket: remove it"),
        (["etc/d=/dev/null"], "/dev/null is a device: remove it"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_one_line(words: list[str], said: str) -> None:
    put("conf/x")
    put("conf/y")
    Path("linked").mkdir()
    Path("linked/etc").symlink_to("../conf")
    os.mkfifo("fifo")
    Path("special").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("special/socket")
    with pytest.raises(Refused, match=re.escape(said)):
        make(*words)
    assert not Path("web_1.4.raw").exists()


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(FileNotFoundError) as error:
        make("etc/none")
    assert error.value.filename == "etc/none"


def test_editors_files_are_left_out_and_named_but_not_what_was_named() -> None:
    put("web/etc/web.conf")
    for name in ("web.conf~", ".web.conf.swp", "4913", "#web.conf#", "web.conf.dpkg-old", ".htaccess"):
        put(f"web/etc/{name}")
    put("etc/old.bak")
    made = make("web", "etc/old.bak")
    assert made.notes == (
        "left out, as editors and package managers leave such files behind:"
        " etc/#web.conf#, etc/.web.conf.swp, etc/4913, etc/web.conf.dpkg-old, etc/web.conf~",
    )
    assert {"etc/web.conf", "etc/.htaccess", "etc/old.bak"} < set(listed("web_1.4.raw"))
    assert not {path for path in listed("web_1.4.raw") if "swp" in path or "~" in path}


def test_modes_are_sane_and_a_secret_stays_one() -> None:
    put("web/etc/script", mode=0o775)
    put("web/etc/tool", mode=0o750)
    put("web/etc/suid", mode=0o4755)
    put("web/etc/plain", mode=0o666)
    put("web/etc/key", mode=0o600)
    put("web/etc/shared", mode=0o640)
    os.chmod("web/etc", 0o700)
    Path("web/etc/private").mkdir(mode=0o700)
    made = make("web")
    found = listed("web_1.4.raw")
    names = ("script", "tool", "suid", "plain", "key", "shared", "private")
    assert {path: found[f"etc/{path}"][:10] for path in names} == {
        "script": "-rwxr-xr-x",
        "tool": "-rwx------",
        "suid": "-rwxr-xr-x",
        "plain": "-rw-r--r--",
        "key": "-rw-------",
        "shared": "-rw-------",
        "private": "drwxr-xr-x",
    }  # fmt: skip
    assert found["etc"] == "drwxr-xr-x root/root"
    private, opened, suid, alone = made.notes
    assert private.startswith("for root alone, as not all may read it here: etc/key, etc/shared")
    assert opened == "open to all in the image, and not here: etc/private"
    assert suid == "without its set-user-ID or set-group-ID bit: etc/suid"
    assert "mode 0600" in alone
    assert stat.S_IMODE(os.stat("web_1.4.raw").st_mode) == 0o600


@root
def test_a_group_that_could_read_a_file_is_named() -> None:
    os.chown(put("web/etc/key", mode=0o640), 0, 4)
    assert "etc/key (here for group adm, too)" in make("web").notes[0]
    os.chown("web/etc/key", 0, 54321)
    os.chmod("web/etc/key", 0o640)
    assert "etc/key (here for group 54321, too)" in make("web").notes[0]


def test_an_image_that_all_may_read_has_the_mode_that_the_umask_gives() -> None:
    put("web/etc/web.conf")
    make("web")
    umask = os.umask(0o22)
    os.umask(umask)
    assert stat.S_IMODE(os.stat("web_1.4.raw").st_mode) == 0o666 & ~umask


@root
def test_what_hides_something_by_an_attribute_is_refused() -> None:
    put("web/etc/x.d/x")
    os.setxattr("web/etc/x.d", "trusted.overlay.opaque", b"y")
    with pytest.raises(Refused, match=r"web/etc/x.d has the extended attribute trusted\.overlay\.opaque"):
        make("web")


@pytest.mark.parametrize("size", [IMAGE_MAX + 1, 1 << 41])
def test_more_than_an_image_may_have_is_refused_before_it_is_read(size: int) -> None:
    put("web/etc/large")
    os.truncate("web/etc/large", size)
    with pytest.raises(
        Refused,
        match=rf"^too large: {size} bytes, {IMAGE_MAX} are allowed \(ImageMax=\), with web/etc/large$",
    ):
        make("web")


def test_a_directory_where_the_release_file_belongs_is_named() -> None:
    put("web/etc/extension-release.d/extension-release.web/x")
    with pytest.raises(
        Refused, match=r"^etc/extension-release.d/extension-release.web is a directory, and must"
    ):
        make("web")


def test_names_of_one_large_file_count_each() -> None:
    put("web/etc/0", "x" * 1000)
    for number in range(1, 10):
        os.link("web/etc/0", f"web/etc/{number}")
    with pytest.raises(Refused, match=r"too large: 10000 bytes, 9999 are allowed"):
        make("web", image_max=9999)


def test_a_file_that_is_being_written_is_not_taken() -> None:
    said = r"web/etc/web.conf: open for writing: try again when it is written"
    with put("web/etc/web.conf").open("a"), pytest.raises(Busy, match=said):
        make("web")
    make("web")


def as_nobody(directory: str, *words: str) -> tuple[int, str]:
    """Exit status of a command in a directory that all may write to, and what it printed."""
    os.chmod(directory, 0o777)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            become_nobody()
            os.chdir(directory)
            os.environ |= {"TMPDIR": directory, "HOME": directory, "XDG_CONFIG_HOME": directory}
            tempfile.tempdir = None
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = main.main(words)
            os.write(write, said.getvalue().encode())
        finally:
            os._exit(status)
    os.close(write)
    with open(read, encoding="utf-8") as answer:
        output = answer.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


@root
def test_what_cannot_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        put(f"{directory}/etc/x/key", mode=0o600)
        answer = as_nobody(directory, "build", "etc/x", "-o", "web.raw")
        assert answer == (1, "confext-watcher: etc/x/key cannot be read: Permission denied\n")
        assert os.listdir(directory) == ["etc"]


@root
@pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=tool("mkfs.erofs"))])
def test_it_needs_no_root_and_root_makes_the_same(fstype: str) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        put(f"{directory}/web/etc/web.conf")
        status, said = as_nobody(directory, "build", "web", "-o", "web_1.raw", "--format", fstype)
        assert said.startswith(f"web_1.raw: good: web 1, {fstype}, ") and status == 0
        make(f"{directory}/web", output="web_1.raw", format=fstype)
        assert digest(Path("web_1.raw")) == digest(Path(directory, "web_1.raw"))


# --- the same bytes ---


@pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=tool("mkfs.erofs"))])
def test_the_same_content_is_the_same_image(fstype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file system, the time, the owner, and the way in which the files came there."""
    names = [f"f{number}" for number in range(60)] + ["new\nline", os.fsdecode(b"\xff"), "-dash", "ä"]
    for where, order in (("one", names), ("two", names[::-1])):
        for name in order:
            put(f"{where}/etc/d/{name}", f"{len(name)} lines\n" * 500)
        Path(where, "etc/l").symlink_to("d/f1")
    put("one/etc/zeros", "\0" * 300_000 + "x")
    put("two/etc/zeros", "x", mode=0o664)
    with open("two/etc/zeros", "r+b") as file:
        file.truncate(0)
        file.seek(300_000)
        file.write(b"x")
    put("one/etc/copy", "5 lines\n" * 9)
    put("one/etc/again", "5 lines\n" * 9)
    put("two/etc/copy", "5 lines\n" * 9)
    os.link("two/etc/copy", "two/etc/again")
    os.utime("two/etc/d", (5, 5))
    if os.geteuid() == 0:
        for path in Path("two").rglob("*"):
            os.chown(path, 1000, 1000, follow_symlinks=False)
    make("one", format=fstype)
    first = digest(Path("web_1.4.raw"))
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("LANG", "C")
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(affinity)})
    try:
        make("two", format=fstype)
    finally:
        os.sched_setaffinity(0, affinity)
    assert digest(Path("web_1.4.raw")) == first
    put("two/etc/copy", "6 lines\n" * 9)
    make("two", format=fstype)
    assert digest(Path("web_1.4.raw")) != first


@pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=tool("mkfs.erofs"))])
def test_all_times_are_1_or_that_of_source_date_epoch(fstype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put("web/etc/web.conf")

    def times() -> set[int]:
        tree = unpacked("web_1.4.raw", fstype=fstype)
        return {int(path.stat().st_mtime) for path in (tree, *tree.rglob("*"))}

    make("web", format=fstype)
    if fstype == "squashfs":  # fsck.erofs 1.5 unpacks none
        assert times() == {1}
    first = digest(Path("web_1.4.raw"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    make("web", format=fstype)
    if fstype == "squashfs":
        assert times() == {1700000000}
    assert digest(Path("web_1.4.raw")) != first


@pytest.mark.parametrize("value", ["", "-1", "now", "4294967296", "1.5", "9" * 30, "1\n"])
def test_a_wrong_source_date_epoch_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put("web/etc/web.conf")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(Refused, match="must be seconds since 1970, 4294967295 at most"):
        make("web")


NAMES = st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name)
NODES = st.one_of(st.binary(max_size=300), st.none())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(NAMES, st.one_of(NODES, st.dictionaries(NAMES, NODES, max_size=4)), max_size=6)
)
def test_odd_names_come_through(entries: dict[bytes, object]) -> None:
    """Files, links (None) and directories by names of any bytes; what is left out is what the watcher leaves out."""
    shutil.rmtree("odd", ignore_errors=True)
    wanted: dict[bytes, object] = {}

    def grow(at: bytes, below: tuple[bytes, ...], some: dict[bytes, object], counts: bool) -> None:
        os.makedirs(at)
        for name, node in some.items():
            if name in (b".", b"..") or name.startswith(b"extension-release.d"):
                continue
            path = (*below, name)
            kept = counts and is_content(tuple(map(os.fsdecode, path)))
            if isinstance(node, dict):
                grow(at + b"/" + name, path, node, kept)
            elif node is None:
                os.symlink(b"to" + name, at + b"/" + name)
            else:
                with open(at + b"/" + name, "wb") as file:
                    file.write(node)  # type: ignore[arg-type]
            if kept:
                wanted[b"/".join(path)] = {} if isinstance(node, dict) else node

    grow(b"odd/etc", (b"etc",), entries, True)
    made = make("odd")
    assert made.examined is not None
    tree = os.fsencode(unpacked("web_1.4.raw"))
    found: dict[bytes, object] = {}
    for top, directories, files in os.walk(tree):
        for name in directories + files:
            full = top + b"/" + name
            path = os.path.relpath(full, tree)
            if os.path.islink(full):
                assert os.readlink(full) == b"to" + name
                found[path] = None
            elif os.path.isdir(full):
                found[path] = {}
            else:
                with open(full, "rb") as file:
                    found[path] = file.read()
    found = {
        path: node for path, node in found.items() if b"extension-release.d" not in path and path != b"etc"
    }
    assert found == wanted


def test_a_tree_that_is_too_deep_is_refused_and_one_that_is_empty_is_not() -> None:
    Path("deep/etc", *["d"] * 70).mkdir(parents=True)
    with pytest.raises(Refused, match="nested too deeply"):
        make("deep")
    Path("empty/etc").mkdir(parents=True)
    assert make("empty").examined


def test_a_path_that_is_longer_than_a_system_call_takes_is_not_half_an_image() -> None:
    """Each name is short enough, and the walk goes by descriptor; the tool does not."""
    here = os.open(".", os.O_RDONLY)
    try:
        os.makedirs("long/etc")
        os.chdir("long/etc")
        for _ in range(20):
            os.mkdir("n" * 250)
            os.chdir("n" * 250)
        put("x")
        os.fchdir(here)
        with pytest.raises(Refused, match="mksquashfs failed with exit status 1: "):
            make("long")
    finally:
        os.fchdir(here)
        os.close(here)
        subprocess.run(["rm", "-rf", "long"], check=True)
    assert not Path("web_1.4.raw").exists()


# --- name and version ---


@pytest.mark.parametrize(
    ("output", "name", "version", "path"),
    [
        ("web_1.4.raw", "", "", "web_1.4.raw"),
        ("web_1.4.raw", "web", "1.4", "web_1.4.raw"),
        ("web_1.4+3.raw", "", "", "web_1.4+3.raw"),
        ("web_1.4+3.raw", "", "1.4", "web_1.4+3.raw"),
        ("web.raw", "", "", "web.raw"),
        ("", "web", "", "web.raw"),
        ("", "web", "2~rc1", "web_2~rc1.raw"),
        ("out", "web", "2", "out/web_2.raw"),
        ("out/", "web", "2", "out/web_2.raw"),
        ("out/web.raw.v", "", "2", "out/web.raw.v/web_2.raw"),
        ("out/web.raw.v/", "web", "2", "out/web.raw.v/web_2.raw"),
        ("out/web.raw.v/web_2.raw", "", "", "out/web.raw.v/web_2.raw"),
        ("web.confext.raw", "", "", "web.confext.raw"),
    ],
)
def test_name_and_version_come_from_where_they_are(output: str, name: str, version: str, path: str) -> None:
    Path("out/web.raw.v").mkdir(parents=True)
    put("web/etc/web.conf")
    made = make("web", output=output, name=name, version=version)
    assert made.path == path and Path(path).is_file()
    assert RELEASE in listed(path)


@pytest.mark.parametrize(
    ("output", "name", "version", "said"),
    [
        ("web_1.4", "", "", "web_1.4: it would not be looked at: its name does not end in .raw"),
        (".web.raw", "", "", ".web.raw: it would not be looked at: called like a copy in progress, or hidden"),
        ("web_1.4.raw", "app", "", "web_1.4.raw is an image of the name web, and not app (--name)"),
        ("web_1.4.raw", "", "1.5", "web_1.4.raw has version 1.4, and not 1.5 (--version)"),
        ("web.raw", "", "1.5", "web.raw has no version, and not 1.5 (--version)"),
        ("", "web", "1.4!", "web_1.4!.raw has no version, and not 1.4! (--version): letters, digits and -.~^"),
        ("_1.raw", "", "", "_1.raw has no name before the version"),
        ("", "", "1", "how is it to be called? `-o NAME_VERSION.raw`, or --name and --version"),
        ("out/web.raw.v", "", "", "out/web.raw.v is a directory of versions: --version is missing"),
        ("out/web.raw.v", "app", "1", "app_1.raw: it would not be looked at"),
        ("out/web.raw.v/web.raw", "", "", "web.raw: it would not be looked at"),
        ("", "a/b", "1", "a/b_1.raw: a name has no / in it"),
        ("", "a_b", "1", "a_b_1.raw is an image of the name a, and not a_b (--name)"),
    ],
)  # fmt: skip
def test_a_name_by_which_it_would_not_count_is_refused(
    output: str, name: str, version: str, said: str
) -> None:
    Path("out/web.raw.v").mkdir(parents=True)
    put("web/etc/web.conf")
    with pytest.raises(Refused, match=re.escape(said)):
        make("web", output=output, name=name, version=version)


# --- what it is made for ---


@pytest.mark.parametrize(
    ("made_for", "scope", "text", "note"),
    [
        ("", (), "ID=_any\n", ""),
        ("any", ("system", "portable"), 'ID=_any\nCONFEXT_SCOPE="system portable"\n', ""),
        ("plan9:4", (), "ID=plan9\nVERSION_ID=4\n", "it would be refused on this host: made for ID=plan9"),
        ("plan9", (), "ID=plan9\n", "it would be refused on this host: made for ID=plan9"),
    ],
)
def test_the_release_file_says_what_it_is_made_for(
    made_for: str, scope: tuple[str, ...], text: str, note: str
) -> None:
    put("web/etc/web.conf")
    made = make("web", made_for=made_for, scope=scope)
    assert (unpacked("web_1.4.raw") / RELEASE).read_text() == text
    assert "".join(made.notes).startswith(note) and bool(made.notes) is bool(note)
    assert made.examined


def test_for_host_is_this_one() -> None:
    put("web/etc/web.conf")
    assert make("web", made_for="host").notes == ()
    said = (unpacked("web_1.4.raw") / RELEASE).read_text()
    source = '. /etc/os-release; echo ID=$ID; test -z "$VERSION_ID" || echo VERSION_ID=$VERSION_ID'
    assert said == subprocess.run(["sh", "-c", source], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("made_for", ["debian:", "debian:13\nX=y", ":13", "any:13", "a b", "$(x)"])
def test_what_no_release_file_could_say_is_refused(made_for: str) -> None:
    put("web/etc/web.conf")
    if made_for == "debian:":
        make("web", made_for=made_for)
        assert (unpacked("web_1.4.raw") / RELEASE).read_text() == "ID=debian\n"
        return
    with pytest.raises(Refused, match="--for "):
        make("web", made_for=made_for)


def test_a_release_file_of_its_own_is_kept() -> None:
    confext(Path("web"), "web", release="ID=plan9\nVERSION_ID=4\nX=y\n")
    (note,) = make("web").notes
    assert note.startswith("it would be refused on this host: made for ID=plan9")
    assert (unpacked("web_1.4.raw") / RELEASE).read_text() == "ID=plan9\nVERSION_ID=4\nX=y\n"
    with pytest.raises(
        Refused, match=r"extension-release\.web is in it already: remove that, or leave out --for"
    ):
        make("web", made_for="any")


def test_what_check_would_refuse_is_not_put_in_place() -> None:
    confext(Path("web"), "web", release="VERSION_ID=4\n")
    put("web_1.4.raw", "the one before")
    with pytest.raises(Refused, match=r"web_1\.4\.raw is not written, it would be refused: .* has no ID="):
        make("web")
    assert Path("web_1.4.raw").read_text() == "the one before"


# --- in place ---


def test_what_was_there_is_replaced_by_a_rename() -> None:
    put("web/etc/web.conf")
    before = put("web_1.4.raw", "the one before")
    os.symlink(before, "web_1.5.raw")
    with before.open() as kept:
        make("web")
        make("web", output="web_1.5.raw")
        assert kept.read() == "the one before"
    assert not Path("web_1.5.raw").is_symlink()


def test_files_beside_it_that_were_made_for_another_image_are_pointed_out() -> None:
    """They count from the moment on when the image is there."""
    put("web/etc/web.conf")
    put("web_1.4.verity")
    put("web_1.4.roothash")
    (note,) = make("web").notes
    assert (
        note
        == "beside it is web_1.4.verity, web_1.4.roothash: that has to be of this very image, or it is refused"
    )


def test_a_directory_that_is_not_there_is_said_before_anything_is_done() -> None:
    put("web/etc/web.conf")
    with pytest.raises(FileNotFoundError) as error:
        make("web", output="none/web_1.4.raw")
    assert error.value.filename == "none"


@pytest.mark.parametrize(("fstype", "program", "package"), [
    ("squashfs", "mksquashfs", "squashfs-tools"),
    ("erofs", "mkfs.erofs", "erofs-utils"),
    ("ddi", "systemd-repart", "systemd-repart"),
])  # fmt: skip
def test_a_tool_that_is_missing_is_named_with_its_package(
    fstype: str, program: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("web/etc/web.conf")
    found = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path: None if name == program else found(name, path=path)
    )
    with pytest.raises(Busy, match=rf"^{program} is not installed: apt install {package}$"):
        make("web", format=fstype)
    assert not Path("web_1.4.raw").exists()


def test_a_tool_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tools, "_run", lambda *_: "systemd 252 (252.38-1~deb12u1)\n+PAM\n")
    with pytest.raises(
        Busy, match=r"^systemd-repart is too old for disk images: systemd 252 \(.*255 or newer"
    ):
        build_tools.disk("content", "target", 1, "", "")


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 16384, 16385, 70000])
@tool("veritysetup")
def test_a_hash_tree_is_as_large_as_veritysetup_makes_it(blocks: int) -> None:
    with open("data", "wb") as file:
        file.truncate(blocks * 4096)
    subprocess.run(["veritysetup", "format", "data", "tree"], check=True, capture_output=True)
    assert build_tools._hash_tree_size(blocks * 4096) == max(os.path.getsize("tree"), 8192)


# --- the command ---


def test_it_prints_what_check_says(capsys: pytest.CaptureFixture[str]) -> None:
    put("web/etc/web.conf")
    put("web/etc/web.conf~")
    assert main.main(["build", "web", "-o", "web_1.4.raw"]) == 0
    built = capsys.readouterr().out.splitlines()
    assert main.main(["check", "web_1.4.raw"]) == 0
    assert built[:-1] == capsys.readouterr().out.splitlines()
    assert built[0].startswith("web_1.4.raw: good: web 1.4, squashfs, 4096 bytes, sha256 ")
    assert built[-1].startswith("web_1.4.raw: note: left out, as editors")


def test_json_is_that_of_check_with_notes(capsys: pytest.CaptureFixture[str]) -> None:
    put("web/etc/web.conf")
    put("web/etc/web.conf~")
    assert main.main(["build", "--json", "web", "-o", "web_1.4.raw"]) == 0
    (built,) = json.loads(capsys.readouterr().out)["images"]
    assert main.main(["check", "--json", "web_1.4.raw"]) == 0
    (checked,) = json.loads(capsys.readouterr().out)["images"]
    assert len(built.pop("notes")) == 1
    assert built == checked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sign", "k"], "--sign and --certificate go together"),
        (["--certificate", "k"], "--sign and --certificate go together"),
        (
            ["--sign", "k", "--certificate", "c", "--format", "erofs"],
            "only a disk image has a signature in it",
        ),
        (["--scope", "system,world"], "--scope world: must be of system, initrd, portable"),
    ],
)
def test_options_that_do_not_go_together(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put("web/etc/web.conf")
    assert main.main(["build", "web", "-o", "web_1.4.raw", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    put("web/etc/web.conf")
    assert (
        main.main(["build", "web", "-o", "web_1.raw", "--sign", "none.key", "--certificate", "none.crt"]) == 1
    )
    assert capsys.readouterr().err == "confext-watcher: none.key: No such file or directory\n"


def test_it_is_made_where_it_cannot_be_checked_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(*_: object) -> None:
        raise Busy("no loop device is to be had")

    monkeypatch.setattr(build, "examine", busy)
    put("web/etc/web.conf")
    assert main.main(["build", "web", "-o", "web_1.raw"]) == 0
    assert capsys.readouterr().out == "web_1.raw: made, and not checked: no loop device is to be had\n"
    assert Path("web_1.raw").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_nothing_is_left_of_one_that_is_ended(number: int, place: Path) -> None:
    """The fixture looks: what it was making may have keys in it."""
    put("web/etc/random").write_bytes(os.urandom(60 << 20))
    process = subprocess.Popen(
        [sys.executable, "-m", "watcher", "build", "web", "-o", "web_1.raw"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    scratch = Path(os.environ["TMPDIR"])
    while not any(path.stat().st_size for path in scratch.glob("*/made/*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not Path("web_1.raw").exists()
