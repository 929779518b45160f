# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose word counts on the way to a file, tried with real owners, modes and lists; `nobody` is the stranger.

Here are also the tests of resolve/trust.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from support.needs import filesystem, root, tool, userns
from support.nobody import NOBODY, become_nobody
from watcher.images import tree
from watcher.model import Unsafe
from watcher.resolve.strict_modes import StrictModes, Way
from watcher.resolve.trust import BY_EXEC, READ, ROOT_ALONE, SEARCH, WRITE, Permissions, Trust, Who

pytestmark = root

DAEMON, GAMES = 1, 60
"""Users and groups that every system has; GAMES is a group."""

CLONE_NEWUSER = 0x10000000
PR_SET_DUMPABLE = 4

NOBODY_DEPLOYS = Trust(users=("nobody",))


@pytest.fixture
def top() -> Iterator[Path]:
    """Unlike `tmp_path`, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="confext-strict-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def drop(top: Path) -> Path:
    directory = top / "drop"
    directory.mkdir()
    return directory


@pytest.fixture
def image(drop: Path) -> Path:
    path = drop / "web.raw"
    path.write_text("content")
    path.chmod(0o644)
    return path


@pytest.fixture
def secret(top: Path) -> Path:
    directory = top / "secret"
    directory.mkdir(mode=0o700)
    path = directory / "web.raw"
    path.write_text("secret")
    path.chmod(0o600)
    return path


def verdict(path: Path | str, trust: Trust = ROOT_ALONE) -> str:
    """What is wrong with it, "" if nothing."""
    with StrictModes(trust) as modes:
        try:
            found = modes.open(os.fspath(path))
        except Unsafe as unsafe:
            return str(unsafe)
        os.close(found.fd)
        return str(found.unsafe or "")


def mended(path: Path, said: str, trust: Trust = ROOT_ALONE) -> bool:
    """Whether the command that the words name is all that was missing."""
    subprocess.run(["sh", "-ec", said.split('"')[1]], check=True)
    return verdict(path, trust) == ""


def acl(path: Path, *entries: tuple[int, int, int]) -> None:
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", value)


NONE = 0xFFFFFFFF


def granted(path: Path, tag: int, number: int, what: int) -> None:
    """rwxr-xr-x, and one entry besides."""
    acl(
        path,
        (1, 7, NONE),
        *([(2, what, number)] if tag == 2 else []),
        (4, 5, NONE),
        *([(8, what, number)] if tag == 8 else []),
        (16, 7, NONE),
        (32, 5, NONE),
    )


class TestTheWay:
    def test_what_root_owns_is_safe(self, image: Path) -> None:
        assert verdict(image) == ""

    def test_the_descriptor_is_of_what_was_judged(self, image: Path) -> None:
        with StrictModes() as modes:
            found = modes.open(f"{image.parent}/../drop/./web.raw")
            assert os.fstat(found.fd).st_ino == found.status.st_ino == image.stat().st_ino
            assert found.path == os.path.realpath(image)
            os.close(found.fd)

    @pytest.mark.parametrize("what", ["top", "drop", "image"])
    def test_a_strangers_component_is_refused(
        self, request: pytest.FixtureRequest, image: Path, what: str
    ) -> None:
        path: Path = request.getfixturevalue(what)
        os.chown(path, NOBODY, 0)
        said = verdict(image)
        assert said == (
            f'{path} is owned by nobody: "chown root {path}", or TrustedUsers=nobody in [X-Confext] of the unit'
        )
        assert verdict(image, Trust(users=(str(NOBODY),))) == ""
        assert mended(image, said)

    @pytest.mark.parametrize("what", ["top", "drop", "image"])
    def test_a_component_that_a_group_can_write_to(
        self, request: pytest.FixtureRequest, image: Path, what: str
    ) -> None:
        path: Path = request.getfixturevalue(what)
        os.chown(path, 0, GAMES)
        path.chmod(path.stat().st_mode | 0o020)
        mode = f"{stat.S_IMODE(path.stat().st_mode):04o}"
        said = verdict(image, Trust(where=BY_EXEC))
        assert said == (
            f'{path} is writable by group games ({mode}): "chmod g-w {path}", or TrustedGroups=games with exec --set'
        )
        assert verdict(image, Trust(groups=("games",))) == ""
        assert mended(image, said)

    def test_roots_own_group_may_write(self, drop: Path, image: Path) -> None:
        drop.chmod(0o775)
        assert verdict(image) == ""

    @pytest.mark.parametrize("what", ["drop", "image"])
    def test_a_component_that_everybody_can_write_to(
        self, request: pytest.FixtureRequest, image: Path, what: str
    ) -> None:
        path: Path = request.getfixturevalue(what)
        path.chmod(0o777)
        said = verdict(image, NOBODY_DEPLOYS)
        assert said == f'{path} is writable by everybody (0777): "chmod o-w {path}"'
        assert mended(image, said)

    def test_an_owner_who_is_trusted_by_his_group(self, drop: Path, image: Path) -> None:
        os.chown(image, NOBODY, 0)
        assert "owned by nobody" in verdict(image, Trust(groups=("games",)))
        assert verdict(image, Trust(groups=(str(os.getgrouplist("nobody", NOBODY)[0]),))) == ""

    def test_a_name_that_nobody_has_is_one_warning_and_trusts_nobody(self, image: Path) -> None:
        os.chown(image, NOBODY, 0)
        with StrictModes(Trust(("no-such-user", "nobody "), ("no-such-group",))) as modes:
            assert [(one.path, one.text) for one in modes.remarks[:1]] == [
                ("TrustedUsers=", "no user is called no-such-user: nobody is trusted for that")
            ]
            found = modes.open(str(image))
            assert found.unsafe is not None
            os.close(found.fd)

    def test_paths_end_where_they_end(self, image: Path, drop: Path) -> None:
        (drop / "circle").symlink_to("circle")
        for path, number in (("none/x", errno.ENOENT), ("web.raw/x", errno.ENOTDIR), ("circle", errno.ELOOP)):
            with StrictModes() as modes, pytest.raises(OSError) as caught:
                modes.open(f"{drop}/{path}")
            assert caught.value.errno == number

    def test_links_through_dots_and_absolute_paths(self, top: Path) -> None:
        (top / "a/b").mkdir(parents=True)
        (top / "a/up").symlink_to("./b/../..")
        (top / "abs").symlink_to(top / "a")
        way = Way()
        with StrictModes() as modes:
            with pytest.raises(FileNotFoundError):
                modes.open(f"{top}/abs/up/a/./b/missing/../x", way)
            assert way.path == f"{top}/a/b/x"
            assert way.links == [(str(top), "abs"), (f"{top}/a", "up")]
            found = modes.open("/../..")
            assert found.path == "/"
            os.close(found.fd)

    def test_no_descriptor_is_left(self, image: Path, secret: Path, drop: Path) -> None:
        (drop / "link").symlink_to(secret)
        os.lchown(drop / "link", NOBODY, NOBODY)
        before = os.listdir("/proc/self/fd")
        for path in (image, drop / "link", drop / "none", image / "below"):
            with suppress(OSError):
                verdict(path, NOBODY_DEPLOYS)
        assert os.listdir("/proc/self/fd") == before


class TestAccessControlLists:
    @pytest.mark.parametrize(("tag", "kind", "name"), [(2, "user", "daemon"), (8, "group", "games")])
    def test_somebody_named_in_it_can_write(
        self, drop: Path, image: Path, tag: int, kind: str, name: str
    ) -> None:
        granted(drop, tag, DAEMON if tag == 2 else GAMES, WRITE | READ | SEARCH)
        said = verdict(image)
        setting = f"{kind.capitalize()}s={name}"
        assert said == (
            f'{drop} is writable by {kind} {name} (ACL): "setfacl -x {kind[0]}:{name} {drop}",'
            f" or Trusted{setting} in [X-Confext] of the unit"
        )
        trust = Trust(users=("daemon",)) if tag == 2 else Trust(groups=("games",))
        assert verdict(image, trust) == ""

    def test_one_who_may_only_read_is_no_danger(self, drop: Path, image: Path) -> None:
        granted(drop, 2, DAEMON, READ | SEARCH)
        assert verdict(image) == ""

    def test_the_mask_limits_what_it_grants(self, drop: Path, image: Path) -> None:
        granted(drop, 2, DAEMON, WRITE | READ | SEARCH)
        drop.chmod(0o755)  # of a list, that is its mask
        assert verdict(image) == ""

    @tool("setpriv")
    @pytest.mark.parametrize("mode", [0o000, 0o004, 0o040, 0o044, 0o640, 0o604])
    @pytest.mark.parametrize("entry", [None, (2, NOBODY, 4), (2, NOBODY, 0), (8, GAMES, 4), (8, GAMES, 0)])
    @pytest.mark.parametrize("group", [0, GAMES, NOBODY])
    def test_who_may_read_is_what_the_kernel_says(
        self, image: Path, mode: int, entry: tuple[int, int, int] | None, group: int
    ) -> None:
        os.chown(image, DAEMON, group)
        image.chmod(mode)
        if entry is not None:
            tag, number, what = entry
            named = [(tag, what, number)]
            acl(
                image,
                (1, mode >> 6 & 7, NONE),
                *(named if tag == 2 else []),
                (4, mode >> 3 & 7, NONE),
                *(named if tag == 8 else []),
                (16, 4, NONE),
                (32, mode & 7, NONE),
            )
        fd = os.open(image, os.O_PATH)
        found = Permissions.of_descriptor(os.fstat(fd), fd)
        os.close(fd)
        identity = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={GAMES}"]
        kernel = subprocess.run([*identity, "test", "-r", image], check=False).returncode == 0
        assert found.allow(Who("user", NOBODY, frozenset((NOBODY, GAMES))), READ) == kernel


class TestSticky:
    def test_what_root_owns_in_it_is_safe(self, top: Path, image: Path) -> None:
        top.chmod(0o1777)
        assert verdict(image) == ""

    def test_what_somebody_else_made_in_it_is_not(self, top: Path) -> None:
        top.chmod(0o1777)
        (top / "link").symlink_to("/etc/passwd")
        os.lchown(top / "link", NOBODY, NOBODY)
        assert verdict(top / "link").startswith(f"{top}/link is owned by nobody")

    def test_nobody_can_drop_there(self, drop: Path) -> None:
        drop.chmod(0o1777)
        assert "writable by everybody" in verdict(drop)

    def test_a_hard_link_in_it_may_be_anybodys(self, top: Path, secret: Path) -> None:
        top.chmod(0o1777)
        os.link(secret, top / "web.raw")
        assert verdict(top / "web.raw").startswith(
            f"{top}/web.raw has other names, and anybody may have made this"
        )


class TestBorrowedEyes:
    """`nobody` is trusted to deploy, and that makes him no reader of what is root's."""

    def given(self, path: Path) -> None:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def test_his_own_files_and_roots_public_ones(self, drop: Path, image: Path, top: Path) -> None:
        (top / "public.raw").write_text("public")
        (drop / "link").symlink_to(top / "public.raw")
        self.given(drop)
        self.given(drop / "link")
        assert verdict(drop / "link", NOBODY_DEPLOYS) == verdict(image, NOBODY_DEPLOYS) == ""
        self.given(image)
        image.chmod(0o600)
        assert verdict(image, NOBODY_DEPLOYS) == ""

    @pytest.mark.parametrize("behind", ["file", "nothing", "directory", "fifo", "circle", "beyond a file"])
    def test_a_link_to_what_he_cannot_see_says_the_same_whatever_is_there(
        self, drop: Path, secret: Path, behind: str
    ) -> None:
        if behind != "file":
            secret.unlink()
        make: dict[str, Callable[[], object]] = {
            "directory": secret.mkdir,
            "fifo": lambda: os.mkfifo(secret),
            "circle": lambda: secret.symlink_to(secret),
        }
        make.get(behind, lambda: None)()
        target = secret / "below" if behind == "beyond a file" else secret
        (drop / "link").symlink_to(target)
        self.given(drop / "link")
        assert verdict(drop / "link", NOBODY_DEPLOYS) == (
            f"{drop}/link is a link that user nobody can set, to what user nobody cannot read:"
            f' "chown -h root {drop}/link"'
        )
        assert verdict(drop / "link") == (
            f'{drop}/link is owned by nobody: "chown -h root {drop}/link",'
            " or TrustedUsers=nobody in [X-Confext] of the unit"
        )

    def test_the_command_that_is_named_mends_it(self, drop: Path, secret: Path) -> None:
        (drop / "link").symlink_to(secret)
        self.given(drop / "link")
        said = verdict(drop / "link", NOBODY_DEPLOYS)
        assert mended(drop / "link", said, NOBODY_DEPLOYS)

    def test_a_file_that_he_sees_and_cannot_read(self, drop: Path, top: Path) -> None:
        (top / "private.raw").touch(mode=0o600)
        (drop / "link").symlink_to(top / "private.raw")
        self.given(drop / "link")
        assert "is a link that user nobody can set, to what" in verdict(drop / "link", NOBODY_DEPLOYS)

    def test_roots_link_in_his_directory_is_his_to_move(self, drop: Path, secret: Path) -> None:
        (drop / "link").symlink_to(secret)
        self.given(drop)
        said = verdict(drop / "link", NOBODY_DEPLOYS)
        assert said.endswith("put there what it leads to, or link it in a directory of root's")

    def test_a_link_of_his_to_a_link_of_roots(self, drop: Path, secret: Path, top: Path) -> None:
        (top / "roots").symlink_to(secret)
        (drop / "his").symlink_to(top / "roots")
        self.given(drop / "his")
        assert "user nobody cannot read" in verdict(drop / "his", NOBODY_DEPLOYS)

    def test_a_directory_on_the_way_that_is_a_link(self, drop: Path, secret: Path) -> None:
        (drop / "dir").symlink_to(secret.parent)
        self.given(drop / "dir")
        assert "user nobody cannot read" in verdict(drop / "dir/web.raw", NOBODY_DEPLOYS)
        assert "user nobody cannot read" in verdict(drop / "dir", NOBODY_DEPLOYS)
        assert "user nobody cannot read" in verdict(drop / "dir/../secret/web.raw", NOBODY_DEPLOYS)

    @pytest.mark.parametrize("how", ["hard link", "rename"])
    def test_a_file_of_roots_that_he_brought_here(self, drop: Path, secret: Path, how: str) -> None:
        """By a hard link (fs.protected_hardlinks=0), or out of another directory of his."""
        (os.link if how == "hard link" else os.rename)(secret, drop / "web.raw")
        self.given(drop)
        said = verdict(drop / "web.raw", NOBODY_DEPLOYS)
        assert said == (
            f"{drop}/web.raw cannot be read by user nobody, who may have put it there;"
            f' if they may read it: "chown nobody {drop}/web.raw"'
        )
        assert mended(drop / "web.raw", said, NOBODY_DEPLOYS)

    def test_a_file_that_a_trusted_group_could_not_have_read(self, drop: Path, image: Path) -> None:
        os.chown(drop, 0, GAMES)
        drop.chmod(0o775)
        trust = Trust(groups=("games",))
        image.chmod(0o600)
        assert "cannot be read by group games" in verdict(image, trust)
        os.chown(image, 0, GAMES)
        image.chmod(0o640)
        assert verdict(image, trust) == ""

    @pytest.mark.parametrize("there", ["{drop}/web.raw", "web.raw", "../drop/web.raw"])
    @pytest.mark.parametrize("hidden", ["drop", "image"])
    def test_what_the_mode_shows_to_all_and_a_list_hides_from_him(
        self, request: pytest.FixtureRequest, drop: Path, image: Path, hidden: str, there: str
    ) -> None:
        (drop / "link").symlink_to(there.format(drop=drop))
        self.given(drop / "link")
        assert verdict(drop / "link", NOBODY_DEPLOYS) == ""
        acl(
            request.getfixturevalue(hidden),
            *((1, 7, NONE), (2, 0, NOBODY), (4, 5, NONE), (16, 5, NONE), (32, 5, NONE)),
        )
        assert verdict(image, NOBODY_DEPLOYS) == ""
        said = verdict(drop / "link", NOBODY_DEPLOYS)
        assert said.startswith(
            f"{drop}/link is a link that user nobody can set, to what user nobody cannot read"
        )


def test_a_race_of_his_link_with_his_file_is_never_won(drop: Path, secret: Path, top: Path) -> None:
    """One name is by turns a file of his, a link to it and a link to what only root can read, as fast as he can."""
    os.chown(drop, NOBODY, NOBODY)
    attacker = os.fork()
    if attacker == 0:
        become_nobody()
        (drop / "his.raw").touch()
        while True:
            for target in (secret, drop / "his.raw"):
                (drop / ".link").symlink_to(target)
                (drop / ".link").rename(drop / "web.raw")
            (drop / ".file").touch()
            (drop / ".file").rename(drop / "web.raw")
    try:
        refused = taken = 0
        while not (refused > 100 and taken > 100):
            with StrictModes(NOBODY_DEPLOYS) as modes:
                try:
                    found = modes.open(f"{drop}/web.raw")
                except FileNotFoundError:
                    continue
                except Unsafe:
                    refused += 1
                    continue
                if found.unsafe is None:
                    taken += 1
                    assert os.fstat(found.fd).st_uid == NOBODY
                os.close(found.fd)
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)


class TestTrees:
    @pytest.fixture
    def content(self, drop: Path) -> Path:
        path = drop / "web/etc/web.conf"
        path.parent.mkdir(parents=True)
        path.write_text("x")
        return path

    def signed(self, path: Path, trust: Trust = ROOT_ALONE) -> None:
        with StrictModes(trust) as modes:
            found = modes.open(str(path))
            assert found.unsafe is None
            fd = os.open(path, os.O_RDONLY)
            try:
                tree.signature(fd, found.guard)
            finally:
                os.close(fd)
                os.close(found.fd)

    def test_of_root_alone(self, drop: Path, content: Path) -> None:
        self.signed(drop / "web")

    @pytest.mark.parametrize("what", ["etc", "etc/web.conf"])
    def test_what_is_in_it_must_not_be_writable_by_strangers(
        self, drop: Path, content: Path, what: str
    ) -> None:
        path = drop / "web" / what
        os.chown(path, NOBODY, 0)
        with pytest.raises(
            Unsafe, match=f'^{path} is owned by nobody: "chown root {path}", or TrustedUsers='
        ):
            self.signed(drop / "web")
        self.signed(drop / "web", NOBODY_DEPLOYS)
        os.chown(path, 0, GAMES)
        path.chmod(0o775)
        with pytest.raises(Unsafe, match=r"is writable by group games \(0775\)"):
            self.signed(drop / "web")
        path.chmod(0o755)
        granted(path, 2, DAEMON, WRITE)
        with pytest.raises(Unsafe, match=r"is writable by user daemon \(ACL\)"):
            self.signed(drop / "web")

    def test_whoever_owns_what_nobody_can_enter_is_content(self, drop: Path, content: Path) -> None:
        os.chown(content, NOBODY, 0)
        content.chmod(0o666)
        (drop / "web").chmod(0o700)
        self.signed(drop / "web")
        (drop / "web").chmod(0o755)
        drop.chmod(0o700)
        self.signed(drop / "web")
        (drop.parent / "link").symlink_to("drop/web")
        self.signed(drop.parent / "link")

    @pytest.mark.parametrize("what", ["etc", "etc/web.conf", "listed"])
    def test_whoever_leads_to_it_must_be_able_to_read_all_of_it(
        self, drop: Path, content: Path, what: str
    ) -> None:
        link = drop.parent / "link"
        link.symlink_to("drop/web")
        os.lchown(link, NOBODY, NOBODY)
        self.signed(link, NOBODY_DEPLOYS)
        if what == "listed":
            path = content
            acl(path, (1, 6, 0), (2, 0, NOBODY), (4, 4, 0), (0x10, 4, 0), (0x20, 4, 0))
        else:
            path = drop / "web" / what
            path.chmod(0o700)
        with pytest.raises(Unsafe, match=f"{link} is a link that user nobody can set, to what"):
            self.signed(link, NOBODY_DEPLOYS)
        os.lchown(link, 0, 0)
        self.signed(link, NOBODY_DEPLOYS)

    def test_whoever_may_have_put_it_there_must_be_able_to_read_all_of_it(
        self, drop: Path, content: Path
    ) -> None:
        content.chmod(0o600)
        os.chown(drop, NOBODY, NOBODY)
        drop.chmod(0o700)
        with pytest.raises(
            Unsafe, match=f'{content} cannot be read by user nobody.*"chown nobody {content}"'
        ):
            self.signed(drop / "web", NOBODY_DEPLOYS)
        os.chown(content, NOBODY, NOBODY)
        self.signed(drop / "web", NOBODY_DEPLOYS)


def serve(device: int, target: bytes) -> None:
    """A FUSE file system in which all is root's: a directory, and in it any name is a link to `target`."""
    while request := os.read(device, 1 << 20):
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        mode, size = (0o40755, 0) if node == 1 and operation != 1 else (0o120777, len(target))
        attributes = struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
        answers = {
            26: struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 16, 0, 16, 12, 1 << 16, 1, 16, 0, 0),  # INIT
            1: struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + attributes,  # LOOKUP
            3: struct.pack("<QII", 0, 0, 0) + attributes,  # GETATTR
            5: target,  # READLINK
        }
        answer = answers.get(operation, b"")
        with suppress(FileNotFoundError):
            os.write(
                device, struct.pack("<IiQ", 16 + len(answer), 0 if answer else -errno.ENOSYS, unique) + answer
            )


@pytest.fixture
def served(drop: Path, secret: Path) -> Iterator[Path]:
    """What `nobody` has put on a directory of his that lies in one of root's, as fusermount3(1) lets him."""
    where = drop / "web.raw.v"
    where.mkdir()
    os.chown(where, NOBODY, NOBODY)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={NOBODY},group_id={NOBODY},allow_other"
    mount = ctypes.CDLL(None).mount
    assert mount(b"nobodys", os.fsencode(where), b"fuse", 0, options.encode()) == 0
    server = os.fork()
    if server == 0:
        with suppress(OSError):
            serve(device, os.fsencode(secret))
        os._exit(0)
    os.close(device)
    yield where
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    subprocess.run(["umount", "--lazy", where], check=True)


@filesystem("fuse")
def test_what_a_user_serves_is_his_whatever_it_says(served: Path) -> None:
    assert os.lstat(served / "web_1.raw").st_uid == 0
    assert f"{served} is owned by nobody" in verdict(served / "web_1.raw")
    assert "to what user nobody cannot read" in verdict(served / "web_1.raw", NOBODY_DEPLOYS)


def as_root_of_a_user_namespace(ask: Callable[[], str]) -> str:
    """What `nobody` is told who knows no host's user but himself, as `unshare --user --map-root-user` has it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "it failed"
        try:
            become_nobody()
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            assert libc.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"0 {NOBODY} 1"),
                ("gid_map", f"0 {NOBODY} 1"),
            ):
                Path("/proc/self", name).write_text(text)
            answer = ask()
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        os.waitpid(pid, 0)
        return pipe.read()


@userns
class TestUserNamespace:
    """The host's root has the number there that every other user of the host has, too: `/` and `/tmp` are theirs."""

    @pytest.fixture(autouse=True)
    def his(self, top: Path) -> None:
        os.chown(top, NOBODY, NOBODY)

    def test_what_is_his_own_below_what_is_the_hosts(self, top: Path, drop: Path, image: Path) -> None:
        for path in (drop, image):
            os.chown(path, NOBODY, NOBODY)
        (drop / "link").symlink_to(image)
        os.lchown(drop / "link", NOBODY, NOBODY)
        assert as_root_of_a_user_namespace(lambda: verdict(image)) == ""
        assert as_root_of_a_user_namespace(lambda: verdict(drop / "link")) == ""
        drop.chmod(0o770)  # his own group
        assert as_root_of_a_user_namespace(lambda: verdict(image)) == ""
        drop.chmod(0o777)
        assert "writable by everybody" in as_root_of_a_user_namespace(lambda: verdict(image))

    @pytest.mark.parametrize("owner", [0, DAEMON])
    def test_the_hosts_own_files_are_no_content(self, image: Path, owner: int) -> None:
        os.chown(image, owner, owner)
        said = as_root_of_a_user_namespace(lambda: verdict(image))
        assert said.startswith(
            f"{image} is owned by somebody whom this user namespace does not know: use a copy"
        )

    def test_what_another_user_of_the_host_made_in_a_sticky_directory(
        self, top: Path, drop: Path, image: Path
    ) -> None:
        top.chmod(0o1777)
        os.chown(image, NOBODY, NOBODY)
        os.chown(drop, DAEMON, DAEMON)
        said = as_root_of_a_user_namespace(lambda: verdict(image))
        assert said.startswith(f"{drop} is owned by somebody whom this user namespace does not know")


def test_a_thousand_files_cost_one_walk_of_their_directory(
    drop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: (opened.append(str(path)), real(path, *rest, **more))[1]
    )
    for number in range(100):
        (drop / f"web_{number}.raw").touch()
    opened.clear()
    with StrictModes() as modes:
        for number in range(100):
            os.close(modes.open(f"{drop}/web_{number}.raw").fd)
    assert len(opened) == 100 + len(drop.parts)
    shutil.rmtree(drop)
