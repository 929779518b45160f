# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which services take part, in search paths made for the purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watcher.managers.systemd import unit_files
from watcher.managers.systemd.unit_files import Index
from watcher.model import Declared, Remark

PLAIN = "[Service]\nExecStart=/bin/true\n"
DECLARES = "[Service]\nExecStart=/bin/true\nExtensionImages=/srv/web.raw\n"


class Paths:
    """`etc` before `usr`, as in systemd's own search path."""

    def __init__(self, base: Path) -> None:
        self.etc = base / "etc"
        self.attached = base / "system.attached"
        self.usr = base / "usr"
        for path in self.directories:
            path.mkdir()

    @property
    def directories(self) -> tuple[Path, ...]:
        return self.etc, self.attached, self.usr

    def index(self) -> Index:
        return Index([str(path) for path in self.directories])

    def services(self, *known: str) -> list[str]:
        return sorted(self.index().services(known))

    def declared(self, name: str) -> tuple[Declared, tuple[Remark, ...]]:
        index = self.index()
        unit = index.unit(name)
        assert unit
        return unit_files.declared(unit, index.parse(unit), index.search_path)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def test_a_unit_that_declares_takes_part(paths: Paths) -> None:
    (paths.usr / "web.service").write_text(DECLARES)
    (paths.usr / "other.service").write_text(PLAIN)
    assert paths.services() == ["web.service"]


def test_a_declaration_that_a_drop_in_takes_back_does_not_count(paths: Paths) -> None:
    (paths.usr / "web.service").write_text(DECLARES)
    (paths.etc / "web.service.d").mkdir()
    (paths.etc / "web.service.d/reset.conf").write_text("[Service]\nExtensionImages=\n")
    assert paths.services() == []


def test_a_comment_declares_nothing(paths: Paths) -> None:
    (paths.usr / "web.service").write_text(PLAIN + "#ExtensionImages=/srv/web.raw\n")
    assert paths.services() == []


def test_a_confext_directory_is_enough_wherever_it_is(paths: Paths) -> None:
    (paths.usr / "web.service").write_text(PLAIN)
    (paths.etc / "web.service.confext.d").mkdir()
    assert paths.services() == ["web.service"]


def test_a_confext_directory_without_a_unit_is_nothing(paths: Paths) -> None:
    (paths.etc / "web.service.confext.d").mkdir()
    assert paths.services() == []


@pytest.mark.parametrize("form", ["file", "dangling", "null"])
def test_what_is_not_a_directory_is_not_a_confext_directory(paths: Paths, form: str) -> None:
    (paths.usr / "web.service").write_text(PLAIN)
    path = paths.etc / "web.service.confext.d"
    if form == "file":
        path.touch()
    else:
        path.symlink_to("/dev/null" if form == "null" else "/nowhere")
    assert paths.services() == []


@pytest.mark.parametrize("form", ["null", "empty"])
def test_a_masked_unit_does_not_take_part(paths: Paths, form: str) -> None:
    (paths.usr / "web.service").write_text(DECLARES)
    (paths.usr / "web.service.confext.d").mkdir()
    if form == "null":
        (paths.etc / "web.service").symlink_to("/dev/null")
    else:
        (paths.etc / "web.service").touch()
    assert paths.services() == []


def write(path: Path, text: str = "[Service]\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_drop_ins_are_read_in_order_of_their_names_over_all_directories(paths: Paths) -> None:
    etc, usr = paths.etc, paths.usr
    (etc / "alias.service").symlink_to("foo@x.service")
    expected = [
        write(usr / "service.d/05-all.conf"),
        write(usr / "foo@x.service.d/10-a.conf"),
        write(etc / "foo@.service.d/20-b.conf"),
        write(usr / "alias.service.d/25-alias.conf"),
        write(etc / "foo@x.service.d/30-c.conf"),
    ]
    write(usr / "foo@x.service.d/20-b.conf")  # a later search path
    write(etc / "foo@.service.d/30-c.conf")  # less specific
    write(usr / "foo@x.service.d/40-masked.conf")
    (etc / "foo@.service.d/40-masked.conf").symlink_to("/dev/null")
    write(etc / "foo@x.service.d/50-empty.conf", "")
    write(etc / "foo@x.service.d/note.txt")
    write(etc / "foo@x.service.d/.60-hidden.conf")
    (etc / "foo@x.service.d/70-directory.conf").mkdir()
    write(etc / "bar.service.d/10-other.conf")
    write(etc / "foo.service.d/10-other.conf")
    unit = paths.index().unit("foo@x.service", unwritten=True)
    assert unit and list(unit.dropins) == expected


def test_the_file_of_a_unit(paths: Paths) -> None:
    own, template = write(paths.usr / "foo@own.service"), write(paths.usr / "foo@.service")
    index = paths.index()
    found = [index.unit(name) for name in ("foo@own.service", "foo@x.service", "none.service")]
    assert [unit and unit.fragment for unit in found] == [own, template, None]
    (paths.etc / "foo@own.service").symlink_to("/dev/null")
    assert paths.index().unit("foo@own.service") is None


@pytest.mark.parametrize(
    ("unit", "directory"),
    [
        ("web.service", "web.service.d"),
        ("web-front.service", "web-.service.d"),
        ("web.service", "service.d"),
    ],
)
def test_a_drop_in_declares_for_all_it_applies_to(paths: Paths, unit: str, directory: str) -> None:
    (paths.usr / unit).write_text(PLAIN)
    (paths.etc / directory).mkdir()
    (paths.etc / directory / "images.conf").write_text("[Service]\nExtensionDirectories=/srv/web\n")
    assert paths.services() == [unit]


def test_our_own_drop_in_declares_nothing(paths: Paths) -> None:
    (paths.usr / "web.service").write_text(PLAIN)
    (paths.etc / "web.service.d").mkdir()
    (paths.etc / "web.service.d" / unit_files.DROPIN).write_text(
        "[Service]\nExtensionImages=/slots/web.raw\n"
    )
    assert paths.services() == []


def test_an_alias_is_the_unit_itself(paths: Paths) -> None:
    (paths.usr / "nginx.service").write_text(PLAIN)
    (paths.etc / "web.service").symlink_to(paths.usr / "nginx.service")
    (paths.etc / "web.service.confext.d").mkdir()
    index = paths.index()
    assert list(index.services()) == ["nginx.service"]
    assert index.own_name("web.service") == "nginx.service"
    unit = index.unit("web.service")
    assert unit and unit.names == ("nginx.service", "web.service")
    assert str(paths.etc / "web.service.confext.d") in unit_files.confext_dirs(unit.names, index.search_path)


def test_a_linked_unit_file_outside_the_search_path_is_no_alias(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "other.service").write_text(DECLARES)
    (paths.etc / "web.service").symlink_to(tmp_path / "other.service")
    assert paths.services() == ["web.service"]


def test_links_that_chase_their_tails_are_nothing(paths: Paths) -> None:
    (paths.etc / "a.service").symlink_to(paths.etc / "b.service")
    (paths.etc / "b.service").symlink_to(paths.etc / "a.service")
    (paths.etc / "a.service.confext.d").mkdir()
    assert paths.services() == []


@pytest.mark.parametrize("form", ["loop", "through a file", "fifo"])
@pytest.mark.parametrize(
    "name",
    [
        "x.service",
        "web.service.d",
        "web.service.d/x.conf",
        "service.d",
        "service.d/x.conf",
        "x.service.confext.d",
    ],
)
def test_one_file_that_cannot_be_read_costs_no_unit_its_part(paths: Paths, name: str, form: str) -> None:
    # Enough of them for some to come after it in the order of the directory.
    units_there = [f"web{number or ''}.service" for number in range(20)]
    for unit in units_there:
        (paths.etc / unit).write_text(DECLARES)
    path = paths.etc / name
    path.parent.mkdir(exist_ok=True)
    if form == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if form == "loop" else "/etc/passwd/nothing")
    assert paths.services() == sorted(units_there)


def test_a_template_takes_part_and_so_do_its_known_instances(paths: Paths) -> None:
    (paths.usr / "app@.service").write_text(PLAIN)
    (paths.etc / "app@.service.confext.d").mkdir()
    assert paths.services() == ["app@.service"]
    assert paths.services("app@one.service", "gone@two.service") == ["app@.service", "app@one.service"]


def test_an_instance_with_a_directory_of_its_own_takes_part_without_its_template(paths: Paths) -> None:
    (paths.usr / "app@.service").write_text(PLAIN)
    (paths.etc / "app@one.service.confext.d").mkdir()
    assert paths.services() == ["app@one.service"]


def test_an_instance_linked_to_its_template_is_no_alias(paths: Paths) -> None:
    (paths.usr / "app@.service").write_text(DECLARES)
    (paths.etc / "app@one.service").symlink_to(paths.usr / "app@.service")
    assert paths.services("app@one.service") == ["app@.service", "app@one.service"]


def test_an_alias_of_a_template_is_one_of_each_instance(paths: Paths) -> None:
    (paths.usr / "getty@.service").write_text(PLAIN)
    (paths.usr / "autovt@.service").symlink_to("getty@.service")
    unit = paths.index().unit("autovt@tty1.service")
    assert unit and unit.names == ("getty@tty1.service", "autovt@tty1.service")


def test_a_portable_service_is_left_alone(paths: Paths) -> None:
    (paths.attached / "web.service").write_text(DECLARES)
    (paths.attached / "web.service.confext.d").mkdir()
    assert paths.services() == []


def test_directories_come_name_by_name_and_the_instance_before_its_template() -> None:
    assert unit_files.confext_dirs(["app@one.service", "alias.service"], ["/etc", "/usr"]) == (
        "/etc/app@one.service.confext.d",
        "/etc/app@.service.confext.d",
        "/usr/app@one.service.confext.d",
        "/usr/app@.service.confext.d",
        "/etc/alias.service.confext.d",
        "/usr/alias.service.confext.d",
    )


def test_declarations_come_from_all_files_in_order_with_specifiers_resolved(paths: Paths) -> None:
    (paths.usr / "app@.service").write_text("[Service]\nExtensionImages=/srv/%p.raw\n")
    (paths.etc / "app@.service.d").mkdir()
    (paths.etc / "app@.service.d/more.conf").write_text(
        "[Service]\nExtensionImages=-/srv/%i.raw:ro\nExtensionDirectories=-/srv/tree\n"
    )
    declared, remarks = paths.declared("app@one.service")
    assert [(e.path, e.optional, e.options) for e in declared.images] == [
        ("/srv/app.raw", False, ""),
        ("/srv/one.raw", True, "ro"),
    ]
    assert [(e.path, e.optional) for e in declared.directories] == [("/srv/tree", True)]
    assert remarks == ()


def test_a_template_itself_has_nothing_that_differs_by_instance(paths: Paths) -> None:
    (paths.usr / "app@.service").write_text(
        "[Service]\nExtensionImages=/srv/%p.raw /srv/%i.raw\nExtensionDirectories=/srv/100%%i\n"
    )
    declared, remarks = paths.declared("app@.service")
    assert [entry.path for entry in declared.images] == ["/srv/app.raw"]
    assert [entry.path for entry in declared.directories] == ["/srv/100%i"]
    assert [remark.text for remark in remarks] == ["ignored: it is another one for each instance"]


def test_a_value_that_will_not_do_is_said_with_file_and_line(paths: Paths) -> None:
    (paths.usr / "web.service").write_text("[Service]\n\nExtensionImages=relative.raw\n")
    _, (remark,) = paths.declared("web.service")
    assert (remark.path, remark.text) == (
        f"{paths.usr}/web.service:3",
        "ignored: not an absolute path: relative.raw",
    )
