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
