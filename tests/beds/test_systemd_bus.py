# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus that goes away, at any moment of a round: nothing waits for it, nothing is lost, and all is made up for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, Host, Journal
from beds.site import STATE, WEB, drop, run, sees
from support import cut_bus, needs
from watcher.records.state import decoded

pytestmark = [needs.bed, needs.tool("mksquashfs")]

TOLD = "/run/cut/told"
UNIT = f"""[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'cp /etc/web.conf {TOLD}'
[X-Confext]
SettleSec=0
"""
CHECKED = f"{UNIT}Check=/bin/true\nHealthCheck=/bin/true\n"
# Each way to lose the bus takes half of the pieces.
FIRST = {"": 1, "dbus": 2}
EACH = 2


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


class Way:
    """The watcher's way to the bus, which can be cut."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._directory = host.bed.path("/run/cut")
        self._directory.mkdir()
        shutil.copyfile(cut_bus.__file__, self._directory / "cut_bus.py")
        start = "systemd-run --quiet --unit=cut-bus python3 /run/cut/cut_bus.py /run/cut"
        host.bed.run(["sh", "-c", f"{start} && while ! test -S /run/cut/bus; do sleep 0.01; done"])
        drop_in = host.bed.path("/run/systemd/system/confext-watcher.service.d/cut.conf")
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text("[Service]\nEnvironment=DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/cut/bus\n")
        remove = "systemctl stop cut-bus; systemctl start dbus.socket dbus;"
        remove += f"rm -r /run/cut /run/systemd/system/{drop_in.parent.name}; systemctl daemon-reload"
        host.stack.callback(host.bed.run, ["sh", "-c", remove])
        host.systemctl("daemon-reload")

    def arm(self, piece: int, how: str) -> None:
        (self._directory / "coming").write_text(f"{piece} {how}\n")
        (self._directory / "coming").rename(self._directory / "armed")

    @property
    def is_cut(self) -> bool:
        return (self._directory / "cut").exists()

    def mend(self) -> None:
        # The start limit of the bus is not what is tested.
        self._host.systemctl("reset-failed", "dbus.socket", "dbus")
        self._host.systemctl("start", "dbus.socket", "dbus")
        for name in ("armed", "cut"):
            (self._directory / name).unlink(missing_ok=True)


def eventually(condition: Callable[[], object], journal: Journal) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        said = [entry["MESSAGE"] for entry in journal.said()[-10:]]
        assert time.monotonic() < deadline, "\n".join(said)
        time.sleep(0.01)


def idle(host: Host) -> bool:
    """Nothing is on trial, and this start of the service is not owed a reload."""
    path = f"{STATE}/units/{WEB}/.state.json"
    state = decoded(host.bed.run(["cat", path]).stdout.encode(), path)
    judged = state.trial is None or state.trial.verdict is not None
    return judged and state.owed != host.bed.property(WEB, "InvocationID")


def told(host: Host) -> str:
    path = host.bed.path(TOLD)
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("how", ["", "dbus"])
def test_wherever_a_round_loses_the_bus_the_next_one_brings_it_to_its_end(host: Host, how: str) -> None:
    way = Way(host)
    journal = run(host, CHECKED, {"web.conf": "1"})
    version, cuts = 1, 0
    for piece in range(FIRST[how], 100, EACH):
        version += 1
        way.arm(piece, how)
        drop(host, version, {"web.conf": str(version)})
        done = str(version)
        eventually(lambda: way.is_cut or (told(host) == done and idle(host)), journal)  # noqa: B023
        if not way.is_cut:
            break
        cuts += 1
        version += 1
        drop(host, version, {"web.conf": str(version)})
        way.mend()
        done = str(version)
        eventually(lambda: told(host) == done and idle(host), journal)  # noqa: B023
        assert host.see(WEB, "/etc/web.conf") == done
    else:
        pytest.fail("more pieces than that")
    assert cuts > 3
    journal.until(lambda entry: f"-> {version} applied in" in entry["MESSAGE"])
    assert not [entry["MESSAGE"] for entry in journal.said() if "a bug" in entry["MESSAGE"]]


def test_what_is_dropped_while_there_is_no_bus_is_in_place_and_told_once_there_is(host: Host) -> None:
    journal = run(host, UNIT.replace("/run/cut/told", "/run/told"), {"web.conf": "1"})
    host.stack.callback(host.bed.run, ["sh", "-c", "systemctl start dbus.socket dbus; rm -f /run/told"])
    host.systemctl("stop", "dbus.socket", "dbus")
    drop(host, 2, {"web.conf": "2"})
    sees(host, "2")
    journal.until(lambda entry: "it is not told yet: reload was not possible" in entry["MESSAGE"])
    # A new entry needs a daemon-reload before the service is told: its ExecReload= sees what the drop-in lists.
    host.drop(host.image("more_1", {"more.conf": "more"}), WEB, "more.raw.v/more_1.raw")
    sees(host, "more", path="/etc/more.conf")
    drop(host, 3, {"web.conf": "3"})
    sees(host, "3")
    assert not host.bed.path("/run/told").exists()
    warned = [entry["MESSAGE"] for entry in journal.said() if "not told yet" in entry["MESSAGE"]]
    assert len(warned) == len(set(warned)), warned
    host.systemctl("start", "dbus.socket", "dbus")
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "applied")
    assert "reload done" in entry["MESSAGE"]
    assert host.bed.path("/run/told").read_text() == "3"
    assert "more.raw" in host.bed.property(WEB, "ExtensionImages")


def test_an_operator_is_not_kept_waiting_for_the_bus(host: Host) -> None:
    journal = run(host, UNIT.replace("/run/cut/told", "/run/told"), {"web.conf": "1"})
    host.stack.callback(host.bed.run, ["sh", "-c", "systemctl start dbus.socket dbus; rm -f /run/told"])
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    host.systemctl("stop", "dbus.socket", "dbus")
    host.bed.run(["confext-watcher", "rollback", WEB], check=False, timeout=30)
    sees(host, "1")
    host.systemctl("start", "dbus.socket", "dbus")
    eventually(lambda: host.bed.path("/run/told").read_text() == "1", journal)
