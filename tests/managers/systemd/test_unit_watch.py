# SPDX-License-Identifier: LGPL-2.1-or-later
"""That no change of a unit's files is missed, and none of others told."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from watcher.managers.systemd import unit_watch
from watcher.managers.systemd.unit_files import DROPIN, Index, Unit


class Host:
    """Two places of unit files, and what generators make."""

    def __init__(self, base: Path) -> None:
        self.etc, self.usr, self.made = base / "etc", base / "usr", base / "generator"
        self.search_path = tuple(map(str, (self.etc, self.usr, self.made)))
        for path in (self.etc, self.usr, self.made):
            path.mkdir()
        self.write(self.usr / "a-web.service")
        self.write(self.usr / "other.service")
        self.write(self.usr / "a-web.service.d/one.conf")
        self.write(self.made / f"a-web.service.d/{DROPIN}")

    def write(self, path: Path, text: str = "[X-Confext]\n") -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    @property
    def unit(self) -> Unit:
        unit = Index(self.search_path).unit("a-web.service")
        assert unit
        return unit


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


CHANGES: dict[str, Callable[[Host], object]] = {
    "the unit file is written": lambda host: host.write(host.usr / "a-web.service", "[Service]\n"),
    "it is overridden": lambda host: host.write(host.etc / "a-web.service"),
    "a drop-in is written": lambda host: host.write(host.usr / "a-web.service.d/one.conf", "[Unit]\n"),
    "a drop-in comes": lambda host: host.write(host.usr / "a-web.service.d/two.conf"),
    "a drop-in goes": lambda host: (host.usr / "a-web.service.d/one.conf").unlink(),
    "one for its prefix comes": lambda host: host.write(host.etc / "a-.service.d/two.conf"),
    "one for all comes": lambda host: host.write(host.etc / "service.d/two.conf"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_a_unit_says_is_seen(host: Host, change: Callable[[Host], object]) -> None:
    unit = host.unit
    before = unit_watch.state(host.search_path, unit)
    assert unit_watch.state(host.search_path, unit) == before
    change(host)
    assert unit_watch.state(host.search_path, unit) != before


def test_what_systemd_has_written_itself_is_no_change(host: Host) -> None:
    unit = host.unit
    before = unit_watch.state(host.search_path, unit)
    host.write(host.made / f"a-web.service.d/{DROPIN}", "[Unit]\n")
    host.write(host.made / "a-web.service.d/other.conf")
    assert unit_watch.state(host.search_path, unit) == before


def test_its_own_files_and_those_of_its_prefixes_are_watched_and_no_others(host: Host) -> None:
    (host.etc / "b.service").symlink_to(host.usr.parent / "elsewhere.service")
    host.write(host.usr.parent / "elsewhere.service")
    linked = Index(host.search_path).unit("b.service")
    assert linked
    found = {
        one.path: one.pattern or "" for one in unit_watch.interests(host.search_path, [host.unit, linked])
    }
    assert set(found) == {*host.search_path, f"{host.usr}/a-web.service.d", str(host.usr.parent)}

    def matter(path: Path) -> list[str]:
        names = "a-web.service a-web.service.d a-.service.d service.d b.service.d c.service elsewhere.service x.conf"
        return [
            name for name in [*names.split(), "c.service.confext.d"] if re.fullmatch(found[str(path)], name)
        ]

    own = [
        "a-web.service",
        "a-web.service.d",
        "a-.service.d",
        "service.d",
        "b.service.d",
        "c.service.confext.d",
    ]
    assert matter(host.etc) == matter(host.usr) == own
    assert matter(host.made) == ["c.service.confext.d"]
    assert matter(host.usr / "a-web.service.d") == ["x.conf"]
    assert matter(host.usr.parent) == ["elsewhere.service"]
