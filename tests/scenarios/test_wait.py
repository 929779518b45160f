# SPDX-License-Identifier: LGPL-2.1-or-later
"""`wait` tells the truth about what is there now: each answer on a real daemon, with a real service.

The table of answers without a daemon is in
`tests/rounds/test_answer.py`; those that need systemd are in `tests/beds/test_systemd_wait.py`.
"""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import pytest

from scenarios.place import COMMAND, Place, Running, Service, until
from watcher.rounds.facts import AFTERGLOW_USEC

images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
FOREVER = 60
"""Seconds; an answer that is final comes before."""


class Said:
    """What `wait --json` printed, and its exit status."""

    def __init__(self, place: Place, service: str, image: object, timeout: float) -> None:
        done = place.run("wait", f"--timeout={timeout}", "--json", service, str(image), check=False)
        assert done.stdout, done
        found: dict[str, Any] = json.loads(done.stdout)
        self.stderr = done.stderr
        self.event, self.answer = found, found["answer"]
        self.kind, self.text, self.command = (self.answer[key] for key in ("kind", "text", "command"))
        assert done.returncode == self.answer["status"], done
        assert self.text.startswith(found["message"])


def asked(service: Service, image: object, timeout: float = FOREVER) -> Said:
    return Said(service.place, service.name, image, timeout)


def in_progress(service: Service, image: object) -> Said:
    """What is known when the time is over."""
    for seconds in (0.3, 3, 30):  # a busy machine needs longer for the first look
        found = asked(service, image, seconds)
        assert found.answer["status"] == 4
        assert found.stderr == f"confext-watcher: timed out: {found.text}\n"
        if found.kind != "looking":
            return found
    raise AssertionError(found.text)


def checked(place: Place, *options: str) -> Service:
    """A service that refuses what has the word "bad" in it, and runs on "1"."""
    service = place.start("--check", "sh -c '! grep bad /etc/web.conf'", "--reload-signal", "HUP", *options)
    assert asked(service, service.put("1")).kind == "applied"
    return service


def test_what_was_applied_and_is_overwritten_is_no_success(shared: Place) -> None:
    service = checked(shared)
    dropped = service.put("2")
    assert asked(service, dropped).kind == "applied"
    if shared.trees:
        (dropped / "etc/web.conf").write_text("bad\n")
    else:
        shared.bring(shared.confext("2", "bad"), dropped)
    found = asked(service, dropped)
    assert (found.kind, found.event["outcome"]) == ("kept-out", "refused")
    assert "applied" not in found.text and service.has("2")
    assert found.command == f"confext-watcher rollback --forget {service.name}"
    # What helps, helps: other content is another answer.
    if shared.trees:
        (dropped / "etc/web.conf").write_text("good\n")
    else:
        shared.bring(shared.confext("2", "good"), dropped)
    assert asked(service, dropped).kind == "applied"
    assert service.has("good")


def test_wait_right_after_each_copy_is_about_that_copy(shared: Place) -> None:
    """By one name, so that the answer on the copy before would always be a success."""
    service = shared.start()
    for number in range(20):
        dropped = service.versions / f"web_1{shared.suffix}"
        made = shared.confext("1", f"content {number}")
        if shared.trees:
            aside = service.versions / f".old{number}"
            temporary = service.versions / f".new{number}"
            shutil.copytree(made, temporary)
            if dropped.exists():
                dropped.rename(aside)
            temporary.rename(dropped)
        else:
            shutil.copyfile(made, dropped)
        found = asked(service, dropped if number % 2 else dropped.name)
        assert found.kind == "applied", found.text
        assert service.has(f"content {number}")


def test_it_is_applied_again_and_older_and_newer(shared: Place) -> None:
    service = shared.start()
    first = service.put("1")
    assert asked(service, first).kind == "applied"
    second = service.put("2")
    assert asked(service, second).text.startswith(f"{service.name}: web 1 -> 2 applied in")
    found = asked(service, first)
    assert (found.kind, "web 2 is newer" in found.text) == ("older", True)
    third = service.versions / f"web_3{shared.suffix}"
    shared.bring(second, third)
    found = asked(service, third)
    assert (found.kind, found.event["outcome"]) == ("unchanged", "unchanged")
    assert service.heard == ["nothing", "1", "2"]


def test_a_way_by_other_links_leads_to_the_same_file(shared: Place) -> None:
    service = shared.start()
    link = shared.path / f"link-{service.name}"
    link.symlink_to(service.versions)
    dropped = service.put("1")
    assert asked(service, link / dropped.name).kind == "applied"
    real = shared.path / f"real-{service.name}"
    service.versions.rename(real)
    service.versions.symlink_to(real)
    service.put("2")
    for directory in (real, service.versions, link):
        assert asked(service, directory / f"web_2{shared.suffix}").kind == "applied"


@images_only
def test_what_is_not_whole_says_how_much_there_is(shared: Place) -> None:
    service = shared.start()
    whole = shared.confext("1").read_bytes()
    dropped = service.versions / "web_1.raw"
    half = len(whole) // 2
    dropped.write_bytes(whole[:half])
    found = in_progress(service, dropped)
    assert found.kind == "incomplete"
    assert f"incomplete: {half} of " in found.text and "bytes are here" in found.text
    waiting = Running([str(COMMAND), "wait", "--timeout=60", service.name, str(dropped)], shared.environment)
    waiting.said.wait_for(f"incomplete: {half} of")
    with dropped.open("ab") as file:
        file.write(whole[half:])
    waiting.said.wait_for("web 1 added, applied")
    assert waiting.wait() == 0
    waiting.kill()


@images_only
def test_what_was_refused_before_says_so_again(shared: Place) -> None:
    service = shared.start()
    dropped = service.versions / "web_1.raw"
    dropped.write_bytes(b"<html>404</html>" * 400)
    service.logged("web_1.raw refused")
    for _ in range(2):
        found = asked(service, dropped)
        assert (found.kind, found.event["outcome"]) == ("refused", "refused"), found.text
    shared.bring(shared.confext("1"), dropped)
    assert asked(service, dropped).kind == "applied"


@images_only
def test_what_is_being_written_or_uploaded_is_in_progress(shared: Place) -> None:
    service = shared.start()
    made = shared.confext("1")
    temporary = service.versions / ".web_1.raw.Xa81b"
    shutil.copyfile(made, temporary)
    found = in_progress(service, "web_1.raw")
    assert (found.kind, ".web_1.raw.Xa81b" in found.text) == ("uploading", True)
    with temporary.open("ab"):
        dropped = temporary.rename(service.versions / "web_1.raw")
        assert in_progress(service, dropped).kind == "waiting"
    assert asked(service, dropped).kind == "applied"


def test_what_does_not_count_where_it_lies_is_said_at_once(shared: Place) -> None:
    service = shared.start()
    service.put("1")
    service.reloaded("1")
    made, versions = shared.confext("2"), service.versions
    shared.bring(made, versions / f"wbe_2{shared.suffix}")
    found = asked(service, versions / f"wbe_2{shared.suffix}")
    assert (found.kind, "not called web_VERSION" in found.text) == ("misnamed", True)
    shared.bring(made, versions / f".web_2{shared.suffix}")
    assert asked(service, f".web_2{shared.suffix}").kind == "misnamed"
    (versions / f"web_3{shared.suffix}").symlink_to("nowhere")
    found = asked(service, versions / f"web_3{shared.suffix}")
    assert (found.kind, "the link leads nowhere" in found.text) == ("dangling", True)
    found = asked(service, f"web_9{shared.suffix}")
    assert (found.kind, str(versions) in found.text) == ("not-there", True)
    assert asked(service, versions / f"web_9{shared.suffix}").kind == "not-there"
    found = asked(service, f"/no/such/directory/web_1{shared.suffix}")
    assert (found.kind, "does not look into that directory" in found.text) == ("elsewhere", True)
    found = asked(service, f"bew_1{shared.suffix}")
    assert (found.kind, found.text.endswith(f"; did you mean web_1{shared.suffix}?")) == ("not-there", True)


def test_a_service_that_does_not_run_gets_it_at_its_next_start(shared: Place) -> None:
    service = shared.start()
    assert asked(service, service.put("1")).kind == "applied"
    time.sleep(AFTERGLOW_USEC / 1e6)
    service.stop()
    dropped = service.put("2")
    found = asked(service, dropped)
    assert (found.kind, found.event["outcome"]) == ("accepted", "applied")
    assert "it is not running, its next start gets it" in found.text
    again = shared.start(name=service.name)
    assert again.heard == ["2"]
    assert asked(again, dropped).kind == "applied"


def test_a_check_needs_a_service_that_runs(shared: Place) -> None:
    service = checked(shared)
    time.sleep(AFTERGLOW_USEC / 1e6)
    service.stop()
    dropped = service.put("2")
    found = asked(service, dropped)
    assert (found.kind, "Check= needs that" in found.text) == ("needs-start", True)


def test_what_was_put_elsewhere_by_hand_stays_until_the_command_that_is_named(shared: Place) -> None:
    service = shared.start()
    first, second = service.put("1"), None
    service.reloaded("1")
    second = service.put("2")
    service.reloaded("2")
    shared.run("rollback", service.name)
    assert asked(service, first).kind == "applied"
    found = asked(service, second)
    assert found.kind == "pinned"
    if not shared.trees:  # its file has other content now than the stack that the service is on
        shared.bring(shared.confext("1", "other"), first)
        assert asked(service, first).kind == "pinned"
    shared.run(*found.command.split()[1:])
    assert asked(service, second).kind == "applied"


def test_superseded_in_a_burst(shared: Place) -> None:
    go = shared.path / "go"
    service = shared.start(
        "--check", f"sh -c 'until test -e {go}; do sleep 0.02; done'", "--reload-signal", "HUP"
    )
    second = service.put("2")
    until(lambda: in_progress(service, second).kind == "checking")
    third = service.put("3")
    until(lambda: "web 3 is newer, and comes instead of it" in asked(service, second, 0.3).text)
    go.touch()
    assert asked(service, third).kind == "applied"
    assert asked(service, second).kind == "older"


def test_a_reload_that_does_not_end_is_said(shared: Place) -> None:
    go = shared.path / "reloaded"
    service = shared.start("--reload-command", f"sh -c 'until test -e {go}; do sleep 0.02; done'")
    dropped = service.put("1")
    until(lambda: in_progress(service, dropped).kind == "reloading")
    go.touch()
    assert asked(service, dropped).kind == "applied"


def test_no_answer_is_success_before_the_verdict(shared: Place) -> None:
    """Also at the first start on a stack that only a reload has seen."""
    well = shared.path / "well"
    well.touch()
    health = (
        "--health-check",
        f"test -e {well}",
        "--set",
        "HealthStableSec=100ms",
        "--set",
        "HealthCheckSec=60s",
    )
    service = shared.start("--reload-signal", "HUP", *health)
    dropped = service.put("1")
    assert asked(service, dropped).kind == "applied"
    time.sleep(AFTERGLOW_USEC / 1e6)
    service.stop()
    well.unlink()
    again = shared.start("--reload-signal", "HUP", *health, name=service.name)
    assert again.heard == ["1"]
    until(lambda: in_progress(again, dropped).kind == "on-trial")
    assert again.status()["onTrial"]
    well.touch()
    assert asked(again, dropped).kind == "applied"
    assert not again.status()["onTrial"]


def test_counted_tries_say_when_the_next_is(shared: Place) -> None:
    service = checked(shared)
    dropped = service.put("2+3", value="bad")
    found = asked(service, dropped)
    assert (found.kind, "tried again at the next start" in found.text) == ("kept-out-for-now", True)
    assert found.command == f"confext-watcher rollback --forget {service.name}"


def test_the_store_is_full(place: Place) -> None:
    place.configure("SettleSec=20ms", f"StoreMax={100 if place.trees else 55}K", "KeepStacks=1")
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    more = [service.put("7", name=f"other{number}", at=service.drops) for number in range(2)]
    found = in_progress(service, more[1])
    assert (found.kind, "the store is full" in found.text) == ("waiting", True)


def test_a_daemon_that_is_restarted_is_waited_for(place: Place) -> None:
    daemon = place.start_daemon()
    service = place.start()
    words = [str(COMMAND), "wait", "--timeout=60", service.name]
    dropped = service.put("1")
    assert place.run(*words[1:], str(dropped), check=False).returncode == 0
    # While it runs, and ends.
    service.versions.joinpath(f".web_2{place.suffix}.part").mkdir()
    waiting = Running([*words, f"web_2{place.suffix}"], place.environment, inside=place._inside)
    waiting.said.wait_for("looks like its upload")
    daemon.stop()
    second = service.put("2")
    # While it does not run.
    later = Running([*words, str(second)], place.environment, inside=place._inside)
    done = place.run("wait", "--timeout=0.5", service.name, str(second), check=False)
    assert (done.returncode, "not running" in done.stderr) == (3, True)
    assert place.run("wait", service.name, str(second), check=False).returncode == 3
    place.start_daemon()
    for one in (waiting, later):
        assert one.wait() == 0, one.errors.read()
        one.said.wait_for("web 1 -> 2 applied")
        one.kill()


def test_strangers_learn_from_wait_no_more_than_its_status(open_place: Place) -> None:
    """Whether a file that does not count is there is not theirs to know."""
    open_place.start_daemon()
    service = open_place.start()
    service.put("1")
    service.reloaded("1")
    service.drops.chmod(0o700)
    (service.versions / "wbe_2.raw").touch()
    (service.versions / "web_3.raw").symlink_to("nowhere")
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    answers = []
    for name in ("wbe_2.raw", "web_3.raw", "none.raw"):
        done = open_place.run(
            "wait", "--timeout=60", "--json", service.name, name, prefix=nobody, check=False
        )
        found = json.loads(done.stdout) | {"when": 0}
        answers.append((done.returncode, found))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][1]["answer"] == {"kind": "", "status": 1, "text": "", "command": ""}
