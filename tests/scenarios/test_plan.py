# SPDX-License-Identifier: LGPL-2.1-or-later
"""`plan --check` and `plan --stat` of real services (cli/plan.py, control/plan.py)."""

from __future__ import annotations

import json

from scenarios.place import Place, Service


def checked(place: Place) -> Service:
    """A service whose check wants the file "flag"."""
    (place.path / "flag").touch()
    place.start_daemon()
    service = place.start("--reload-signal", "SIGHUP", "--check", f"test -e {place.path}/flag")
    service.put("1")
    service.reloaded("1")
    return service


def test_what_its_check_would_say_is_found_out_without_touching_the_service(place: Place) -> None:
    service = checked(place)
    heard = service.heard
    passed = place.run("plan", "--check", service.name)
    assert passed.stdout == f"{service.name}: no change\n  its check passed\n"
    (place.path / "flag").unlink()
    failed = place.run("plan", "--check", service.name, check=False)
    reason = f"check 'test -e {place.path}/flag' failed with exit status 1"
    assert (failed.returncode, failed.stdout) == (
        1,
        f"{service.name}: no change\n  it would be refused: {reason}\n",
    )
    (change,) = json.loads(place.run("plan", "--check", "--json", check=False).stdout)["changes"]
    assert change["check"] == reason
    # Neither the service nor what is known of it is another.
    assert service.heard == heard and service.has("1")
    events = json.loads(place.run("history", "--json").stdout)["events"]
    assert [event["outcome"] for event in events] == ["applied"]


def test_a_service_without_a_check_is_told_so(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    said = place.run("plan", "--check").stdout
    assert f"  {service.name}: it has no Check=, see watcher.conf(5)\n" in said


def test_what_would_change_is_listed_and_checked_before_the_daemon_acts(place: Place) -> None:
    place.configure("SettleSec=1h", "SettleMaxSec=1h")
    place.start_daemon()
    service = place.start("--reload-signal", "SIGHUP", "--check", "grep -qv bad /etc/web.conf")
    service.log.wait_for("nothing in it yet")  # the look at its start is over
    service.put("1", value="bad")
    done = place.run("plan", "--check", "--stat", service.name, check=False)
    assert done.returncode == 1 and service.heard == ["nothing"]
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"{service.name}: web 1 added")
    assert any("it would be refused: check 'grep -qv bad /etc/web.conf' failed" in line for line in others)
    assert any(line.startswith("  ") and "/etc/web.conf" in line for line in others)
    (change,) = json.loads(place.run("plan", "--stat", "--json", service.name).stdout)["changes"]
    assert change["diff"]["differs"] and "/etc/web.conf" in [one["path"] for one in change["diff"]["files"]]
    assert "check" in change and change["check"] is None


def test_what_is_kept_out_is_told_with_what_lets_it_in(place: Place) -> None:
    place.start_daemon()
    service = place.start("--reload-signal", "SIGHUP", "--check", "grep -qv bad /etc/web.conf")
    service.put("1")
    service.reloaded("1")
    bad = service.put("2", value="bad")
    service.logged("refused")
    helps = f"`confext-watcher rollback --forget {service.name}` lets it have what is newest"
    (line,) = [line for line in place.run("plan", service.name).stdout.splitlines() if str(bad) in line]
    assert "kept out" in line and line.endswith(helps)
    service.put("3")
    service.reloaded("3")
    place.run("rollback", service.name)
    said = place.run("plan", service.name).stdout
    assert f"  {service.name}: it stays there by hand; {helps}" in said.splitlines()
