# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watcher on real systemd, killed between two steps, or stuck: no service is ever left with half of anything."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, Host, Journal
from beds.site import STATE, WEB, drop, kept, run, sees
from support import dying, needs
from watcher.records.state import decoded

pytestmark = [needs.bed, needs.tool("mksquashfs")]

# While /run/dying/hold is there the watcher is not started, whoever asks for it.
DYING = """[Unit]
ConditionPathExists=!/run/dying/hold
[Service]
Restart=no
Environment=PYTHONPATH=/usr/lib/confext-watcher DYING_ARMED=/run/dying/armed
EnvironmentFile=/run/dying/step
ExecStart=
ExecStart=/usr/bin/python3 -B /run/dying/dying.py
"""
TELLS = """[Unit]
StartLimitIntervalSec=0
[Service]
ExecStartPre=/bin/sh -c 'cp /etc/web.conf /run/dying/seen-pre'
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'cp /etc/web.conf /run/dying/seen-reload; ! grep -q bad /etc/web.conf'
[X-Confext]
SettleSec=0
"""
# Each bed takes some of the steps, the two of them others.
FIRST = {"262": 1, "257": 5}
EACH = 8


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


class Dying:
    """The watcher, which dies before one of the steps that it takes for what is dropped next."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._directory = host.bed.path("/run/dying")
        self._directory.mkdir()
        shutil.copyfile(dying.__file__, self._directory / "dying.py")
        drop_in = host.bed.path("/run/systemd/system/confext-watcher.service.d/dying.conf")
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text(DYING)
        remove = f"rm -r /run/dying /run/systemd/system/{drop_in.parent.name}; systemctl daemon-reload"
        host.stack.callback(host.bed.run, ["sh", "-c", remove])
        self.next_step(0)

    def next_step(self, step: int) -> None:
        """Nothing is to die of until `arm()`, and then the watcher that is started after this."""
        for name in ("armed", "hold"):
            (self._directory / name).unlink(missing_ok=True)
        (self._directory / "step").write_text(f"DYING_STEP={step}\n")

    def arm(self) -> None:
        (self._directory / "armed").touch()
        (self._directory / "hold").touch()

    def seen(self, when: str) -> str:
        return (self._directory / f"seen-{when}").read_text()

    @property
    def dead(self) -> bool:
        return self._host.main_pid("confext-watcher") == 0

    @property
    def idle(self) -> bool:
        """Nothing is on trial, and this start of the service is not owed a reload."""
        path = f"{STATE}/units/{WEB}/.state.json"
        state = decoded(self._host.bed.run(["cat", path]).stdout.encode(), path)
        judged = state.trial is None or state.trial.verdict is not None
        return judged and state.owed != self._host.bed.property(WEB, "InvocationID")


def eventually(condition: Callable[[], object], journal: Journal) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        said = [entry["MESSAGE"] for entry in journal.said()[-10:]]
        assert time.monotonic() < deadline, "\n".join(said)


def outcome(journal: Journal, version: int, outcome: str) -> bool:
    """Whether that was said about a version by now."""
    found = [entry for entry in journal.said() if entry.get("CONFEXT_VERSION") == str(version)]
    return outcome in [entry.get("CONFEXT_OUTCOME") for entry in found]


def dies(host: Host, watcher: Dying, journal: Journal, version: int, text: str, end: str) -> bool:
    """Whether the watcher dies of what is dropped; else it came to the end of its work first."""
    eventually(lambda: watcher.idle, journal)
    watcher.arm()
    drop(host, version, {"web.conf": text})
    eventually(lambda: watcher.dead or (outcome(journal, version, end) and watcher.idle), journal)
    return watcher.dead


def steps(host: Host) -> range:
    return range(FIRST[host.bed.version], 60, EACH)


def test_killed_in_the_middle_of_a_drop_everything_shows_one_accepted_stack(host: Host) -> None:
    watcher = Dying(host)
    journal = run(host, TELLS, {"web.conf": "1"})
    mounts = host.own_mounts()
    shown = set()
    for version, step in enumerate(steps(host), 2):
        watcher.next_step(step)
        host.systemctl("restart", "confext-watcher")
        if not dies(host, watcher, journal, version, str(version), "applied"):
            break
        assert host.see(WEB, "/etc/web.conf") in (str(version - 1), str(version))
        # Nobody is there to help: each process gets its namespace from systemd alone.
        host.systemctl("restart", WEB)
        host.systemctl("reload", WEB)
        views = {watcher.seen("pre"), watcher.seen("reload"), host.see(WEB, "/etc/web.conf")}
        assert len(views) == 1 and views < {str(version - 1), str(version)}, step
        shown.add(views.pop() == str(version))
        watcher.next_step(0)
        host.systemctl("start", "confext-watcher")
        sees(host, str(version))
    else:
        pytest.fail("more steps than that")
    assert shown == {False, True}  # or there were no steps in between
    assert host.own_mounts() == mounts


def test_killed_on_the_way_back_the_next_one_brings_it_to_its_end(host: Host) -> None:
    watcher = Dying(host)
    journal = run(host, TELLS, {"web.conf": "good"})
    slot, pid = kept(host), host.main_pid(WEB)
    for version, step in enumerate(steps(host), 2):
        watcher.next_step(step)
        host.systemctl("restart", "confext-watcher")
        died = dies(host, watcher, journal, version, f"bad {version}", "rolled-back")
        watcher.next_step(0)
        if died:
            host.systemctl("start", "confext-watcher")
            done = functools.partial(outcome, journal, version, "rolled-back")
            eventually(lambda done=done: done() and watcher.idle, journal)  # type: ignore[misc]
        assert (host.see(WEB, "/etc/web.conf"), watcher.seen("reload")) == ("good", "good"), step
        assert kept(host) == slot and not outcome(journal, version, "applied"), step
        if not died:
            break
        # Or there are more steps each time.
        host.confext_dir(WEB).joinpath(f"site.raw.v/site_{version}.raw").unlink()
    else:
        pytest.fail("more steps than that")
    assert version > 4 and host.main_pid(WEB) == pid


WATCHDOG = "[Service]\nWatchdogSec=2\nTimeoutAbortSec=2\nRestartSec=100ms\n"


def test_a_watcher_that_is_stuck_is_started_again_and_the_services_do_not_notice(host: Host) -> None:
    drop_in = host.bed.path("/run/systemd/system/confext-watcher.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(WATCHDOG)
    remove = f"rm -r /run/systemd/system/{drop_in.parent.name}; systemctl daemon-reload"
    host.stack.callback(host.bed.run, ["sh", "-c", remove])
    host.bed.path("/run/dying").mkdir()
    host.stack.callback(host.bed.run, ["rm", "-r", "/run/dying"])
    journal = run(host, TELLS, {"web.conf": "1"})
    mounts, pid, stuck = host.mounts(WEB), host.main_pid(WEB), host.main_pid("confext-watcher")
    host.systemctl("kill", "--signal=STOP", "confext-watcher")
    journal.until(lambda entry: "watching for" in entry["MESSAGE"])
    assert host.main_pid("confext-watcher") != stuck
    assert host.bed.property("confext-watcher", "NRestarts") == "1"
    assert (host.mounts(WEB), host.main_pid(WEB)) == (mounts, pid)
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    # The one that is not stuck lives: it has fed the watchdog for longer than that waits.
    alive = 'until [ $(($(date +%s) - $(date +%s -d "$0"))) -gt 3 ]; do sleep 0.1; done'
    since = host.bed.property("confext-watcher", "ActiveEnterTimestamp")
    host.bed.run(["bash", "-c", alive, since], timeout=SECONDS)
    assert host.bed.property("confext-watcher", "NRestarts") == "1"
