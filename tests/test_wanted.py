# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have: what cannot be seen is not what was removed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from images import confext

from watcher import scan, wanted
from watcher.admission import Admission, host
from watcher.model import Declared
from watcher.mounts.workshop import Workshop
from watcher.store import Store
from watcher.wanted import Wanted, find

UNIT = "web.service"
MIB = 1 << 20


class Looking:
    """Looks at one `.confext.d/` with trees in it, and accepts what it finds."""

    def __init__(self, store: Store, drops: Path) -> None:
        self.drops = drops
        self._store = store
        self._admission = Admission(store, cast(Workshop, None))  # trees need none
        self._declared = Declared(confext_dirs=(str(drops),))

    def put(self, name: str) -> Path:
        return confext(self.drops / name, name, {f"etc/{name}": b""})

    def find(self) -> Wanted:
        with self._store.using():
            found = find(self._store, self._admission, UNIT, self._declared, host(), {}, None, None)
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
    monkeypatch.setattr(wanted, "LAYERS_MAX", 2)
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
