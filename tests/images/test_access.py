# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read what: the kernel is asked by a process that is that user."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from support.needs import root
from watcher.images import access
from watcher.images.access import READ, SEARCH, User

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
