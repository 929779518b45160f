# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the files of a unit say, and whether systemd has loaded the drop-in that the unit should have."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from watcher import generator
from watcher.images.stacks import Stacks
from watcher.managers.systemd import unit_facts
from watcher.managers.systemd.unit_files import Index
from watcher.model import Entry, Kind, Layer, Setting, Stack, Verdict
from watcher.records.state import Undoing
from watcher.settings import device_mapper

WEB = "[Service]\nExecStart=/bin/true\nRootDirectory=/srv/root/.\n[X-Confext]\nReload=signal:HUP\nCheckSec=soon\n"


class Host:
    def __init__(self, base: Path) -> None:
        self.units, self.state, self.generated = base / "units", base / "state", base / "generated"
        for path in (self.units, self.state, self.generated):
            path.mkdir()
        (self.units / "web.service").write_text(WEB)
        self.drop("web.service", "web.raw")

    @property
    def index(self) -> Index:
        return Index([str(self.units)])

    def drop(self, unit: str, *names: str) -> None:
        path = self.units / f"{unit}.confext.d"
        path.mkdir(exist_ok=True)
        for name in names:
            (path / name).touch()

    def accept(self, unit: str, slots: list[str], missing: tuple[str, ...] = ()) -> None:
        entries = [Entry(slot, f"/srv/{slot}", Kind.IMAGE) for slot in slots]
        layers = [Layer(slot, "x", "", "0" * 64, Kind.IMAGE, "") for slot in slots if slot not in missing]
        Stacks(str(self.state)).accept(unit, Stack(tuple(layers)), entries)

    def generate(self) -> None:
        generator.generate(str(self.generated), self.index, str(self.state), print)

    def stale(self, *names: str) -> list[str]:
        found = unit_facts.stale(self.index, names or ["web.service"], str(self.state), str(self.generated))
        return list(found)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_unit_without_its_drop_in_is_stale(host: Host) -> None:
    assert host.stale() == ["web.service"]
    host.generate()
    assert host.stale() == []


def test_a_unit_of_another_generator_has_the_drop_in_that_ours_could_write(
    host: Host, tmp_path: Path
) -> None:
    host.drop("quad.service", "web.raw")
    generator.generate(
        str(host.generated), Index([str(host.units)]), str(host.state), print
    )  # which has not seen it
    others = tmp_path / "generator"
    others.mkdir()
    (others / "quad.service").write_text("[Service]\nExecStart=/bin/true\nProtectSystem=full\n")
    index = Index([str(host.units), str(others)])
    (remark,) = unit_facts.all_facts(index, {})["quad.service"].remarks
    assert remark.path == f"{others}/quad.service"
    assert "forgets what it says here of /usr" in remark.text
    assert unit_facts.stale(index, ["quad.service"], str(host.state), str(host.generated)) == {}
    host.accept("quad.service", ["other.raw"])
    assert unit_facts.stale(index, ["quad.service"], str(host.state), str(host.generated))


@pytest.mark.parametrize("name", ["web", "my@thing", "web.exec", "nginx.service.exec"])
def test_what_is_not_of_a_unit_among_the_slots_is_no_unit(host: Host, name: str) -> None:
    (host.units / "nginx.service").write_text("[Service]\nExecStart=/bin/true\n")
    host.accept(name, ["web.raw"])
    known = unit_facts.units_with_slots(str(host.state))
    assert list(unit_facts.all_facts(host.index, known)) == ["web.service"]


def test_the_first_version_for_an_entry_that_is_listed_makes_nothing_stale(host: Host) -> None:
    host.generate()
    host.accept("web.service", ["web.raw"])
    assert host.stale() == []


def test_a_new_version_of_an_entry_makes_nothing_stale(host: Host) -> None:
    host.accept("web.service", ["web.raw"])
    host.generate()
    host.drop("web.service", "other.raw")
    host.accept("web.service", ["web.raw"])
    assert host.stale() == []


def test_a_unit_that_must_not_verify_is_stale_once_a_slot_can_be_verified_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The device mapper came after the generator ran."""
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path / "control"))
    host.accept("web.service", ["web.raw"])
    host.generate()
    (tmp_path / "control").touch()
    assert host.stale() == []
    (host.state / "units/web.service/web.verity").symlink_to("/store")
    assert host.stale() == ["web.service"]
    host.generate()
    assert host.stale() == []


@pytest.mark.parametrize("slots", [["a.raw", "web.raw"], []])
def test_another_set_of_entries_makes_a_unit_stale(host: Host, slots: list[str]) -> None:
    host.accept("web.service", ["web.raw"])
    host.generate()
    host.accept("web.service", slots)
    # An entry that is gone has no slot any more, and is ignored at the start: nothing to do.
    assert host.stale() == (["web.service"] if slots else [])


def test_another_order_makes_a_unit_stale(host: Host) -> None:
    host.accept("web.service", ["a.raw", "b.raw"])
    host.generate()
    host.accept("web.service", ["b.raw", "a.raw"])
    assert host.stale() == ["web.service"]


def test_an_entry_without_a_layer_counts_only_once_it_has_one(host: Host) -> None:
    host.accept("web.service", ["a.raw", "b.raw"], missing=("a.raw",))
    host.generate()
    host.accept("web.service", ["b.raw", "a.raw"], missing=("a.raw",))
    assert host.stale() == []


def test_an_instance_goes_by_its_template_until_it_has_slots(host: Host) -> None:
    (host.units / "app@.service").write_text("[Service]\nExecStart=/bin/true\n")
    host.drop("app@.service", "web.raw")
    host.generate()
    assert host.stale("app@.service", "app@one.service") == []
    host.accept("app@one.service", ["web.raw"])
    assert host.stale("app@.service", "app@one.service") == ["app@one.service"]
    host.generate()
    assert host.stale("app@.service", "app@one.service") == []


def test_a_service_is_described_by_its_files(host: Host) -> None:
    (found,) = unit_facts.all_facts(host.index, {}).values()
    assert (found.name, found.root, found.settings.reload) == ("web.service", "/srv/root", "signal:SIGHUP")
    assert found.declared.confext_dirs == (f"{host.units}/web.service.confext.d",)
    assert [remark.path for remark in found.remarks] == [f"{host.units}/web.service:6"]


def test_the_image_policy_of_a_unit_is_the_last_one_with_its_line(host: Host) -> None:
    def policy(*lines: str) -> tuple[Setting | None, list[str]]:
        (host.units / "web.service").write_text("\n".join(["[Service]", "ExecStart=/bin/true", *lines]))
        (found,) = unit_facts.all_facts(host.index, {}).values()
        assert found.fields(None)["unit_policy"] == found.policy
        return found.policy, [remark.text for remark in found.remarks]

    key = "ExtensionImagePolicy"
    assert policy() == (None, [])
    last = Setting(key, "root=signed", f"{host.units}/web.service:4")
    assert policy(f"{key}=root=verity", f"{key}=root=signed") == (last, [])
    assert policy(f"{key}=root=verity", f"{key}=") == (None, [])
    bad = policy(f"{key}=signed")
    assert bad[0] is not None
    said = f"nothing new gets in: {key}= is no policy: signed has no = (systemd.image-policy(7))"
    assert bad[1] == [said]


def test_a_service_that_is_not_enabled_is_known_to_be_so(host: Host) -> None:
    (host.units / "web.service").write_text("[Service]\nExecStart=/bin/true\n[X-Confext]\nEnabled=no\n")
    (facts,) = unit_facts.all_facts(host.index, {}).values()
    assert not facts.settings.enabled


def test_a_service_whose_directory_was_removed_stays_until_its_stack_is_empty(host: Host) -> None:
    host.accept("web.service", ["web.raw"])
    (host.units / "web.service.confext.d/web.raw").unlink()
    (host.units / "web.service.confext.d").rmdir()
    known = unit_facts.units_with_slots(str(host.state))
    assert list(unit_facts.all_facts(host.index, known)) == ["web.service"]
    assert host.stale() == []
    host.accept("web.service", [])
    known = unit_facts.units_with_slots(str(host.state))
    assert known == {"web.service": False}
    assert unit_facts.all_facts(host.index, known) == {}


@pytest.mark.parametrize(
    "change", [{"replaced": "0" * 16}, {"undoing": Undoing(Stack(), Verdict.WENT_DOWN, "")}]
)
def test_and_until_an_outcome_says_so(host: Host, change: dict[str, Any]) -> None:
    """Else the service would be dropped in the middle of the round that takes its stack away."""
    host.accept("web.service", ["web.raw"])
    shutil.rmtree(host.units / "web.service.confext.d")
    host.accept("web.service", [])
    stacks = Stacks(str(host.state))
    for changed, takes_part in ((change, True), (dict.fromkeys(change), False)):
        stacks.change("web.service", functools.partial(replace, **changed))
        known = unit_facts.units_with_slots(str(host.state))
        assert known == {"web.service": takes_part}
        assert list(unit_facts.all_facts(host.index, known)) == ["web.service"] * takes_part
    (host.state / "units/web.service/.state.json").write_text("damaged")
    assert unit_facts.units_with_slots(str(host.state)) == {"web.service": False}


def test_a_sandboxed_unit_is_stale_while_it_lists_what_is_not_there(host: Host) -> None:
    host.accept("web.service", ["web.raw"])
    (host.units / "web.service").write_text(WEB + "[Service]\nProtectSystem=full\n")
    host.generate()
    host.accept("web.service", [])
    assert host.stale() == ["web.service"]
    host.generate()
    assert host.stale() == []
