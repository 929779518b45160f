# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have: what cannot be seen is not what was removed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from support.images import confext
from support.needs import root
from watcher.images.admission import Admission, host
from watcher.images.store import Store
from watcher.model import Declared, Sysext, Unsafe
from watcher.mounts.workers import MountWorkers
from watcher.resolve import scan, sources
from watcher.rounds import desired
from watcher.rounds.desired import Desired, Given, find

UNIT = "web.service"
MIB = 1 << 20


class Looking:
    """Looks at one `.confext.d/` with trees in it, and accepts what it finds."""

    def __init__(self, store: Store, drops: Path) -> None:
        self.drops = drops
        self._store = store
        self._admission = Admission(store, cast(MountWorkers, None))  # trees need none
        self._declared = Declared(confext_dirs=(str(drops),))

    def declare(self, *directories: Path) -> None:
        paths = [(str(path), False) for path in directories]
        self._declared = sources.declare((), paths)

    def put(self, name: str) -> Path:
        return confext(self.drops / name, name, {f"etc/{name}": b""})

    def find(self) -> Desired:
        with self._store.using():
            found = find(self._store, self._admission, Given(UNIT, self._declared, host()))
            self._store.accept(UNIT, found.stack, [pick.entry for pick in found.look.picks])
        return found

    @property
    def entries(self) -> list[str]:
        record = self._store.record(UNIT)
        assert record is not None
        return [entry.slot for entry in record.entries]


@pytest.fixture
def looking(tmp_path: Path) -> Iterator[Looking]:
    drops = tmp_path / "web.confext.d"
    drops.mkdir()
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 3) as store:
        yield Looking(store, drops)


def test_a_directory_that_fails_takes_no_entry_out_of_the_record(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        looking.put(name)
    before = looking.find().stack
    assert looking.entries == ["a", "b"]

    def fails(path: str, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_read", fails)
        assert looking.find().stack == before
        assert looking.entries == ["a", "b"]
    (looking.drops / "b").rename(looking.drops / ".b")
    looking.find()
    assert looking.entries == ["a"]


def test_more_layers_than_can_be_mounted_are_never_accepted(
    looking: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desired, "LAYERS_MAX", 2)
    for name in ("a", "b"):
        looking.put(name)
    before = looking.find().stack
    looking.put("c")
    found = looking.find()
    assert found.stack == before
    assert [(remark.path, remark.text) for remark in found.look.remarks] == [
        (f"{looking.drops}/c", "one too many: 3 layers, and 2 are allowed; all stays as it is")
    ]
    (looking.drops / "a").rename(looking.drops / ".a")
    assert [layer.name for layer in looking.find().stack.layers] == ["b", "c"]


STRANGER = 65534


@pytest.fixture
def open_to_all(tmp_path: Path, looking: Looking) -> Looking:
    """With one entry, accepted, in a directory that everybody can write to, but for those above it."""
    looking.put("a")
    looking.find()
    looking.drops.chmod(0o777)
    return looking


def test_an_unsafe_directory_takes_nothing_away_and_gives_nothing(open_to_all: Looking) -> None:
    before = open_to_all.find().stack
    (open_to_all.drops / "a").rename(open_to_all.drops / ".a")
    open_to_all.put("b")
    found = open_to_all.find()
    assert (found.stack, open_to_all.entries) == (before, ["a", "b"])
    assert [(passed.slot, type(passed.reason)) for passed in found.passed] == [("b", Unsafe)]
    open_to_all.drops.chmod(0o755)
    assert [layer.name for layer in open_to_all.find().stack.layers] == ["b"]


@root
def test_a_sysext_that_a_unit_declares_is_left_to_systemd_whoever_owns_it(
    looking: Looking, tmp_path: Path
) -> None:
    for name, release in (("prog", "usr/lib/extension-release.d"), ("conf", "etc/extension-release.d")):
        (tmp_path / name / release).mkdir(parents=True)
        (tmp_path / name / release / f"extension-release.{name}").write_text("ID=_any\n")
        os.chown(tmp_path / name, STRANGER, STRANGER)
    looking.declare(tmp_path / "prog", tmp_path / "conf")
    found = looking.find()
    assert [entry.slot for entry in found.sysexts] == ["prog"]
    assert [(one.slot, type(one.reason)) for one in found.passed] == [("prog", Sysext), ("conf", Unsafe)]
