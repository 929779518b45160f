# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher run`: it starts, stops, starts again, and services hardly notice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from scenarios.place import Daemon, Place, until
from support.records import under_way


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_services_keep_their_stacks(place: Place, number: int) -> None:
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    daemon.send(number)
    assert daemon.wait() == 0
    assert not [line for line in daemon.log.wait_for_end() if "Traceback" in line]
    assert service.has("1.3")
    assert service.process.poll() is None


@pytest.mark.parametrize("name", ["services", "io.confext.Watcher"])
@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_what_is_in_its_way_at_the_start_is_said_in_one_line(place: Place, name: str) -> None:
    in_the_way = place.runtime / name
    if name == "services":
        place.runtime.mkdir()
        in_the_way.write_text("a file")
    else:
        in_the_way.mkdir(parents=True)
    daemon = place.start_daemon(wait=False)
    assert daemon.wait() == 1
    *_, last = daemon.log.wait_for_end()
    assert last.startswith("confext-watcher: ") and name in last
    assert not [line for line in daemon.log.lines if "Traceback" in line or "|" in line], daemon.log.lines


def test_it_does_not_wait_for_a_reload_that_hangs(place: Place) -> None:
    """90 s is what a reload command may take; what is still running is killed."""
    daemon = place.start_daemon()
    begun = place.path / "begun"
    os.mkfifo(begun)
    service = place.start("--reload-command", f"sh -c 'echo $$ > {begun}; exec sleep infinity'")
    service.put("1.3")
    command = os.pidfd_open(int(begun.read_text()))
    try:
        daemon.send(signal.SIGTERM)
        assert daemon.wait() == 0
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(command, 0)
    finally:
        os.close(command)


def test_after_a_restart_what_was_dropped_meanwhile_is_applied(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    assert place.daemon is not None
    place.daemon.stop()
    service.put("1.4")
    place.start_daemon()
    service.reloaded("1.4")


@pytest.mark.parametrize("ended", ["stopped", "killed"])
def test_a_restart_reloads_nothing_that_has_not_changed(place: Place, ended: str) -> None:
    daemon = place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    # Killed before this note is gone, it would have it told once more.
    until(lambda: not under_way(place.state))
    daemon.stop() if ended == "stopped" else daemon.kill()
    place.start_daemon()
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


def test_sighup_reads_its_configuration_again(place: Place) -> None:
    daemon = place.start_daemon()
    service = place.start()
    place.configure("SettleSec=20ms", "ImageMax=1K")
    daemon.send(signal.SIGHUP)
    daemon.log.wait_for("settings read again")
    service.put("1.3", value="x" * 5000)
    service.logged("refused: .*too large", r"1024 are allowed \(ImageMax=\)")
    place.configure("SettleSec=20ms", "LogLevel=debug")
    daemon.send(signal.SIGHUP)
    service.reloaded("x" * 5000)
    (service.drops / "README").touch()
    service.logged("README: ignored")
    place.configure("SettleSec=soon", "Unheard=of")
    daemon.send(signal.SIGHUP)
    conf = str(place.conf / "watcher.conf")
    daemon.log.wait_for(f"{conf}:2: .*SettleSec=")
    daemon.log.wait_for(f"{conf}:3: .*Unheard=")
    service.put("1.4")
    service.reloaded("1.4")


def test_a_second_one_is_refused(shared: Place) -> None:
    second = shared.run("run", check=False)
    assert second.returncode == 1
    assert second.stderr == f"confext-watcher: another daemon uses {shared.runtime} already\n"
    service = shared.start()
    service.put("1.3")
    service.reloaded("1.3")


def test_one_per_runtime_directory(shared: Place, tmp_path: Path) -> None:
    other = Place(tmp_path)
    other.environment["STATE_DIRECTORY"] = shared.environment["STATE_DIRECTORY"]
    if shared.trees:
        pytest.skip("once is enough")
    with other:
        other.start_daemon()


def test_it_needs_its_directories(place: Place) -> None:
    place.runtime.write_text("a file is in the way")
    daemon = place.start_daemon(wait=False)
    assert daemon.wait() == 1
    assert daemon.log.wait_for_end() == [f"confext-watcher: {place.runtime}: File exists"]
    place.daemon = None
    daemon.kill()
    assert isinstance(daemon, Daemon)


@pytest.mark.parametrize("place", ["images"], indirect=True)
def test_it_does_not_wait_for_a_copy(place: Place) -> None:
    """The largest that is allowed takes seconds; whoever is copied again has lost nothing."""
    daemon = place.start_daemon()
    service = place.start()
    large = place.path / "large"
    place.bring(place.confext("1.3"), large)
    os.truncate(large, 1 << 29)
    large.rename(service.versions / "web_1.3.raw")
    store = place.state / "store"
    until(lambda: [name for name in os.listdir(store) if name.startswith(".tmp-")])
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not [name for name in os.listdir(store) if not name.startswith(".")], "it was waited for"
    assert not [line for line in daemon.log.wait_for_end() if "Traceback" in line]
    daemon.kill()
    place.start_daemon()
    service.reloaded("1.3")
    until(lambda: not [name for name in os.listdir(store) if name.startswith(".tmp-")])


def test_it_is_ready_while_a_reload_goes_on(place: Place) -> None:
    """Whoever waits for it does not wait for a service: systemd would end it, and start it anew."""
    daemon = place.start_daemon()
    begun = place.path / "begun"
    os.mkfifo(begun)
    service = place.start("--reload-command", f"sh -c 'echo $$ > {begun}; exec sleep infinity'")
    daemon.stop()
    service.put("1.3")
    place.start_daemon(wait=False).log.wait_for("watching for 1 service")
    assert begun.read_text()
    assert service.has("1.3")
