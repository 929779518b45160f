# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of units, where their files lie, and their specifiers (systemd.unit(5))."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watcher.settings import architectures, unit_names
from watcher.settings.unit_names import Specifiers, UnitName


@pytest.mark.parametrize(
    ("full", "prefix", "instance", "template"),
    [
        ("nginx.service", "nginx", None, None),
        ("foo@.service", "foo", "", None),
        ("foo@a.b-c.service", "foo", "a.b-c", "foo@.service"),
        ("foo-bar@x@y.service", "foo-bar", "x@y", "foo-bar@.service"),
        ("dev-a\\x2db.device", "dev-a\\x2db", None, None),
    ],
)
def test_the_parts_of_a_name(full: str, prefix: str, instance: str | None, template: str | None) -> None:
    name = UnitName(full)
    assert (name.prefix, name.instance, name.template) == (prefix, instance, template)


@pytest.mark.parametrize(
    "full", ["", "nginx", ".service", "@x.service", "a b.service", "a/b.service", "a" * 300]
)
def test_what_is_no_unit_name(full: str) -> None:
    with pytest.raises(ValueError, match="not a unit name"):
        UnitName(full)


@pytest.mark.parametrize(
    ("unit", "names"),
    [
        ("nginx.service", ["nginx.service"]),
        ("foo-bar-baz.service", ["foo-bar-baz.service", "foo-bar-.service", "foo-.service"]),
        ("foo@x.service", ["foo@x.service", "foo@.service"]),
        (
            "foo-bar@x.service",
            ["foo-bar@x.service", "foo-bar@.service", "foo-.service", "foo-@x.service", "foo-@.service"],
        ),
        ("-foo.service", ["-foo.service"]),
    ],
)
def test_the_drop_in_directories_of_a_unit(unit: str, names: list[str]) -> None:
    assert unit_names.drop_in_names(unit) == names


def write(path: Path, text: str = "[Service]\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_drop_ins_are_read_in_order_of_their_names_over_all_directories(tmp_path: Path) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
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
    assert unit_names.drop_ins("foo@x.service", [str(etc), str(usr)], ["alias.service"]) == expected


def test_the_file_of_a_unit(tmp_path: Path) -> None:
    etc, usr = tmp_path / "etc", tmp_path / "usr"
    paths = [str(etc), str(usr)]
    own, template = write(usr / "foo@own.service"), write(usr / "foo@.service")
    assert unit_names.fragment("foo@own.service", paths) == own
    assert unit_names.fragment("foo@x.service", paths) == template
    assert unit_names.fragment("none.service", paths) is None
    etc.mkdir()
    (etc / "foo@own.service").symlink_to("/dev/null")
    assert unit_names.fragment("foo@own.service", paths) is None


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("plain", "plain"),
        ("%n %N %p %i %I", "foo-b\\x2da@x-y.service foo-b\\x2da@x-y foo-b\\x2da x-y x/y"),
        ("%P %j %J %f", "foo/b-a b\\x2da b-a /x/y"),
        (
            "%t %S %C %L %E %T %V %% %u %U %h",
            "/run /var/lib /var/cache /var/log /etc /tmp /var/tmp % root 0 /root",
        ),
        ("%y %Y", "/etc/systemd/system/foo.service /etc/systemd/system"),
        ("100%", "100%"),
    ],
)
def test_specifiers(text: str, expanded: str) -> None:
    specifiers = Specifiers("foo-b\\x2da@x-y.service", "/etc/systemd/system/foo.service")
    assert specifiers.expand(text) == expanded


def test_an_unknown_specifier_spoils_the_value() -> None:
    with pytest.raises(ValueError, match="the specifier %z is not known"):
        Specifiers("nginx.service").expand("/a%z")


def test_specifiers_of_the_host(tmp_path: Path) -> None:
    write(tmp_path / "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    write(tmp_path / "usr/lib/os-release", "ID=debian\nVERSION_ID=13\n")
    specifiers = Specifiers("nginx.service", root=str(tmp_path))
    assert specifiers.expand("%m %o-%w%B") == "0123456789abcdef0123456789abcdef debian-13"
    assert (
        specifiers.expand("%v %H %a")
        == f"{os.uname().release} {os.uname().nodename} {architectures.native()}"
    )
    with pytest.raises(ValueError, match="/proc/sys/kernel/random/boot_id cannot be read: No such file"):
        specifiers.expand("%b")
