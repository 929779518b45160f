# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have: what cannot be seen is not what was removed.

Of rounds/desired.py, rounds/kept_entries.py and images/startable.py.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from support.images import confext
from support.needs import root
from watcher.images.admission import Admission
from watcher.images.complete import Rule
from watcher.images.formats.image import Brought, Image
from watcher.images.formats.squashfs import SQUASHFS
from watcher.images.made_for import host
from watcher.images.startable import require_startable
from watcher.images.store import Store
from watcher.model import (
    Candidate,
    Copy,
    Declared,
    KeptOut,
    Kind,
    Look,
    Protection,
    Refused,
    Setting,
    Stack,
    Sysext,
    Trust,
    Unsafe,
)
from watcher.mounts.workers import MountWorkers
from watcher.records.state import STACK, Quarantine, State
from watcher.resolve import scan, sources
from watcher.resolve.strict_modes import StrictModes
from watcher.resolve.trust import ROOT_ALONE
from watcher.rounds import desired
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.whole_drop import WholeDrop
from watcher.settings import device_mapper
from watcher.settings.image_policy import demand

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

    def look(self) -> Desired:
        with self._store.using():
            state = self._store.state(UNIT)
            return find(self._store, self._admission, Given(UNIT, self._declared, host(), state))

    def find(self) -> Desired:
        found = self.look()
        with self._store.using():
            self._store.accept(UNIT, found.wanted, found.entries)
        return found

    def change(self, change: Callable[[State], State]) -> None:
        self._store.change(UNIT, change)

    def damage(self, digest: str) -> None:
        (Path(self._store.state_directory) / "store" / digest / "etc" / "b").write_text("damaged")
        self._store.doubt(UNIT)

    @property
    def entries(self) -> list[str]:
        return [entry.slot for entry in self._store.state(UNIT).accepted.entries]


def test_what_a_new_tree_does_to_the_hosts_etc_is_told_once(looking: Looking) -> None:
    tree = looking.put("a")
    (tree / "etc/os-release").mkdir()
    said = [one for one in looking.find().look.remarks if "hides the host's etc/os-release" in one.text]
    assert [(one.level, one.path) for one in said] == [("warning", str(tree))]
    assert not [one for one in looking.look().look.remarks if "hides" in one.text]


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
    before = looking.find().wanted
    assert looking.entries == ["a", "b"]

    def fails(path: str, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_read", fails)
        assert looking.find().wanted == before
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
    before = looking.find().wanted
    looking.put("c")
    found = looking.find()
    assert found.wanted == before
    assert [(remark.path, remark.text) for remark in found.look.remarks] == [
        (f"{looking.drops}/c", "one too many: 3 layers, and 2 are allowed; all stays as it is")
    ]
    (looking.drops / "a").rename(looking.drops / ".a")
    assert [layer.name for layer in looking.find().wanted.layers] == ["b", "c"]


def test_a_bad_stack_has_those_before_it_to_fall_back_on(looking: Looking) -> None:
    looking.put("a")
    first = looking.find().wanted
    looking.put("b")
    second = looking.find().wanted
    bad = Quarantine(second.layers[1].digest, "its check failed", 1, second.layers[1].source)
    looking.change(lambda state: replace(state, quarantine=(bad,)))
    found = looking.look()
    assert (found.wanted, found.fallback, found.pinned) == (first, first, None)
    assert [(passed.slot, type(passed.reason)) for passed in found.passed] == [("b", KeptOut)]
    # Whoever puts it on that by hand knows why.
    looking.change(lambda state: replace(state, pin=second.id))
    found = looking.look()
    assert (found.wanted, found.fallback, found.pinned) == (first, first, second)
    looking.change(lambda state: replace(state, pin="no such stack"))
    assert looking.look().pinned is None


def test_a_removal_that_proved_bad_is_kept_out_as_a_whole(looking: Looking) -> None:
    for name in ("a", "b"):
        looking.put(name)
    both = looking.find().wanted
    (looking.drops / "b").rename(looking.drops / ".b")
    without = looking.find().wanted
    looking.change(
        lambda state: replace(state, quarantine=(Quarantine(STACK + without.id, "reload failed", 1),))
    )
    found = looking.look()
    assert (found.wanted, found.fallback) == (both, both)


def test_a_damaged_copy_is_passed_over_until_it_is_there_again(looking: Looking) -> None:
    looking.put("a")
    first = looking.find().wanted
    dropped = looking.put("b")
    second = looking.find().wanted
    looking.damage(second.layers[1].digest)
    found = looking.look()  # from the file that is still there
    assert (found.wanted, found.fallback, found.damaged) == (second, second, ())
    looking.damage(second.layers[1].digest)
    shutil.rmtree(dropped / "etc/extension-release.d")
    found = looking.look()
    assert (found.fallback, found.damaged) == (first, (second.id,))
    assert ["damaged" in remark.text for remark in found.look.remarks] == [True]


STRANGER = 65534


@pytest.fixture
def open_to_all(tmp_path: Path, looking: Looking) -> Looking:
    """With one entry, accepted, in a directory that everybody can write to, but for those above it."""
    looking.put("a")
    looking.find()
    looking.drops.chmod(0o777)
    return looking


def test_an_unsafe_directory_takes_nothing_away_and_gives_nothing(open_to_all: Looking) -> None:
    before = open_to_all.find().wanted
    (open_to_all.drops / "a").rename(open_to_all.drops / ".a")
    open_to_all.put("b")
    found = open_to_all.find()
    assert (found.wanted, open_to_all.entries) == (before, ["a", "b"])
    assert [(passed.slot, type(passed.reason)) for passed in found.passed] == [("b", Unsafe)]
    open_to_all.drops.chmod(0o755)
    assert [layer.name for layer in open_to_all.find().wanted.layers] == ["b"]


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


@pytest.mark.parametrize(
    ("unit", "there", "policy", "kept_out"),
    [
        ("web.service", False, "root=signed", True),
        ("web.service", False, "root=signed+unprotected", True),
        ("web.service", False, "root=unprotected", False),
        ("web.service", False, "", False),
        ("web.service", True, "root=signed", False),
        ("web.service.exec", False, "root=signed", False),
    ],
)
def test_what_systemd_would_fail_to_start_on_is_for_no_unit(
    unit: str, there: bool, policy: str, kept_out: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
    signed = Image(SQUASHFS, 1 << 20, 4096, 4096, Brought(40960, 8192, bytes(32), "its signature"))
    copy = Copy("a" * 64, "/store/a", 1 << 20, Kind.IMAGE, signed)
    admission = SimpleNamespace(admit=lambda *_: copy, trust=lambda _: Trust(Protection.SIGNED))
    candidate = Candidate("/drop/web.raw", "web.raw", "web", "", Kind.IMAGE)
    policies = (demand(Setting("ExtensionImagePolicy", policy, "web.service:3")),) if policy else ()
    given = Given(unit, Declared(), host(), policies=policies)
    with StrictModes(ROOT_ALONE) as modes:
        whole_drop = WholeDrop(Look((), ()), Stack(), "", policies)
        admits = desired._Admitting(cast(Admission, admission), given, {}, modes, Rule(), whole_drop)
        if kept_out:
            with pytest.raises(
                Refused, match=r"there is no device mapper here\. Say ImagePolicy= in .X-Confext"
            ):
                admits.admit(candidate)
        else:
            assert admits.admit(candidate).digest == copy.digest


@pytest.mark.parametrize(
    ("trust", "policy", "there", "kept_out"),
    [
        (Trust(Protection.VERITY, remark="signed by an unknown key"), "", True, True),
        (Trust(Protection.VERITY, remark="signed by an unknown key"), "root=verity+signed", True, True),
        (Trust(Protection.VERITY, remark="signed by an unknown key"), "*", True, True),
        (Trust(Protection.VERITY, remark="signed by an unknown key"), "root=verity+unprotected", True, False),
        (Trust(Protection.VERITY, remark="signed by an unknown key"), "", False, False),
        (Trust(Protection.SIGNED), "", True, False),
    ],
)
def test_a_signature_that_systemd_does_not_know_keeps_it_from_starting(
    trust: Trust, policy: str, *, there: bool, kept_out: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """257 ends with 226/NAMESPACE, "Required key not available", though the policy would do without a signature."""
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
    image = Image(SQUASHFS, 1 << 20, 4096, 4096, Brought(40960, 8192, bytes(32), "its signature", b"0"))
    copy = Copy("a" * 64, "/store/a", 1 << 20, Kind.IMAGE, image, trust)
    policies = (demand(Setting("ExtensionImagePolicy", policy, "web.service:3")),) if policy else ()
    if not kept_out:
        require_startable(copy, policies)
        return
    with pytest.raises(
        Refused, match=r"^signed by an unknown key, and systemd would not start the unit on it: .*"
    ):
        require_startable(copy, policies)


@pytest.mark.parametrize(
    ("signature", "policy", "found"),
    [
        (b"0", "root=unprotected", "signed"),
        (b"0", "root=verity+unprotected", "signed"),
        (b"0", "root=signed", ""),
        (b"0", "root=verity+signed", ""),
        (b"0", "*", ""),
        (None, "root=unprotected", "verity"),
        (None, "root=verity", ""),
    ],
)
def test_what_lies_beside_a_slot_is_what_systemd_takes_it_for(
    signature: bytes | None, policy: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path))
    image = Image(SQUASHFS, 4096, 0, 4096, Brought(0, 8192, bytes(32), "", signature, beside=True))
    trust = Trust(Protection.SIGNED if signature else Protection.VERITY)
    copy = Copy("a" * 64, "/store/a/image.raw", 4096, Kind.IMAGE, image, trust)
    policies = (demand(Setting("ExtensionImagePolicy", policy, "/web.service:3")),)
    if not found:
        require_startable(copy, policies)
        return
    said = f"systemd takes it for {found} by what lies beside it, which ExtensionImagePolicy={policy} (/web.service:3)"
    with pytest.raises(Refused, match=re.escape(said)):
        require_startable(copy, policies)
