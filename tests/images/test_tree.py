# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy of a tree is faithful, shows one moment of it, and its digest stands for all of its content.

The limits: images/walk.py.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.images import confext
from support.needs import root, userns
from watcher import model
from watcher.images import tree, walk
from watcher.images.extension import STRICT_XATTR, read_release
from watcher.model import Busy, Refused

RELEASE = "etc/extension-release.d/extension-release.web"
ODD = [
    "with space",
    "quote'\"",
    "new\nline",
    "back\\slash",
    "colon:comma,",
    "-dash",
    os.fsdecode(b"caf\xe9\xff"),
]


@contextmanager
def directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def digest(path: Path) -> str:
    with directory(path) as fd:
        return tree.digest(fd)


def signature(path: Path) -> tree.Signature:
    with directory(path) as fd:
        return tree.signature(fd)


def copied(source: Path, target: Path) -> str:
    target.mkdir()
    with directory(source) as fd, directory(target) as made:
        return tree.copy(fd, made, 1 << 30)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    files = {"etc/web.conf": b"x = 1\n", "etc/empty": b"", "etc/web.d/large": os.urandom(3_000_000)}
    made = confext(tmp_path / "source", "web", files)
    (made / "etc/link").symlink_to("web.conf")
    (made / "etc/dangling").symlink_to("/nowhere")
    return made


def facts(base: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything about every node that a copy must have too, by its path."""
    found: dict[bytes, tuple[object, ...]] = {}
    for path in [base, *base.rglob("*")]:
        st = path.lstat()
        name = os.fsencode(path.relative_to(base))
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if not key.startswith(("user.extension-release", "user.confext-watcher"))
        }
        content: object = None
        if stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            content = path.read_bytes()
        found[name] = st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns, xattrs, content
    return found


def test_the_copy_is_the_same_in_everything(source: Path, tmp_path: Path) -> None:
    (source / "etc/web.conf").chmod(0o4750)
    (source / "etc/web.d").chmod(0o1711)
    os.utime(source / "etc/web.conf", ns=(1, 1_000_000_001))
    os.setxattr(source / "etc/web.conf", "user.note", b"\x00\xff")
    os.setxattr(source / "etc/web.d", "user.empty", b"")
    copy = copied(source, tmp_path / "copy")
    files = [path for path in (tmp_path / "copy").rglob("*") if path.is_file() and not path.is_symlink()]
    assert facts(tmp_path / "copy") == facts(source)
    assert copy == digest(source) == digest(tmp_path / "copy")
    assert sum(path.stat().st_size for path in files) == 3_000_000 + len("x = 1\n") + len("ID=_any\n")


@root
def test_what_only_root_can_keep(source: Path, tmp_path: Path) -> None:
    for path, owner in (("etc/web.conf", 12345), ("etc/web.d", 777), ("etc/link", 4711)):
        os.chown(source / path, owner, owner + 1, follow_symlinks=False)
    (source / "etc/web.conf").chmod(0o6755)  # after chown, which clears it
    os.setxattr(source / "etc/web.d", "trusted.overlay.opaque", b"y")
    os.setxattr(source / "etc/link", "trusted.note", b"on the link itself", follow_symlinks=False)
    capability = bytes.fromhex(
        "0100000200040000000000000000000000000000"
    )  # cap_net_bind_service=ep, VFS_CAP_REVISION_2
    os.setxattr(source / "etc/empty", "security.capability", capability)
    (source / "etc/none").write_bytes(b"unreadable for others")
    (source / "etc/none").chmod(0)
    copied(source, tmp_path / "copy")
    assert facts(tmp_path / "copy") == facts(source)
    assert "security.capability" in os.listxattr(tmp_path / "copy/etc/empty")
    assert digest(tmp_path / "copy") == digest(source)


@pytest.mark.parametrize("name", ODD)
def test_odd_names(source: Path, tmp_path: Path, name: str) -> None:
    (source / "etc" / name).mkdir()
    (source / "etc" / name / name).write_bytes(b"1")
    (source / "etc" / name / "link").symlink_to(name)
    copied(source, tmp_path / "copy")
    assert facts(tmp_path / "copy") == facts(source)


def test_posix_acls(source: Path, tmp_path: Path) -> None:
    # version 2; user::rw-, user:me:r--, group::r--, mask::r--, other::---
    entries = [
        (1, 6, 0xFFFFFFFF),
        (2, 4, os.getuid()),
        (4, 4, 0xFFFFFFFF),
        (16, 4, 0xFFFFFFFF),
        (32, 0, 0xFFFFFFFF),
    ]
    acl = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, rights, who in entries
    )
    os.setxattr(source / "etc/web.conf", "system.posix_acl_access", acl)
    copied(source, tmp_path / "copy")
    assert facts(tmp_path / "copy") == facts(source)
    assert os.getxattr(tmp_path / "copy/etc/web.conf", "system.posix_acl_access") == acl


def test_hard_links_stay_hard_links(source: Path, tmp_path: Path) -> None:
    before = digest(source)
    (source / "etc/twin").hardlink_to(source / "etc/web.d/large")
    (source / "etc/web.d/third").hardlink_to(source / "etc/web.d/large")
    copied(source, tmp_path / "copy")
    inodes = {(tmp_path / "copy/etc" / name).stat().st_ino for name in ("web.d/large", "twin", "web.d/third")}
    assert len(inodes) == 1
    assert facts(tmp_path / "copy") == facts(source)
    (source / "etc/twin").unlink()
    (source / "etc/web.d/third").unlink()
    assert digest(source) == before


def test_a_link_to_a_file_outside_of_the_tree_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"shared")
    (source / "etc/inside").hardlink_to(tmp_path / "outside")
    copied(source, tmp_path / "copy")
    assert (tmp_path / "copy/etc/inside").stat().st_nlink == 1


def test_hard_links_do_not_change_the_digest(source: Path) -> None:
    (source / "etc/a").write_bytes(b"same")
    (source / "etc/b").write_bytes(b"same")
    before = digest(source)
    (source / "etc/b").unlink()
    (source / "etc/b").hardlink_to(source / "etc/a")
    assert digest(source) == before


@pytest.mark.parametrize(
    "layout", [("hole",), ("data", "hole"), ("hole", "data"), ("data", "hole", "data", "hole")]
)
def test_holes_stay_holes(source: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    part = 5 << 20
    sparse = source / "etc/sparse"
    with sparse.open("wb") as file:
        for number, kind in enumerate(layout):
            if kind == "data":
                file.seek(number * part)
                file.write(os.urandom(70_000))
        file.truncate(len(layout) * part + 1)
    copied(source, tmp_path / "copy")
    twin = tmp_path / "copy/etc/sparse"
    assert twin.read_bytes() == sparse.read_bytes()
    assert twin.stat().st_blocks <= sparse.stat().st_blocks + 16
    before = digest(source)
    content = sparse.read_bytes()
    sparse.unlink()
    sparse.write_bytes(content)
    assert digest(source) == before


Change = Callable[[Path], object]

CHANGES: dict[str, Change] = {
    "content": lambda etc: (etc / "web.conf").write_bytes(b"x = 2\n"),
    "length": lambda etc: (etc / "web.conf").write_bytes(b"x = 1\n\0"),
    "mode": lambda etc: (etc / "web.conf").chmod(0o600),
    "directory mode": lambda etc: (etc / "web.d").chmod(0o700),
    "name": lambda etc: (etc / "web.conf").rename(etc / "web.conf2"),
    "place": lambda etc: (etc / "web.conf").rename(etc / "web.d/web.conf"),
    "new file": lambda etc: (etc / "new").touch(),
    "new directory": lambda etc: (etc / "new").mkdir(),
    "removal": lambda etc: (etc / "empty").unlink(),
    "link target": lambda etc: ((etc / "link").unlink(), (etc / "link").symlink_to("empty")),
    "attribute": lambda etc: os.setxattr(etc / "web.conf", "user.note", b"1"),
    "strictness": lambda etc: os.setxattr(etc.parent / RELEASE, STRICT_XATTR, b"0"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_the_content_changes_digest_and_signature(source: Path, change: Change) -> None:
    (source / "etc/web.conf").chmod(0o644)
    before = digest(source), signature(source).key
    tree.wait_for_clock(signature(source))
    change(source / "etc")
    after = digest(source), signature(source).key
    assert before[0] != after[0]
    assert before[1] != after[1]


@root
@pytest.mark.parametrize("ids", [(1, -1), (-1, 1)])
def test_owners_count(source: Path, ids: tuple[int, int]) -> None:
    before = digest(source)
    os.chown(source / "etc/web.conf", *ids)
    assert digest(source) != before


def test_times_do_not_count_for_the_digest(source: Path) -> None:
    before = digest(source)
    os.utime(source / "etc/web.conf", (1, 1))
    assert digest(source) == before


def test_content_cannot_pass_for_structure(tmp_path: Path) -> None:
    """Two trees whose names and contents are the same bytes, cut differently."""
    for number, files in enumerate(
        ({"ab": b"c"}, {"a": b"bc"}, {"a": b"", "bc": b""}, {"a": b"b", "c": b""})
    ):
        (tmp_path / str(number) / "etc").mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / str(number) / "etc" / name).write_bytes(content)
    assert len({digest(tmp_path / str(number)) for number in range(4)}) == 4


def test_the_digest_is_what_the_module_says(tmp_path: Path) -> None:
    """Spelled out once more by hand: it must never change, or every stored copy is orphaned."""
    top = tmp_path / "top"
    etc = top / "etc"
    etc.mkdir(parents=True)
    for made in (top, etc):
        made.chmod(0o755)
    (etc / "b").symlink_to("to")
    (etc / "a").write_bytes(b"text")
    (etc / "a").chmod(0o640)
    os.setxattr(etc / "a", "user.k", b"v")
    me = os.getuid().to_bytes(4, "little") + os.getgid().to_bytes(4, "little")

    def number(value: int, size: int = 8) -> bytes:
        return value.to_bytes(size, "little")

    def string(value: bytes) -> bytes:
        return number(len(value)) + value

    stream = b"confext-watcher tree 1\n"
    stream += b"d" + number(0o755, 4) + me + number(0) + number(1) + string(b"etc")
    stream += b"d" + number(0o755, 4) + me + number(0) + number(2)
    stream += string(b"a") + b"f" + number(0o640, 4) + me + number(1) + string(b"user.k") + string(b"v")
    stream += string(b"text")
    stream += string(b"b") + b"l" + number(0o777, 4) + me + number(0) + string(b"to")
    assert digest(top) == hashlib.sha256(stream).hexdigest()


@pytest.mark.parametrize("source_says", [None, b"0", b"1"])
def test_release_files_of_the_copy_go_under_any_name(
    source: Path, tmp_path: Path, source_says: bytes | None
) -> None:
    if source_says is not None:
        os.setxattr(source / RELEASE, STRICT_XATTR, source_says)
    copied(source, tmp_path / "copy")
    assert os.getxattr(tmp_path / "copy" / RELEASE, STRICT_XATTR) == b"0"
    assert digest(tmp_path / "copy") == digest(source)
    with directory(tmp_path / "copy") as copy, directory(source) as original:
        assert read_release(copy) == read_release(original)  # but what the author wanted is still known


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (os.mkfifo, "FIFO"),
        (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "socket"),
        pytest.param(
            lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)), "device", marks=root
        ),
        pytest.param(
            lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 0)), "device", marks=root
        ),
    ],
    ids=["fifo", "socket", "character", "block"],
)
def test_what_no_tree_may_hold(source: Path, tmp_path: Path, make: Callable[[Path], None], word: str) -> None:
    make(source / "etc/web.d/sp ecial\n")
    for run in (
        lambda: signature(source),
        lambda: digest(source),
        lambda: copied(source, tmp_path / "copy"),
    ):
        with pytest.raises(Refused, match=rf"^etc/web.d/sp ecial\\n in it is a {word}: remove it$"):
            run()


def test_links_are_never_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    (source / "etc/away").symlink_to(tmp_path / "outside")
    (source / "etc/loop").symlink_to("loop")
    copied(source, tmp_path / "copy")
    assert os.readlink(tmp_path / "copy/etc/away") == str(tmp_path / "outside")
    assert os.readlink(tmp_path / "copy/etc/loop") == "loop"


@pytest.mark.parametrize("becomes", ["link", "other file", "fifo", "nothing"])
def test_what_changes_between_two_looks_is_busy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """The file that was seen is swapped for something else just before it is opened."""
    (tmp_path / "secret").write_bytes(b"secret")
    path = source / "etc/web.conf"
    real = os.open

    def swapped(name: str, flags: int, *arguments: int, **where: int) -> int:
        if name == "web.conf" and not flags & os.O_CREAT:
            path.rename(tmp_path / "before")  # kept, so that its inode is not the next one's
            if becomes == "link":
                path.symlink_to(tmp_path / "secret")
            elif becomes == "other file":
                path.write_bytes(b"x = 2\n")
            elif becomes == "fifo":
                os.mkfifo(path)
        return real(name, flags, *arguments, **where)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(Busy, match=r"etc/web.conf in it changed"):
        copied(source, tmp_path / "copy")


def test_a_hard_link_too_far_down_for_a_path_is_a_file(source: Path, tmp_path: Path) -> None:
    parent = os.open(source, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("a" * 250, dir_fd=parent)
        child = os.open("a" * 250, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.link(source / "etc/web.conf", "twin", dst_dir_fd=parent)
    os.close(parent)
    assert copied(source, tmp_path / "copy") == digest(tmp_path / "copy")
    assert (tmp_path / "copy/etc/web.conf").stat().st_nlink == 1


def test_too_deep(source: Path) -> None:
    deep = source.joinpath("etc", *["d"] * (model.DEPTH_MAX - 2))
    deep.mkdir(parents=True)
    signature(source)
    (deep / "d").mkdir()
    with pytest.raises(Refused, match=f"nested too deeply: {model.DEPTH_MAX} levels"):
        signature(source)


def test_too_many_entries(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ENTRIES_MAX", 9)
    signature(source)
    (source / "etc/one more").touch()
    with pytest.raises(Refused, match="more than 9 entries"):
        signature(source)


def test_somebody_writing_in_it_is_busy(source: Path, tmp_path: Path) -> None:
    with (
        (source / "etc/web.d/large").open("ab"),
        pytest.raises(Busy, match=r"etc/web.d/large in it: open for writing"),
    ):
        copied(source, tmp_path / "copy")


def test_growing_beyond_what_was_seen_is_busy(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with directory(source) as fd, directory(tmp_path / "copy") as made, pytest.raises(Busy, match="grew"):
        tree.copy(fd, made, 2_000_000)


def test_a_change_right_after_the_copy_began_shows_in_the_signature(source: Path) -> None:
    """Not even within one tick of the clock: a thousand times as fast as can be."""
    path = source / "etc/web.conf"
    for number in range(300):
        before = signature(source)
        tree.wait_for_clock(before)
        path.write_bytes(b"x = %d\n" % (number % 10))  # always the same size
        assert signature(source).key != before.key


ALONE = """
import os, sys
sys.path[:0] = %r
from watcher.images import tree
from watcher.records import durable
source, target = sys.argv[1:]
os.mkdir(target)
a, b = (os.open(path, os.O_RDONLY) for path in (source, target))
copy = tree.copy(a, b, 1 << 30)
durable.fsync_tree(b, 100)
assert copy == tree.digest(a)
os.mkdir(target + ".parent")
os.rename(target, target + ".parent/x")
again = os.open(target + ".parent", os.O_RDONLY)
for line in sorted(os.listdir(target + ".parent/x/etc")):
    st = os.lstat(target + ".parent/x/etc/" + line)
    print(line, oct(st.st_mode), st.st_uid)
durable.remove("x", again)
assert os.listdir(again) == []
"""


def in_user_namespace(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As the root of a user namespace that knows no other user: neither CAP_CHOWN nor CAP_DAC_OVERRIDE help there."""
    program = [sys.executable, "-S", "-c", ALONE % sys.path, source, target]
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", *program], check=False, capture_output=True, text=True
    )


@root
@userns
def test_in_a_user_namespace_what_the_kernel_forbids_is_left_out(source: Path, tmp_path: Path) -> None:
    os.chown(source / "etc/web.conf", 4711, 4711)
    (source / "etc/web.conf").chmod(0o6044)
    os.chown(source / "etc/web.d", 4711, 4711)
    os.chown(source / "etc/link", 4711, 4711, follow_symlinks=False)
    os.setxattr(source / "etc/empty", "trusted.note", b"1")
    done = in_user_namespace(source, tmp_path / "copy")
    assert done.stderr == ""
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["web.conf"] == "0o100444 0"  # ours now, so readable for us, and no set-id program of ours
    assert lines["web.d"] == "0o40755 0"
    assert lines["link"] == "0o120777 0"
    assert lines["empty"] == "0o100644 0"


@root
@userns
def test_an_unreadable_file_is_refused(source: Path, tmp_path: Path) -> None:
    os.chown(source / "etc/web.conf", 4711, 4711)
    (source / "etc/web.conf").chmod(0o600)
    done = in_user_namespace(source, tmp_path / "copy")
    assert "Refused: etc/web.conf in it cannot be read: Permission denied" in done.stderr


@userns
def test_without_root_a_directory_without_write_permission_can_be_removed(
    source: Path, tmp_path: Path
) -> None:
    for path in (source / "etc/web.d", source / "etc"):
        path.chmod(0o500)
    done = in_user_namespace(source, tmp_path / "copy")
    assert done.stderr == ""
    (source / "etc").chmod(0o700)
