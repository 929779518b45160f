# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a drop-in has to repeat of a unit's sandbox, because systemd forgets it."""

from __future__ import annotations

import pytest

from watcher.managers.systemd.sandbox_settings import Again, Repair, repair
from watcher.settings import syntax

TREE = {"/usr": ["bin", "own"], "/opt": ["a b"], "/srv": ["x", "y%"], "/root/usr": ["bin", "inner"]}


def of(*settings: str) -> Repair:
    parsed = syntax.parse("[Service]\n" + "\n".join(settings) + "\n", "")
    return repair(parsed.assignments, lambda path: TREE.get(path, []))


def test_nothing_is_needed_where_nothing_would_be_forgotten() -> None:
    for setting in (
        "ProtectSystem=strict",
        "ProtectSystem=no",
        "ReadOnlyPaths=/etc /var",
        "BindPaths=/srv:/mnt",
    ):
        assert of(setting) == Repair(), setting


@pytest.mark.parametrize("setting", ["ProtectSystem=full", "ProtectSystem=yes", "ReadOnlyPaths=-/usr/ /var"])
def test_a_read_only_usr_is_said_for_each_directory_in_it(setting: str) -> None:
    repaired = of(setting)
    assert repaired.needed and repaired.lost == ()
    assert Again("ReadOnlyPaths", ("/usr/own",)) in repaired.again
    assert Again("ReadOnlyPaths", ("/usr/share",)) in repaired.again


def test_the_directories_are_those_of_the_units_own_root() -> None:
    repaired = of("RootDirectory=/root", "ProtectSystem=full")
    assert Again("ReadOnlyPaths", ("/usr/inner",)) in repaired.again
    assert Again("ReadOnlyPaths", ("/usr/own",)) not in repaired.again


def test_a_bind_mount_on_a_hierarchy_is_said_for_each_thing_in_its_source() -> None:
    assert of("BindReadOnlyPaths=-/srv:/opt:norbind").again == (
        Again("BindReadOnlyPaths", ("/srv/x", "/opt/x"), "norbind"),
        Again("BindReadOnlyPaths", ("/srv/y%", "/opt/y%"), "norbind"),
    )
    assert of("BindPaths=/opt").again == (Again("BindPaths", ("/opt/a b", "/opt/a b")),)


@pytest.mark.parametrize(
    "setting",
    [
        "TemporaryFileSystem=/opt",
        "TemporaryFileSystem=/usr/:ro",
        "BindPaths=/srv:/etc",
        "MountImages=/x.raw:/opt",
    ],
)
def test_what_cannot_be_said_otherwise_is_lost(setting: str) -> None:
    repaired = of(setting)
    assert repaired.lost == (setting,) and repaired.needed


def test_a_setting_that_was_reset_counts_no_more() -> None:
    assert (
        of("TemporaryFileSystem=/opt", "TemporaryFileSystem=", "ProtectSystem=full", "ProtectSystem=")
        == Repair()
    )
