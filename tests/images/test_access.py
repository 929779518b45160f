# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read what: the kernel is asked by a process that is that user."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.needs import root
from watcher.images import access
from watcher.images.access import READ, SEARCH, User, may_search, told
from watcher.images.changes import Change, Comparison, changes
from watcher.images.layers import Layers, Role
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.swap import _overlay
from watcher.mounts.workers import MountWorkers

ACL = "system.posix_acl_access"
IDS = (4001, 4002, 4003)
# Opens each file, and looks up a name in each directory, with all that the kernel checks.
TRY = """
import json, os, sys
uid, groups, paths = json.load(sys.stdin)
os.setgroups(groups); os.setresgid(groups[0], groups[0], groups[0]); os.setresuid(uid, uid, uid)
def may(path):
    try:
        if os.path.basename(path).startswith("d"):
            os.stat(path + "/.")
        else:
            os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        return False
    return True
json.dump([may(path) for path in paths], sys.stdout)
"""


def acl(random_: random.Random) -> bytes:
    """A list as acl_valid(3) has it: sorted, with a mask where there are names."""
    bits = lambda: random_.randrange(8)  # noqa: E731
    none = 0xFFFFFFFF
    entries = [(0x01, bits(), none)]
    entries += [(0x02, bits(), one) for one in IDS if random_.random() < 0.4]
    entries += [(0x04, bits(), none)]
    entries += [(0x08, bits(), one) for one in IDS if random_.random() < 0.4]
    if len(entries) > 2 or random_.random() < 0.5:
        entries += [(0x10, bits(), none)]
    entries += [(0x20, bits(), none)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@root
def test_the_kernel_says_the_same(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents):  # the user has to get there
        if parent.stat().st_mode & 0o5 != 0o5 and parent != Path("/"):
            parent.chmod(0o755)
    random_ = random.Random(7)
    paths = []
    for number in range(400):
        path = tmp_path / f"{'fd'[number % 2]}{number}"
        path.mkdir() if number % 2 else path.touch()
        os.chown(path, random_.choice((0, *IDS)), random_.choice((0, *IDS)))
        path.chmod(random_.randrange(0o1000))
        if random_.random() < 0.7:
            try:
                os.setxattr(path, ACL, acl(random_))
            except OSError as error:
                pytest.skip(f"no access control lists here: {error}")
        paths.append(str(path))
    agreed = set()
    for groups in ([4001], [4002], [4003, 4001], [4001, 4002, 4003], [65534]):
        for uid in (*IDS, 65534):
            done = subprocess.run(
                [sys.executable, "-Ic", TRY],
                input=json.dumps([uid, groups, paths]),
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            )
            user = User(uid, frozenset(groups))
            for path, says in zip(paths, json.loads(done.stdout), strict=True):
                wanted = SEARCH if os.path.basename(path).startswith("d") else READ
                assert access.may(user, wanted, path, os.stat(path)) == says, (uid, groups, path)
                agreed.add((wanted, says))
    assert len(agreed) == 4


# Of each descriptor: which directories a user may list with what is in them, and which names look up.
LOOK = """
import json, os, sys
uid, groups, views, paths = json.load(sys.stdin)
os.setgroups(groups); os.setresgid(groups[0], groups[0], groups[0]); os.setresuid(uid, uid, uid)
def lists(view, path):
    try:
        os.close(os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=view))
        os.stat(f"{path or '.'}/.", dir_fd=view)
    except PermissionError:
        return False
    except OSError:
        return None
    return True
def looks_up(view, path):
    try:
        os.lstat(path or ".", dir_fd=view)
    except PermissionError:
        return False
    except OSError:
        return None
    return True
json.dump([[{p: f(v, p) for p in paths} for v in views] for f in (lists, looks_up)], sys.stdout)
"""
View = dict[str, bool | None]
"""By path: None: there is nothing of the kind."""


def asked(user: User, fds: list[int], paths: list[str]) -> tuple[list[View], list[View]]:
    order = json.dumps([user.uid, sorted(user.groups), fds, paths])
    done = subprocess.run(
        [sys.executable, "-Ic", LOOK],
        input=order,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        pass_fds=fds,
    )
    lists, looks_up = json.loads(done.stdout)
    return lists, looks_up


def grow(at: str, random_: random.Random, depth: int = 3) -> None:
    """A directory of a layer; half of all lets everybody in, so that there is something beneath."""
    os.mkdir(at)
    for name in "abc":
        inner, kind = f"{at}/{name}", random_.random()
        if depth and kind < 0.6:
            grow(inner, random_, depth - 1)
        elif kind < 0.7:
            os.mknod(inner, stat.S_IFCHR)
        elif kind < 0.9:
            Path(inner).write_text(at)
    if depth < 3 and random_.random() < 0.15:
        os.setxattr(at, "trusted.overlay.opaque", b"y")
    os.chmod(at, 0o755)
    if random_.random() < (0.4 if depth < 3 else 0.1):
        os.chown(at, random_.choice((0, *IDS)), random_.choice((0, *IDS)))
        os.chmod(at, random_.randrange(0o1000))
        if random_.random() < 0.5:
            os.setxattr(at, ACL, acl(random_))


def covering(cover: str, layer: str) -> None:
    """As a stack has one: empty, with the rights of the uppermost layer."""
    status = os.stat(layer)
    os.mkdir(cover)
    os.chown(cover, status.st_uid, status.st_gid)
    os.chmod(cover, status.st_mode)
    if ACL in os.listxattr(layer):
        os.setxattr(cover, ACL, os.getxattr(layer, ACL))


def told_of(layers: Layers, user: User | None) -> tuple[set[str], set[str]]:
    """The paths that differ between the base and all layers together, and those of which it is told that more does."""
    comparison, closed = Comparison(), set[str]()

    def look(change: Change) -> str | None:
        return None if comparison.same(change) else "/".join(change.path)

    def close(change: Change, said: str | None) -> str | None:
        closed.add("/".join(change.path))
        return said

    order = range(len(layers.roots))
    return {
        path for path in told(changes(layers, order[-1:], order), user, look, close) if path is not None
    }, closed


def above(path: str) -> list[str]:
    names = path.split("/") if path else []
    return ["/".join(names[:count]) for count in range(len(names))]


def check(workers: MountWorkers, seed: int) -> set[str]:
    """Compare what users are told with what the kernel lets them see. Returns what there was of each kind."""
    random_, met = random.Random(seed), set()
    paths = ["/".join(names) for depth in range(5) for names in itertools.product("abc", repeat=depth)]
    with workers.scratch(), Descriptors() as fds:
        for layer in "012":
            grow(layer, random_)
        covering("cover", "0")
        roots = [fds.add(os.open(layer, os.O_PATH)) for layer in "012"]
        stack = fds.add(_overlay(["cover", "0", "1", "2"], 0, privileged=True))
        for uid, groups in ((4001, (4002,)), (4003, (4001, 4002))):
            user = User(uid, frozenset(groups))
            lists, looks_up = asked(user, [stack, *roots], paths)
            met |= check_names(Layers(roots), user, (lists[0], lists[-1]))
            layers = Layers(roots, may_search=functools.partial(may_search, user))
            met |= {check_path(layers, path, looks_up[0], looks_up[1:]) for path in paths[1:]}
    return met


def check_names(layers: Layers, user: User, lists: Sequence[View]) -> set[str]:
    """Compare what is told of the names that differ with what the kernel says of the directories of the two stacks."""

    def shut(path: str) -> str | None:
        return next((at for at in above(path) if any(view[at] is False for view in lists)), None)

    all_, _ = told_of(layers, None)
    names, closed = told_of(layers, user)
    assert names == {path for path in all_ if shut(path) is None}, user
    # Where a directory hides something that differs, that is told of it, and of no other.
    assert closed == {shut(path) for path in all_} - {None}, user
    return {"named" if names else "", "closed" if closed else ""}


def check_path(layers: Layers, path: str, stack: View, own: Sequence[View]) -> str:
    """Compare what is told of a path with what the kernel says of it in a stack, and in its layers."""
    (*_, found) = layers.find(f"/etc/{path}")
    (*_, whole) = Layers(layers.roots).find(f"/etc/{path}")
    if stack[path] is False:
        assert not found.chain and "could not look up names" in found.problem, path
        return "shut"
    assert found.problem == whole.problem, path
    at = "/".join(found.path)  # a file may end it earlier
    for item in whole.chain:
        seen = item.role is Role.SHOWN or own[item.node.layer][at] is not False
        assert (item in found.chain) == seen, path
    return "whole" if found == whole else "cut"


@root
def test_names_are_told_as_the_kernel_would_tell_them() -> None:
    with MountWorkers() as workers:
        met = set().union(*(workers.submit(check, workers, seed).result() for seed in range(12)))
    assert met >= {"named", "closed", "shut", "whole", "cut"}


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\2", struct.pack("<I", 3) + bytes(24), struct.pack("<I", 2), struct.pack("<I", 2) + bytes(5)],
)
def test_a_list_that_is_not_understood_lets_nobody(
    tmp_path: Path, damaged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o777)
    monkeypatch.setattr(os, "getxattr", lambda *_, **__: damaged)
    status = os.stat(tmp_path / "file")
    for groups in ({status.st_gid}, {status.st_gid + 1}):
        user = User(status.st_uid + 1, frozenset(groups))
        assert not access.may(user, READ, str(tmp_path / "file"), status)


def test_a_list_that_cannot_be_read_lets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o777)
    status = os.stat(tmp_path / "file")

    def fails(*_: object, **__: object) -> bytes:
        raise OSError(5, "")

    monkeypatch.setattr(os, "getxattr", fails)
    assert not access.may(User(status.st_uid + 1, frozenset()), READ, str(tmp_path / "file"), status)
