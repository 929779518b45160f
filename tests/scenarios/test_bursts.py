# SPDX-License-Identifier: LGPL-2.1-or-later
"""A burst of drops is one swap and one reload; what comes during a reload makes exactly one more round."""

from __future__ import annotations

import os

import pytest

from scenarios.place import Place, Service

# A burst is over when there was nothing for longer than any pause of the tests in one.
SETTINGS = ("SettleSec=500ms",)


class Hand:
    """A reload command that tells what it reads, and goes on when it is told to."""

    def __init__(self, place: Place) -> None:
        number = next(place.numbers)
        self._begun, self._go = place.path / f"begun-{number}", place.path / f"go-{number}"
        os.mkfifo(self._begun)
        os.mkfifo(self._go)
        self.command = f"sh -c 'cat /etc/web.conf > {self._begun}; read go < {self._go}'"

    def begun(self) -> str:
        """Wait for the next reload: what it reads."""
        return self._begun.read_text().strip()

    def go(self) -> None:
        self._go.write_text("\n")


def applied(service: Service) -> list[str]:
    return [line for line in service.log_lines() if "outcome=applied" in line]


def drop_at_once(service: Service, versions: list[str]) -> None:
    """Prepared aside, then moved in, one right after the other."""
    place = service.place
    pairs = []
    for version in versions:
        aside = place.path / f"aside-{next(place.numbers)}"
        place.bring(place.confext(version), aside)
        pairs.append((aside, service.versions / f"web_{version}{place.suffix}"))
    for aside, target in pairs:
        os.rename(aside, target)


def test_a_burst_makes_one_swap_and_one_reload(service: Service) -> None:
    drop_at_once(service, ["1.1", "1.5", "1.2", "1.4", "1.3"])
    service.reloaded("1.5")
    service.put("9")
    service.reloaded("9")
    assert service.heard == ["1.5", "9"]
    service.logged("web 1.5 -> 9")
    assert len(applied(service)) == 2


def test_a_burst_of_removals_and_drops_ends_where_it_ends(service: Service) -> None:
    drop_at_once(service, ["1.1", "1.2", "1.3"])
    service.remove("1.3")
    service.remove("0")
    service.reloaded("1.2")
    service.put("9")
    service.reloaded("9")
    assert service.heard == ["1.2", "9"]


def test_nothing_happens_when_a_burst_ends_where_it_began(service: Service) -> None:
    drop_at_once(service, ["1.1", "1.2"])
    service.remove("1.2")
    service.remove("1.1")
    service.put("9")
    service.reloaded("9")
    assert service.heard == ["9"]


@pytest.mark.parametrize("shared", ["trees"], indirect=True)
def test_drops_during_a_reload_make_exactly_one_more_round(shared: Place) -> None:
    hand = Hand(shared)
    service = shared.start("--reload-command", hand.command)
    service.put("1.3")
    assert hand.begun() == "1.3"
    for version in ("1.4", "1.5", "1.6"):
        service.put(version)
    hand.go()
    assert hand.begun() == "1.6"
    hand.go()
    service.put("9")
    assert hand.begun() == "9"
    hand.go()
    service.logged("web 1.3 added")
    service.logged("web 1.3 -> 1.6 applied")
    service.logged("web 1.6 -> 9 applied")
    assert len(applied(service)) == 3


@pytest.mark.parametrize("shared", ["trees"], indirect=True)
def test_services_do_not_wait_for_each_other(shared: Place) -> None:
    hand = Hand(shared)
    slow = shared.start("--reload-command", hand.command)
    quick = [shared.start() for _ in range(2)]
    slow.put("1.3")
    for service in quick:
        service.put("1.3")
    assert hand.begun() == "1.3"
    for service in quick:  # while that one hangs
        service.reloaded("1.3")
        service.put("1.4")
        service.reloaded("1.4")
        service.logged("web 1.3 -> 1.4 applied")
    hand.go()
    slow.logged("web 1.3 added, applied")


@pytest.mark.parametrize("shared", ["trees"], indirect=True)
def test_one_drop_for_many_services(shared: Place) -> None:
    """They share a directory; each is swapped and told once."""
    common = shared.path / "common.v"
    common.mkdir()
    services = [
        shared.start("--extension-directory", str(common), "--reload-signal", "HUP") for _ in range(3)
    ]
    services[0].put("1.3", name="common", at=common)
    for service in services:
        service.logged("common 1.3 added, applied")
        assert service.has("1.3", "common.conf")


def test_no_settle_time_applies_at_once(place: Place) -> None:
    place.configure("SettleSec=0")
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


def test_what_never_ceases_to_change_is_applied_all_the_same(place: Place) -> None:
    """`SettleMaxSec=` after the first change."""
    place.configure("SettleSec=1h", "SettleMaxSec=50ms")
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")


def test_the_newest_of_three_hundred_versions(service: Service) -> None:
    suffix = service.place.suffix
    service.put("1")
    service.reloaded("1")
    for number in range(300):
        (service.versions / f"web_2.{number}{suffix}").symlink_to(f"web_1{suffix}")
    service.put("2.300")
    service.reloaded("2.300")
    service.put("2.299.1", value="older")
    (service.versions / f"web_2.300{suffix}").rename(service.place.path / "gone")
    service.reloaded("older")
    assert service.heard[-2:] == ["2.300", "older"]
