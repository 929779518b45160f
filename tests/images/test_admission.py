# SPDX-License-Identifier: LGPL-2.1-or-later
"""A candidate becomes a copy, or one clear line; nothing is read twice. (Covers images/opened.py, images/made_for.py
and images/copy_release.py, too.)"""

from __future__ import annotations

import codecs
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.images import FORMATS, confext, image, noise
from support.needs import loop, root, tool, userns
from watcher.images import copy_release, originals, tree
from watcher.images import opened as opening
from watcher.images.admission import Admission, copied
from watcher.images.extension import Release, read_release
from watcher.images.formats.squashfs import Squashfs
from watcher.images.made_for import host
from watcher.images.store import Store
from watcher.model import Busy, Candidate, Copy, Incomplete, Kind, Later, Layer, Refused
from watcher.mounts import workers as workers_module
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers
from watcher.watch.lease import coarse_now_ns

squashfs = tool("mksquashfs")
erofs = tool("mkfs.erofs")
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return confext(tmp_path / "web", "web", {"etc/web.conf": b"x = 1\n", "etc/noise": noise(100_000)})


@pytest.fixture
def raw(source: Path) -> Path:
    return settled(image(source, source.parent / "web.raw"))


def candidate(path: Path | str, kind: Kind = Kind.IMAGE) -> Candidate:
    return Candidate(os.fspath(path), os.path.basename(path), "web", "", kind)


def settled(path: Path) -> Path:
    """Wait until the file's times lie in the past, as they do after the quiet time."""
    with open(path, "rb") as file:
        st = os.fstat(file.fileno())
    while coarse_now_ns() <= st.st_ctime_ns:
        pass
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each time that content is looked into."""
    found: list[int] = []
    probe, copy = originals.probe, tree.copy
    monkeypatch.setattr(originals, "probe", lambda fd, size: (found.append(fd), probe(fd, size))[1])
    monkeypatch.setattr(tree, "copy", lambda *args: (found.append(args[0]), copy(*args))[1])
    return found


@pytest.mark.parametrize(
    "fstype", [pytest.param("squashfs", marks=squashfs), pytest.param("erofs", marks=erofs)]
)
def test_an_image(store: Store, source: Path, tmp_path: Path, fstype: str) -> None:
    path = image(source, tmp_path / "web.raw", fstype)
    copy = copied(store, candidate(path))
    assert copy.format is not None
    assert (copy.format.name, copy.size) == (fstype, path.stat().st_size)
    assert Path(copy.path).read_bytes() == path.read_bytes()


def test_a_tree(store: Store, source: Path) -> None:
    copy = copied(store, candidate(source, Kind.DIRECTORY))
    assert Path(copy.path, "etc/web.conf").read_bytes() == b"x = 1\n"


@squashfs
def test_through_links(store: Store, raw: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "image").symlink_to(raw)
    (tmp_path / "again").symlink_to("image")
    (tmp_path / "tree").symlink_to(source)
    assert copied(store, candidate(tmp_path / "again")) == copied(store, candidate(raw))
    by_link = copied(store, candidate(tmp_path / "tree", Kind.DIRECTORY))
    assert by_link == copied(store, candidate(source, Kind.DIRECTORY))


@squashfs
class TestNothingIsReadTwice:
    def test_an_unchanged_image(self, store: Store, raw: Path, reads: list[int]) -> None:
        copy = copied(store, candidate(raw))
        raw.rename(raw.with_name("other.raw"))  # changes its ctime
        settled(raw.with_name("other.raw"))
        assert copied(store, candidate(raw.with_name("other.raw"))) == copy
        assert len(reads) == 2
        for _ in range(5):
            assert copied(store, candidate(raw.with_name("other.raw"))) == copy
        assert len(reads) == 2

    def test_an_unchanged_tree(self, store: Store, source: Path, reads: list[int]) -> None:
        for _ in range(3):
            copied(store, candidate(source, Kind.DIRECTORY))
        assert len(reads) == 1

    def test_a_refused_image(self, store: Store, raw: Path, reads: list[int]) -> None:
        os.truncate(raw, 50_000)
        settled(raw)
        for _ in range(3):
            with pytest.raises(Incomplete, match=r"^incomplete: 50000 of \d+ bytes are here$"):
                copied(store, candidate(raw))
        assert len(reads) == 1

    def test_a_hundred_services_at_once(self, store: Store, raw: Path, reads: list[int]) -> None:
        threads = [threading.Thread(target=copied, args=(store, candidate(raw))) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(reads) == 1

    @root
    @loop
    @pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
    def test_nor_is_a_copy_read_while_another_of_it_is_mounted(
        self, store: Store, raw: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is refused is remembered: a whole image would never get into its service."""
        read, fsmount = copy_release._read, Squashfs.fsmount
        made_anew, mounting, has_read = threading.Event(), threading.Event(), threading.Event()

        def read_late(path: str) -> Release:
            if not made_anew.is_set():
                kept = store.copy(Layer("web.raw", "web", "", os.path.basename(path), Kind.IMAGE, "")).path
                shutil.copyfile(kept, f"{kept}.new")
                os.rename(f"{kept}.new", kept)
                made_anew.set()
                assert mounting.wait(10)
            try:
                return read(path)
            finally:
                has_read.set()

        def mount_slowly(format: Squashfs, backing: int, label: str, *part: int) -> int:
            if made_anew.is_set():
                mounting.set()
                assert has_read.wait(10)
            return fsmount(format, backing, label, *part)

        monkeypatch.setattr(copy_release, "_read", read_late)
        monkeypatch.setattr(Squashfs, "fsmount", mount_slowly)
        with MountWorkers() as workers:
            admission = Admission(store, workers)
            got: list[Copy] = []

            def admit() -> None:
                got.append(admission.admit(candidate(raw), host(), set(), None))

            first = threading.Thread(target=admit)
            first.start()
            assert made_anew.wait(10)
            admit()
            first.join(30)
            assert len(got) == 2
            assert admission.admit(candidate(raw), host(), set(), None) == got[0]

    def test_but_what_was_collected_is(self, store: Store, raw: Path, reads: list[int]) -> None:
        copy = copied(store, candidate(raw))
        store.collect(())
        assert copied(store, candidate(raw)) == copy
        assert Path(copy.path).exists()
        assert len(reads) == 2

    def test_nor_remembered_when_the_next_change_could_not_be_told(
        self, store: Store, raw: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file changed within this very tick may change again without its times showing it."""
        monkeypatch.setattr("watcher.watch.lease.coarse_now_ns", lambda: raw.stat().st_ctime_ns)
        copied(store, candidate(raw))
        copied(store, candidate(raw))
        assert len(reads) == 2

    def test_but_a_time_in_the_future_is_told_from_any_other(
        self, store: Store, raw: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock was set back: what is written now gets another time."""
        monkeypatch.setattr("watcher.watch.lease.coarse_now_ns", lambda: raw.stat().st_ctime_ns - 10**10)
        copied(store, candidate(raw))
        copied(store, candidate(raw))
        assert len(reads) == 1

    def test_a_change_is_noticed_however_fast_it_comes(self, store: Store, raw: Path) -> None:
        """Same name, same size, same inode, as fast as it goes."""
        content = bytearray(raw.read_bytes())
        for number in range(100):
            content[-1] = number
            raw.write_bytes(content)
            assert Path(copied(store, candidate(raw)).path).read_bytes() == content


@squashfs
class TestJudge:
    """What is said of a copy is remembered as long as the content and the terms are the same."""

    @staticmethod
    def no(copy: Copy) -> None:
        raise Refused("made for another host")

    def test_a_refused_content_is_not_copied_again_after_it_was_collected(
        self, store: Store, raw: Path, source: Path, reads: list[int]
    ) -> None:
        for what, terms in ((candidate(raw), ("a",)), (candidate(source, Kind.DIRECTORY), ("b",))):
            reads.clear()
            for _ in range(3):
                with pytest.raises(Refused, match="made for another host"):
                    copied(store, what, self.no, terms)
                store.collect(())
            assert len(reads) == 1

    def test_other_terms_are_another_question(self, store: Store, raw: Path) -> None:
        with pytest.raises(Refused):
            copied(store, candidate(raw), self.no, "host a")
        copied(store, candidate(raw), lambda copy: None, "host b")
        copied(store, candidate(raw))
        with pytest.raises(Refused):
            copied(store, candidate(raw), lambda copy: None, "host a")

    def test_other_content_is_another_question(self, store: Store, raw: Path) -> None:
        with pytest.raises(Refused):
            copied(store, candidate(raw), self.no, "host")
        raw.write_bytes(raw.read_bytes() + b"padding")
        copied(store, candidate(raw), lambda copy: None, "host")

    def test_what_may_have_changed_within_the_tick_is_asked_again(
        self, store: Store, raw: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("watcher.watch.lease.coarse_now_ns", lambda: raw.stat().st_ctime_ns)
        with pytest.raises(Refused):
            copied(store, candidate(raw), self.no, "host")
        copied(store, candidate(raw), lambda copy: None, "host")


def refusal(store: Store, path: Path | str, kind: Kind = Kind.IMAGE) -> str:
    with pytest.raises(Refused) as refused:
        copied(store, candidate(path, kind))
    text = str(refused.value)
    assert text.isprintable()
    return text


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (lambda path: path.mkdir(), "a directory, not a file"),
            (os.mkfifo, "a FIFO, not a file"),
            (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "a socket, not a file"),
            (lambda path: path.touch(), "empty"),
            (lambda path: path.write_bytes(b"\0no image"), "no squashfs, erofs, ext4 or btrfs image"),
            (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
            (lambda path: path.symlink_to("/etc/passwd/x"), "a link that leads nowhere"),
            (lambda path: path.symlink_to(path.name), "a link that leads in a circle"),
        ],
        ids=["directory", "fifo", "socket", "empty", "other", "dangling", "through a file", "circle"],
    )
    def test_images(self, store: Store, tmp_path: Path, make: Callable[[Path], None], text: str) -> None:
        make(tmp_path / "web.raw")
        assert refusal(store, tmp_path / "web.raw") == text

    def test_trees(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert refusal(store, tmp_path / "file", Kind.DIRECTORY) == "a file, not a directory"
        os.mkfifo(confext(tmp_path / "web", "web") / "etc/fifo")
        assert refusal(store, tmp_path / "web", Kind.DIRECTORY) == "etc/fifo in it is a FIFO: remove it"

    @root
    @pytest.mark.parametrize(("kind", "word"), [(stat.S_IFCHR, "character"), (stat.S_IFBLK, "block")])
    def test_devices(self, store: Store, tmp_path: Path, kind: int, word: str) -> None:
        os.mknod(tmp_path / "web.raw", kind | 0o600, os.makedev(7, 0))
        assert refusal(store, tmp_path / "web.raw") == f"a {word} device, not a file"

    def test_too_large(self, store: Store, tmp_path: Path) -> None:
        store.configure(MIB, 99, 2)
        (confext(tmp_path / "web", "web") / "etc/large").write_bytes(bytes(100))
        text = "too large: 20480 bytes, 99 are allowed (ImageMax=)"
        assert refusal(store, tmp_path / "web", Kind.DIRECTORY) == text

    @squashfs
    def test_larger_limits_are_asked_anew(self, store: Store, raw: Path) -> None:
        store.configure(64 * MIB, 99, 2)
        assert "ImageMax=" in refusal(store, raw)
        store.configure(64 * MIB, MIB, 2)
        copied(store, candidate(raw))

    @pytest.mark.parametrize(
        "name", ["sp ace.raw", "new\nline.raw", os.fsdecode(b"\xff.raw"), "a:b,c.raw", "\"'.raw"]
    )
    def test_odd_names(self, store: Store, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        assert refusal(store, tmp_path / name) == "empty"

    def test_a_name_too_long(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(Later, match="File name too long"):
            copied(store, candidate(str(tmp_path / ("x" * 300))))


def test_vanished_is_busy_since_an_event_will_follow(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Busy, match="vanished"):
        copied(store, candidate(tmp_path / "web.raw"))


@squashfs
def test_open_for_writing_is_busy_and_fine_afterwards(store: Store, raw: Path) -> None:
    with raw.open("ab"), pytest.raises(Busy, match="open for writing"):
        copied(store, candidate(raw))
    copied(store, candidate(raw))


@squashfs
def test_a_refusal_of_what_somebody_began_to_change_does_not_count(
    store: Store, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(fd: int, size: int) -> None:
        with pytest.raises(BlockingIOError):  # a writer that does not wait breaks the lease all the same
            os.open(raw, os.O_WRONLY | os.O_NONBLOCK)
        raise Refused("half of the old and half of the new")

    with monkeypatch.context() as patch:
        patch.setattr(originals, "probe", probe)
        with pytest.raises(Busy):
            copied(store, candidate(raw))
    copied(store, candidate(raw))


HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@squashfs
@pytest.mark.limit(20)
@pytest.mark.parametrize("kind", [Kind.IMAGE, Kind.DIRECTORY])
def test_a_write_lease_of_somebody_else_is_not_waited_for(
    store: Store, raw: Path, source: Path, kind: Kind
) -> None:
    """As a file server holds it for a client that has the file open; it has 45 s to give it up."""
    image = kind is Kind.IMAGE
    command = [sys.executable, "-S", "-c", HOLDER, raw if image else source / "etc/web.conf"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy):
            copied(store, candidate(raw if image else source, kind))
        holder.communicate()
    copied(store, candidate(raw if image else source, kind))


@squashfs
def test_a_fast_writer_never_gets_anything_half_written_in(store: Store, raw: Path, tmp_path: Path) -> None:
    """A process overwrites the file in place, over and over, with one of two contents of the same size."""
    contents = {}
    for name in ("a", "b"):
        twin = image(confext(tmp_path / name, "web", {"etc/noise": noise(2 * MIB)}), tmp_path / f"{name}.img")
        contents[name] = twin.read_bytes()
    size = min(map(len, contents.values()))
    source = """
import sys
a, b = (open(path, "rb").read() for path in sys.argv[2:4])
size = min(len(a), len(b))
print("go", flush=True)
for number in range(150):
    content = (a if number % 2 else b)[:size]
    with open(sys.argv[1], "r+b") as file:
        for start in range(0, size, 200_000):
            file.seek(start)
            file.write(content[start:start + 200_000])
            file.flush()
        file.truncate(size)
"""
    raw.write_bytes(contents["a"][:size])
    arguments = [raw, tmp_path / "a.img", tmp_path / "b.img"]
    writer = subprocess.Popen([sys.executable, "-S", "-c", source, *arguments], stdout=subprocess.PIPE)
    admitted = 0
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while writer.poll() is None:
            try:
                copy = copied(store, candidate(raw))
            except (Busy, Incomplete):
                continue
            assert Path(copy.path).read_bytes() in [content[:size] for content in contents.values()]
            admitted += 1
    assert writer.returncode == 0


def test_a_tree_that_changes_all_the_time_is_never_seen_mixed(store: Store, tmp_path: Path) -> None:
    """A process writes the same number into ten files, over and over: a copy has the same number in all."""
    source = confext(tmp_path / "web", "web", {f"etc/{number}": b"000" for number in range(10)})
    program = """
import os, sys
print("go", flush=True)
for number in range(400):
    for name in range(10):
        with open(f"{sys.argv[1]}/etc/.new", "w") as file: file.write("%03d" % number)
        os.rename(f"{sys.argv[1]}/etc/.new", f"{sys.argv[1]}/etc/{name}")
"""
    writer = subprocess.Popen([sys.executable, "-S", "-c", program, source], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while writer.poll() is None:
            try:
                copy = copied(store, candidate(source, Kind.DIRECTORY))
            except Busy:
                continue
            seen = [Path(copy.path, "etc", str(number)).read_text() for number in range(10)]
            assert seen == sorted(
                seen, reverse=True
            )  # written in this order: a moment in between is a moment too
            assert int(seen[0]) - int(seen[-1]) <= 1
    copy = copied(store, candidate(source, Kind.DIRECTORY))
    assert {Path(copy.path, "etc", str(number)).read_text() for number in range(10)} == {"399"}


def test_the_descriptor_is_of_what_the_link_leads_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    fd, _ = opening._open(candidate(tmp_path / "link", Kind.DIRECTORY), None, None)
    try:
        assert os.path.samestat(os.fstat(fd), source.stat())
        with pytest.raises(OSError):
            os.listdir(fd)  # O_PATH
    finally:
        os.close(fd)
    with pytest.raises(Refused, match="not a file"):
        opening._open(candidate(tmp_path / "link"), None, None)


def test_no_descriptor_is_left_whatever_happens(store: Store, source: Path, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    (tmp_path / "web.raw").write_bytes(b"no image")
    os.mkfifo(tmp_path / "fifo")
    for path, kind in [
        (source, Kind.DIRECTORY),
        (source, Kind.IMAGE),
        (tmp_path / "web.raw", Kind.IMAGE),
    ] * 2:
        try:
            copied(store, candidate(path, kind))
        except Refused:
            pass
    os.mkfifo(source / "etc/fifo")
    for path, kind in [
        (source, Kind.DIRECTORY),
        (tmp_path / "fifo", Kind.IMAGE),
        (tmp_path / "fifo", Kind.DIRECTORY),
    ]:
        with pytest.raises(Refused):
            copied(store, candidate(path, kind))
    assert os.listdir("/proc/self/fd") == before


def test_too_many_open_files_is_something_to_try_again(store: Store, source: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(Later, match="Too many open files"):
            copied(store, candidate(source, Kind.DIRECTORY))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    copied(store, candidate(source, Kind.DIRECTORY))


def test_a_socket_that_listens_is_left_alone(store: Store, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "web.raw"))
        assert refusal(store, tmp_path / "web.raw") == "a socket, not a file"


@root
@userns
def test_without_root_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """As the root of a user namespace, which counts for nothing with the files of users it does not know."""
    (tmp_path / "web.raw").write_bytes(b"secret")
    (tmp_path / "web.raw").chmod(0o600)
    os.chown(tmp_path / "web.raw", 4711, 4711)
    confext(tmp_path / "web", "web").chmod(0o700)
    os.chown(tmp_path / "web", 4711, 4711)
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
import images.test_admission as t
with t.Store({str(tmp_path / "state")!r}, 1 << 30, 1 << 30, 2) as store:
    for name, kind in (("web.raw", t.Kind.IMAGE), ("web", t.Kind.DIRECTORY), ("web/etc", t.Kind.DIRECTORY)):
        try:
            t.copied(store, t.candidate({str(tmp_path)!r} + "/" + name, kind))
        except t.Refused as error:
            print(error)
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout == "cannot be read: Permission denied\n" * 3


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
    with Store(str(tmp_path / "state"), 1 << 30, 1 << 30, 2) as store, MountWorkers() as workers:
        admission = Admission(store, workers)
        with pytest.raises(Later, match=r"^no answer from the kernel for 0.5 s$"):
            admission._release(hangs)
        monkeypatch.undo()
        assert admission._release(good)[0] == {"extension-release.web": "ID=_any\n"}
        (tmp_path / "hangs").write_text("")


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (
            b"\xef\xbb\xbfID=_any\n",
            "its extension-release has no ID=, .* byte order mark, which hides the first line: save it without one",
        ),
        (
            codecs.BOM_UTF16_LE + "ID=_any\r\n".encode("utf-16-le"),
            r"no ID=, .*\(it is UTF-16: save it as UTF-8, ",
        ),
        (
            codecs.BOM_UTF16_BE + "ID=_any\n".encode("utf-16-be"),
            r"no ID=, .*\(it is UTF-16: save it as UTF-8, ",
        ),
        (b"ID=other\n", "made for ID=other, and here it is ID=[a-z]+$"),
    ],
)
def test_a_release_file_with_a_byte_order_mark(store: Store, source: Path, release: bytes, said: str) -> None:
    (source / "etc/extension-release.d/extension-release.web").write_bytes(release)
    with MountWorkers(privileged=may_mount()) as workers, pytest.raises(Refused, match=said):
        Admission(store, workers).admit(candidate(source, Kind.DIRECTORY), host(), set(), None)


def test_what_an_image_asks_for_is_read_from_the_copy(store: Store, source: Path) -> None:
    """Also by an admission that has not seen it before; and not if the copy is gone."""
    asked = "ID=_any\nEXTENSION_RESTART_UNITS='a.service web.*'\n"
    (source / "etc/extension-release.d/extension-release.web").write_text(asked)
    with MountWorkers(privileged=may_mount()) as workers:
        first = Admission(store, workers)
        copy = first.admit(candidate(source, Kind.DIRECTORY), host(), set(), None)
        assert "has web.*, which is no unit's name" in first.effects(copy.digest)[-1]
        layer = Layer("web", "web", "", copy.digest, Kind.DIRECTORY, str(source))
        again = Admission(store, workers)
        assert again.asks_for(layer, ["a.service"]) == "restart"
        assert again.asks_for(layer, ["b.service"]) == ""
        assert again.asks_for(replace(layer, source="/other"), ["a.service"]) == ""
        assert again.asks_for(replace(layer, digest="0" * 64), ["a.service"]) == ""


def test_a_release_file_by_the_name_in_early_proposals(source: Path) -> None:
    (source / "etc/extension-release.d").rename(source / "etc/confext-release.d")
    fd = os.open(source, os.O_RDONLY)
    try:
        with pytest.raises(Refused, match=r"^not a confext: etc/confext-release.d/ in it .* call it etc/ext"):
            read_release(fd)
    finally:
        os.close(fd)
