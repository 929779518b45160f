# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever the names are, a unit file says exactly what was meant, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import nasty
from watcher import generator
from watcher.images.stacks import Stacks
from watcher.managers.systemd import drop_ins, held_starts, sandbox_settings, unit_drop_in
from watcher.managers.systemd.drop_ins import DropIn, Unwritable
from watcher.managers.systemd.unit_files import DROPIN, Index
from watcher.settings import syntax, values

PATHS = st.lists(nasty.NAMES.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)
SURE = st.text("abcdefghij0123456789_+~,.=-@ \"'\\:%$#;!üß€", min_size=1, max_size=20).filter(
    lambda part: part not in (".", "..")
)


def unescaped(text: str) -> str:
    return text.replace("%%", "%")


def written(text: str) -> list[tuple[str, str, str]]:
    parsed = syntax.parse(text, "")
    assert parsed.remarks == ()
    return [(each.section, each.key, each.value) for each in parsed.assignments]


@given(PATHS, PATHS, st.booleans())
def test_a_path_is_one_word_of_one_line_or_nothing(path: str, other: str, optional: bool) -> None:
    drop_in = DropIn("for a test")
    meant = []
    for key, make in (("ExtensionImages", drop_ins.image), ("ExtensionDirectories", drop_ins.path)):
        for each in (path, other):
            try:
                drop_in.assign("Service", key, make(each, optional=optional))
            except Unwritable as error:
                assert str(error).isprintable()
                assert any(not char.isprintable() for char in each)
            else:
                meant.append((key, each))
    drop_in.assign("Unit", "After", drop_ins.token("confext-watcher.service"))
    found = []
    for section, key, value in written(str(drop_in)):
        if key == "ExtensionImages":
            ((read, options, missing),) = values.extension_images(value, unescaped)
            assert (section, options, missing) == ("Service", "", optional)
        elif key == "ExtensionDirectories":
            ((read, missing),) = values.extension_directories(value, unescaped)
            assert (section, missing) == ("Service", optional)
        else:
            assert (section, key, value) == ("Unit", "After", "confext-watcher.service")
            continue
        found.append((key, read))
    assert found == meant


@given(SURE)
def test_what_a_line_can_hold_is_never_refused(name: str) -> None:
    assert values.extension_images(drop_ins.image(f"/{name}"), unescaped) == [(f"/{name}", "", False)]
    assert values.extension_directories(drop_ins.path(f"/{name}"), unescaped) == [(f"/{name}", False)]


@pytest.mark.parametrize("line", nasty.LINES)
def test_nothing_that_ends_a_line_gets_in(line: str) -> None:
    for make in (drop_ins.image, drop_ins.path):
        with pytest.raises(Unwritable):
            make(f"/srv/a{line}ExecStartPre=+/bin/false")
    with pytest.raises(Unwritable):
        drop_ins.image("/srv/a", f"ro{line}ExecStartPre=+/bin/false")
    with pytest.raises(Unwritable):
        drop_ins.path("/srv/a", "/srv/b", options=f"rbind{line}x")
    with pytest.raises(Unwritable):
        drop_ins.token(f"rw{line}x")
    with pytest.raises(Unwritable):
        DropIn("").assign("Service", "Wants", drop_ins.Word(f"a{line}b"))
    assert len(str(DropIn(f"a{line}b")).splitlines()) == 1


@pytest.mark.parametrize(
    "path", ["", "srv", "-/srv", "/", "/srv/", "//srv", "/srv/../etc", "/srv/.", "/" + "x" * 4096]
)
def test_only_a_path_is_a_path(path: str) -> None:
    with pytest.raises(Unwritable):
        drop_ins.path(path)
    with pytest.raises(Unwritable):
        drop_ins.image(path)


@pytest.mark.parametrize("options", ["ro nosuid", 'ro"', "ro\\", "'ro", "ro\\ x"])
def test_options_that_are_no_one_word_are_refused(options: str) -> None:
    with pytest.raises(Unwritable):
        drop_ins.image("/srv/a.raw", options)


class Host:
    """A unit with a declared directory of sysexts that everybody may write to."""

    def __init__(self, base: Path) -> None:
        self.versions = base / "tools.v"
        self.output = base / "output"
        self.state = base / "state"
        self.units = base / "units"
        self.complaints: list[str] = []
        self.units.mkdir(parents=True)
        self.state.mkdir()
        self.versions.mkdir()
        (self.units / "web.service").write_text(
            f"[Service]\nExecStart=/bin/true\nExtensionDirectories={self.versions}/tools___\n"
        )

    def sysext(self, name: str) -> None:
        (Path(os.fsdecode(os.fsencode(self.versions / name))) / "usr/lib/extension-release.d").mkdir(
            parents=True
        )

    def listed(self) -> list[str]:
        """The directories that the drop-in names; it says nothing that it should not."""
        index = Index([str(self.units)])
        assert generator.generate(str(self.output), index, str(self.state), self.complaints.append)
        found = []
        for section, key, value in written((self.output / f"web.service.d/{DROPIN}").read_text()):
            assert section in ("Unit", "Service")
            if key in ("ExecStopPost", "ExtensionImagePolicy"):
                assert value in (held_starts.COMMAND, unit_drop_in.AS_IT_IS)
                continue
            assert key in ("Wants", "After", "RequiresMountsFor", "ExtensionImages", "ExtensionDirectories")
            if key == "ExtensionDirectories":
                found += values.extension_directories(value, unescaped)
        return [path for path, _ in found]


def test_a_line_of_his_own_in_a_name_of_a_sysext(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.sysext("tools_1")
    host.sysext('tools_2_a"\nExecStartPre=+id #')
    sysexts = (f"{host.versions}/tools___",)
    Stacks(str(host.state)).change("web.service", lambda state: replace(state, sysexts=sysexts))
    assert host.listed() == [f"{host.versions}/tools_1"]
    (complaint,) = host.complaints
    assert complaint.startswith("web.service: left out: ") and "ExecStartPre" in complaint
    assert complaint.isprintable()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(nasty.NAMES.map(lambda name: name[:40]))
def test_the_generator_names_a_sysext_or_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    host = Host(tmp_path_factory.mktemp("host"))
    sysexts = (f"{host.versions}/tools___",)
    Stacks(str(host.state)).change("web.service", lambda state: replace(state, sysexts=sysexts))
    host.sysext(f"tools_{name}")
    host.listed()


def test_a_line_of_his_own_in_a_name_below_what_is_bound(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("good", "a b", 'x"\nExecStartPre=+id #', "\udcff"):
        (source / name).mkdir(parents=True)
    units = tmp_path / "units"
    units.mkdir()
    (units / "web.service").write_text(
        f"[Service]\nExecStart=/bin/true\nBindReadOnlyPaths={source}:/opt\nExtensionImages=/srv/web.raw\n"
    )
    complaints: list[str] = []
    index = Index([str(units)])
    unit = index.unit("web.service")
    assert unit is not None
    text = unit_drop_in.text(index, unit, str(tmp_path / "state"), complaints.append)
    assert [value for _, key, value in written(text) if key.startswith("Bind")] == [
        f'-"{source}/a b":"/opt/a b"',
        f"-{source}/good:/opt/good",
    ]
    assert "ExecStartPre" not in {key for _, key, _ in written(text)}
    assert len(complaints) == 2 and all(each.isprintable() for each in complaints)


@given(nasty.NAMES)
def test_a_sandbox_is_kept_in_lines_of_its_own(name: str) -> None:
    parsed = syntax.parse("[Service]\nBindPaths=/srv:/opt:norbind\nReadOnlyPaths=/usr\n", "")
    kept = sandbox_settings.repair(parsed.assignments, lambda path: [name] if path == "/srv" else [])
    drop_in = DropIn("for a test")
    unit_drop_in._assign_again(drop_in, kept.again)
    for _, key, value in written(str(drop_in)):
        assert key in ("BindPaths", "ReadOnlyPaths")
        (word,) = values.split(value)
        if key == "BindPaths":
            assert word.replace("%%", "%") == f"-/srv/{name}:/opt/{name}:norbind"
