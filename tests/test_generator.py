# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-ins by which units start on their slots: managers/systemd/unit_drop_in.py, settings/device_mapper.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from watcher import generator
from watcher.images.stacks import Stacks
from watcher.managers.systemd import held_starts, unit_drop_in
from watcher.managers.systemd.unit_files import DROPIN, Index, Unit
from watcher.model import Entry, Kind, Layer, Stack, Verdict
from watcher.records.state import Trial
from watcher.settings import device_mapper, syntax

PLAIN = "[Service]\nExecStart=/bin/true\n"


class Host:
    def __init__(self, base: Path) -> None:
        self.units = base / "system"
        self.state = base / "state"
        self.output = base / "output"
        self.complaints: list[str] = []
        self.units.mkdir()
        self.state.mkdir()

    def unit(self, name: str, text: str = PLAIN, *entries: str) -> None:
        (self.units / name).write_text(text)
        if entries:
            self.drop(name, *entries)

    def drop(self, name: str, *entries: str) -> None:
        for entry in entries:
            path = self.units / f"{name}.confext.d" / entry
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.endswith(".raw"):
                path.touch()
            else:
                path.mkdir()

    def accept(self, unit: str, *slots: str) -> None:
        entries = [
            Entry(slot, f"/srv/{slot}", Kind.IMAGE if slot.endswith(".raw") else Kind.DIRECTORY)
            for slot in slots
        ]
        layers = [Layer(entry.slot, "x", "", "0" * 64, entry.kind, entry.path) for entry in entries]
        Stacks(str(self.state)).accept(unit, Stack(tuple(layers)), entries)

    def pass_through(self, unit: str, *sysexts: str) -> None:
        Stacks(str(self.state)).change(unit, lambda state: replace(state, sysexts=sysexts))

    def generate(self) -> list[str]:
        return generator.generate(
            str(self.output), Index([str(self.units)]), str(self.state), self.complaints.append
        )

    def dropin(self, unit: str) -> str:
        self.generate()
        return (self.output / f"{unit}.d" / DROPIN).read_text()

    def listed(self, unit: str) -> tuple[list[str], list[str]]:
        """What systemd would read: image and directory values after the resets."""
        assignments = syntax.parse(self.dropin(unit), "").assignments
        images, directories = (
            [a.value for a in syntax.assigned(assignments, "Service", key)]
            for key in ("ExtensionImages", "ExtensionDirectories")
        )
        return images, directories


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(device_mapper, "CONTROL", os.devnull)  # there is a device mapper
    return Host(tmp_path)


def test_the_drop_in_is_the_one_of_the_design(host: Host) -> None:
    host.unit("nginx.service", PLAIN, "web.raw")
    assert host.dropin("nginx.service") == (
        "# By confext-watcher.service: this unit starts on its last accepted stack.\n"
        "[Unit]\n"
        "Wants=confext-watcher.service\n"
        "After=confext-watcher.service\n"
        f"RequiresMountsFor={host.state}\n"
        "[Service]\n"
        "ExtensionImages=\n"
        f"ExtensionImages=-{host.state}/units/nginx.service/web.raw:ro,x-systemd.relax-extension-release-check\n"
        "ExtensionDirectories=\n"
        f"ExecStopPost={held_starts.COMMAND}\n"
    )


def test_a_unit_that_takes_no_part_gets_nothing(host: Host) -> None:
    host.unit("nginx.service")
    assert host.generate() == []
    assert list(host.output.iterdir()) == []


def test_declared_and_dropped_in_come_in_their_order(host: Host) -> None:
    text = PLAIN + "ExtensionImages=/srv/b.raw\nExtensionDirectories=/srv/d\n"
    host.unit("web.service", text, "a.raw", "c")
    images, directories = host.listed("web.service")
    assert [value.rpartition("/")[2].partition(":")[0] for value in images] == ["b.raw", "a.raw"]
    assert [value.rpartition("/")[2] for value in directories] == ["d", "c"]


def test_what_was_accepted_last_counts_and_not_what_lies_there(host: Host) -> None:
    host.unit("web.service", PLAIN, "new.raw")
    host.accept("web.service", "old.raw", "tree")
    images, directories = host.listed("web.service")
    assert images == [f"-{host.state}/units/web.service/old.raw:ro,x-systemd.relax-extension-release-check"]
    assert directories == [f"-{host.state}/units/web.service/tree"]


@pytest.mark.parametrize("form", ["content", "loop"])
def test_a_record_that_cannot_be_read_is_said_and_costs_nothing_else(host: Host, form: str) -> None:
    host.unit("web.service", PLAIN, "web.raw")
    host.unit("app.service", PLAIN, "app.raw")
    host.accept("web.service", "web.raw")
    record = host.state / "units/web.service/.state.json"
    record.unlink()
    record.symlink_to(record) if form == "loop" else record.write_text("{")
    assert host.listed("web.service")[0][0].endswith("/web.raw:ro,x-systemd.relax-extension-release-check")
    assert len(host.complaints) == 1 and "web.service/.state.json" in host.complaints[0]
    assert (host.output / "app.service.d" / DROPIN).exists()


def test_before_var_is_mounted_the_drop_in_is_made_from_what_lies_there(host: Host) -> None:
    host.unit("web.service", PLAIN, "web.raw")
    host.state.rmdir()
    assert "/units/web.service/web.raw:" in host.dropin("web.service")


def test_nothing_to_list_still_gives_the_service_a_namespace(host: Host) -> None:
    host.unit("web.service")
    (host.units / "web.service.confext.d").mkdir()
    images, directories = host.listed("web.service")
    assert images == [f"-{host.state}/units/web.service/.empty:ro,x-systemd.relax-extension-release-check"]
    assert directories == []


@pytest.mark.parametrize(
    "setting",
    [
        "DefaultDependencies=no",
        "Before=sysinit.target",
        "Before=foo.service basic.target",
        "Before=dbus.socket",
    ],
)
def test_what_starts_before_the_watcher_does_not_wait_for_it(host: Host, setting: str) -> None:
    host.unit("early.service", f"[Unit]\n{setting}\n" + PLAIN, "web.raw")
    dropin = host.dropin("early.service")
    assert "confext-watcher.service\n[" not in dropin and "[Unit]" not in dropin
    assert "/units/early.service/web.raw:" in dropin


@pytest.mark.parametrize("name", ["dbus.service", "dbus-broker.service", "systemd-journald.service"])
def test_what_the_watcher_needs_does_not_wait_for_it(host: Host, name: str) -> None:
    host.unit(name, PLAIN, "web.raw")
    assert "[Unit]" not in host.dropin(name)


def test_what_the_watcher_needs_may_be_called_otherwise(host: Host) -> None:
    host.unit("dbus-daemon.service", PLAIN, "web.raw")
    (host.units / "dbus.service").symlink_to("dbus-daemon.service")
    assert "[Unit]" not in host.dropin("dbus-daemon.service")


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("PrivateDevices=yes", True),
        ("DevicePolicy=closed", True),
        ("DeviceAllow=/dev/null rw", True),
        ("PrivateDevices=no", False),
        ("DevicePolicy=auto", False),
        ("PrivateDevices=yes\nPrivateDevices=off", False),
    ],
)
def test_a_unit_without_devices_may_use_loop_devices_and_one_with_all_is_not_restricted(
    host: Host, setting: str, allowed: bool
) -> None:
    host.unit("web.service", PLAIN + setting + "\n", "web.raw")
    assert ("DeviceAllow=block-loop rw\n" in host.dropin("web.service")) is allowed


@pytest.mark.parametrize(
    ("there", "setting", "said"),
    [
        (False, "", True),
        (False, "ExtensionImagePolicy=", True),
        (False, "ExtensionImagePolicy=root=signed\nExtensionImagePolicy=", True),
        (False, "ExtensionImagePolicy=root=signed", False),
        (True, "", False),
    ],
)
def test_without_a_device_mapper_systemd_is_not_to_set_up_verity(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, setting: str, said: bool
) -> None:
    """Unless the unit says itself which images it may have."""
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
    host.unit("web.service", f"{PLAIN}{setting}\n", "web.raw")
    policy = "ExtensionImagePolicy=root=unprotected+absent:usr=unprotected+absent:=unused+absent\n"
    assert (policy in host.dropin("web.service")) is said
    host.unit("tree.service", PLAIN, "tree")
    assert "ExtensionImagePolicy" not in host.dropin("tree.service")


def test_systemd_verifies_a_slot_that_has_beside_it_what_that_takes(
    host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At boot the device mapper may come later. systemd refuses such a slot where it must not verify."""
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path / "missing"))
    host.unit("web.service", PLAIN, "web.raw")
    host.accept("web.service", "web.raw")
    assert "ExtensionImagePolicy" in host.dropin("web.service")
    Path(host.state, "units/web.service/web.roothash").symlink_to("/store")
    assert "ExtensionImagePolicy" not in host.dropin("web.service")


def test_the_hosts_configuration_directory_is_not_mounted_on_what_images_bring(host: Host) -> None:
    host.unit("web.service", PLAIN + "ConfigurationDirectory=web web/more\n")
    (host.units / "web.service.confext.d").mkdir()
    assert "ConfigurationDirectory" not in host.dropin("web.service")
    host.drop("web.service", "web.raw")
    told = "ConfigurationDirectory=\nEnvironment=CONFIGURATION_DIRECTORY=/etc/web:/etc/web/more\n"
    assert told in host.dropin("web.service")


def test_trees_need_no_devices(host: Host) -> None:
    host.unit("web.service", PLAIN + "PrivateDevices=yes\n", "tree")
    assert "DeviceAllow" not in host.dropin("web.service")


def test_a_sandboxed_unit_is_left_as_it_is_until_it_has_a_stack_and_keeps_its_sandbox_then(
    host: Host,
) -> None:
    host.unit("web.service", PLAIN + "ProtectSystem=full\n", "web.raw")
    assert host.listed("web.service") == ([], [])
    host.accept("web.service", "web.raw")
    assert host.listed("web.service")[0]
    assert "ReadOnlyPaths=-/usr/bin\n" in host.dropin("web.service")


def test_a_unit_that_would_lose_its_sandbox_gets_no_drop_in_and_that_is_said(host: Host) -> None:
    host.unit("web.service", PLAIN + "TemporaryFileSystem=/opt\n", "web.raw")
    assert host.generate() == []
    assert host.complaints == [
        "web.service: no drop-in, it starts without a stack and gets it then: "
        "systemd would forget TemporaryFileSystem=/opt"
    ]


def test_a_unit_that_has_lost_its_sandbox_by_its_own_images_starts_on_the_accepted_ones(host: Host) -> None:
    host.unit("web.service", PLAIN + "TemporaryFileSystem=/opt\nExtensionImages=/srv/web.raw.v\n")
    assert host.listed("web.service") == ([], [])
    host.accept("web.service", "web.raw")
    (image,) = host.listed("web.service")[0]
    assert image.startswith(f"-{host.state}/units/web.service/web.raw:")
    assert host.complaints == []


def test_enabled_no_leaves_a_unit_to_systemd(host: Host) -> None:
    host.unit("web.service", PLAIN + "[X-Confext]\nEnabled=no\n", "web.raw")
    assert host.generate() == []


def test_an_instance_has_the_slots_of_its_template_until_it_was_seen(host: Host) -> None:
    host.unit("app@.service", PLAIN, "web.raw")
    host.accept("app@.service", "web.raw")
    assert host.generate() == ["app@.service"]
    assert host.listed("app@.service")[0][0].startswith(f"-{host.state}/units/app@.service/web.raw:")
    host.accept("app@one.service", "web.raw")
    assert host.generate() == ["app@.service", "app@one.service"]
    assert host.listed("app@one.service")[0][0].startswith(f"-{host.state}/units/app@one.service/web.raw:")


def test_a_unit_that_another_generator_writes_meanwhile_gets_its_drop_in(host: Host) -> None:
    host.drop("quad.service", "web.raw")
    host.drop("masked.service", "web.raw")
    (host.units / "masked.service").symlink_to("/dev/null")
    assert host.generate() == ["quad.service"]
    assert "/units/quad.service/web.raw:" in host.dropin("quad.service")


@pytest.mark.parametrize("name", ["web", "my@thing", "x@.", "web.exec", "nginx.service.exec"])
def test_what_is_not_of_a_unit_among_the_slots_costs_no_unit_its_drop_in(host: Host, name: str) -> None:
    host.unit("web.service", PLAIN, "web.raw")
    host.accept(name, "web.raw")
    assert host.generate() == ["web.service"]
    assert host.complaints == []


def test_a_bug_that_shows_with_one_unit_does_not_touch_the_others(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.unit("bad.service", PLAIN, "web.raw")
    host.unit("good.service", PLAIN, "web.raw")
    takes_part = Index.takes_part

    def broken(index: Index, unit: Unit) -> bool:
        assert unit.name != "bad.service"
        return takes_part(index, unit)

    monkeypatch.setattr(Index, "takes_part", broken)
    assert host.generate() == ["good.service"]
    assert host.complaints and host.complaints[0].startswith("bad.service: no drop-in")


def test_a_declared_sysext_tree_passes_through_as_it_is(host: Host, tmp_path: Path) -> None:
    (tmp_path / "tools/usr/lib/extension-release.d").mkdir(parents=True)
    (tmp_path / "conf/etc/extension-release.d").mkdir(parents=True)
    text = PLAIN + f"ExtensionDirectories={tmp_path}/tools -{tmp_path}/conf\n"
    host.unit("web.service", text)
    assert host.listed("web.service")[1] == [f"-{host.state}/units/web.service/conf", f"{tmp_path}/tools"]


def test_a_declared_sysext_image_passes_through_as_the_pick_of_the_moment(host: Host, tmp_path: Path) -> None:
    versions = tmp_path / "tools.raw.v"
    versions.mkdir()
    (versions / "tools_1.raw").touch()
    (versions / "tools_2.raw").touch()
    host.unit("web.service", PLAIN + f"ExtensionImages=-{versions}:ro\n", "web.raw")
    host.pass_through("web.service", str(versions))
    images, _ = host.listed("web.service")
    assert images == [
        f"-{host.state}/units/web.service/web.raw:ro,x-systemd.relax-extension-release-check",
        f"-{versions}/tools_2.raw:ro",
    ]
    host.accept("web.service", "web.raw")
    assert host.listed("web.service")[0] == images


@pytest.mark.parametrize(
    ("trial", "holds"),
    [
        (Trial("a"), True),
        (Trial("a", verdict=Verdict.GOOD, judged=1), False),
        (None, False),
    ],
)
def test_a_start_that_is_on_trial_is_held_if_it_fails(host: Host, trial: Trial | None, holds: bool) -> None:
    host.unit("web.service", PLAIN, "web.raw")
    assert "ExecStopPost=" in host.dropin("web.service")  # the first image may come at any time
    host.accept("web.service")  # the directory was seen, and nothing in it
    assert "ExecStopPost=" in host.dropin("web.service")
    host.accept("web.service", "web.raw")
    Stacks(str(host.state)).change("web.service", lambda state: replace(state, trial=trial))
    assert ("ExecStopPost=" in host.dropin("web.service")) is holds


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("many@.service", PLAIN),
        ("web.service", PLAIN + "RootDirectory=/srv/jail\n"),
        ("web.service", PLAIN + "RootImage=/srv/jail.raw\n"),
    ],
)
def test_no_start_is_held_for_which_the_hosts_shell_is_not_there_or_nothing_on_trial(
    host: Host, unit: str, text: str
) -> None:
    host.unit(unit, text, "web.raw")
    assert "ExecStopPost=" not in host.dropin(unit)


def test_names_that_are_not_utf8_survive_in_the_list_of_sysexts(host: Host) -> None:
    host.pass_through("web.service", "/srv/\udcff\n.raw", "/srv/a")
    assert unit_drop_in.read(str(host.state), "web.service") == (None, {"/srv/\udcff\n.raw", "/srv/a"}, True)
    host.accept("web.service", "web.raw")
    slots = [("web.raw", Kind.IMAGE)]
    assert unit_drop_in.read(str(host.state), "web.service") == (
        slots,
        {"/srv/\udcff\n.raw", "/srv/a"},
        False,
    )
    host.pass_through("web.service")
    assert unit_drop_in.read(str(host.state), "web.service") == (slots, frozenset(), False)


def test_a_record_without_slots_is_no_reason_for_slots_of_its_own(host: Host) -> None:
    host.unit("web@.service", PLAIN, "web.raw")
    host.pass_through("web@1.service", "/srv/a")
    host.accept("web@2.service", "web.raw")
    host.accept("web@3.service")
    assert sorted(host.generate()) == ["web@.service", "web@2.service", "web@3.service"]
    host.accept("web@1.service")
    assert "web@1.service" in host.generate()


def test_an_error_with_one_unit_does_not_touch_the_others(host: Host) -> None:
    host.unit("bad.service", PLAIN, "web.raw")
    host.unit("good.service", PLAIN, "web.raw")
    host.output.mkdir()
    (host.output / "bad.service.d").touch()
    assert host.generate() == ["good.service"]
    assert host.complaints and host.complaints[0].startswith("bad.service: no drop-in")


def test_only_the_standard_library_is_needed_and_not_what_takes_long() -> None:
    script = (
        "import sys; import watcher.generator; "
        "known = {*sys.stdlib_module_names, 'watcher', '__main__'} - {'dataclasses', 'shutil'}; "
        "print([name for name in sys.modules if name.partition('.')[0] not in known and name[0] != '_'])"
    )
    path = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-ISB", "-c", f"import sys; sys.path.insert(0, {path!r}); {script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.replace("'", '"')) == []
