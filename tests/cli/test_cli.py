# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line itself: what it refuses before anything is begun, and how (cli/show.py).

test_documents.py compares its words (cli/arguments.py) with the man pages and the completions. What starts in
cli/main.py, and answers by cli/answers.py, is done from end to end in tests/scenarios/: cli/run.py, cli/exec.py,
cli/status.py, cli/plan.py, cli/history.py, cli/wait.py, cli/rollback.py, cli/enable.py (in tests/beds/), cli/check.py.
How one ends that has begun something (cli/ending.py) is here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.images import confext
from watcher.cli import check, main, show, show_status
from watcher.cli import status as status_command
from watcher.control.client import NotRunning
from watcher.model import Event, Outcome, Setting, Verdict
from watcher.records.schema import ExitStatus, ServiceNotFound, ServiceStatus


@pytest.fixture
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    value: str = request.param
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=value))
    return value


def loaded(command: str) -> set[str]:
    """The modules that a command has when it begins."""
    code = f"import sys, watcher.cli.main, watcher.cli.{command}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["diff", "history", "origin", "plan", "rollback", "status", "wait"])
def test_a_command_that_the_daemon_answers_starts_without_what_a_daemon_needs(command: str) -> None:
    slow = {"trio", "varlink", "sqlite3", "structlog", "psutil", "jeepney", "rich", "subprocess", "asyncio"}
    assert loaded(command) & {*slow, "pathlib", "platform"} == set()


@pytest.mark.parametrize("command", ["history", "rollback", "status", "wait"])
def test_a_command_that_shows_no_files_starts_without_what_is_told_of_them(command: str) -> None:
    assert "watcher.records.traces" not in loaded(command)


def test_a_command_that_has_begun_something_cleans_up_when_it_is_killed_and_survives_under_nohup() -> None:
    code = """if True:
        import os, signal
        from watcher.cli.ending import end_as_interrupted
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup(1) does
        end_as_interrupted()
        os.kill(os.getpid(), signal.SIGHUP)
        print("goes on")
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            print("cleans up")
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "goes on\ncleans up\n"


@pytest.mark.parametrize("command", ["build", "check", "doctor", "enable", "exec", "init", "remove"])
def test_a_command_that_works_by_itself_starts_without_what_the_daemon_alone_needs(command: str) -> None:
    admits = command == "exec"  # as the daemon does, and so it looks for who writes to an image
    unneeded = {"trio", "varlink", "jeepney"} | (set() if admits else {"psutil", "inotify_simple"})
    assert loaded(command) & unneeded == set()


@pytest.mark.parametrize("words", ["", "['status']"])
def test_what_the_program_has_loaded_is_not_looked_through_for_garbage(tmp_path: Path, words: str) -> None:
    """Where it is called by another program, what that one has is not its own to decide about."""
    code = f"import gc; from watcher.cli.main import main; main({words})"
    counts = "print(gc.isenabled(), gc.get_freeze_count() > 10_000)"
    places = {f"{name}_DIRECTORY": str(tmp_path) for name in ("RUNTIME", "STATE", "CONFIGURATION")}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {counts}", "status"],
        env=os.environ | places,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"True {not words}"


@pytest.mark.parametrize("release", ["6.7.12", "5.15.0-91-generic", "6.7+", "4"], indirect=True)
def test_an_old_kernel_is_refused_in_one_line(release: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run"]) == ExitStatus.UNSUPPORTED
    assert main.main(["exec", "--name", "web.service", "--", "true"]) == ExitStatus.UNSUPPORTED
    line = f"confext-watcher: Linux {release} is too old: 6.8 or newer is needed (overlayfs lowerdir+)\n"
    assert capsys.readouterr().err == 2 * line


@pytest.mark.parametrize(
    "release", ["6.8.0", "6.8", "6.12+", "6.9rc1", "7.0-rc2", "6.12.43+deb13-amd64"], indirect=True
)
def test_a_new_kernel_is_taken_however_it_is_called(release: str) -> None:
    main._require_kernel()


def test_what_is_said_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise NotRunning("two\nlines \x1b[31m")

    monkeypatch.setattr(check, "run", broken)
    assert main.main(["check", "web.raw"]) == 3
    assert capsys.readouterr().err == "confext-watcher: two\\nlines \\x1b[31m\n"


def test_json_has_nothing_that_a_terminal_would_obey() -> None:
    value = {"source": "/srv/\x9b2J\u202e\x7f\x1b\U000e0001 ä € 🙂"}
    said = show.as_json(value)
    assert json.loads(said) == value
    assert said.replace("\n", "").isprintable() and "ä € 🙂" in said


def test_history_says_with_the_outcome_what_was_wrong() -> None:
    """The lines of the others stay as narrow as they are."""
    bad = Event("a.service", Outcome.ROLLED_BACK, "a.service: b", 0, "5" * 16, verdict=Verdict.WENT_DOWN)
    good = dataclasses.replace(bad, outcome=Outcome.APPLIED, verdict=Verdict.GOOD)
    other = dataclasses.replace(good, verdict=None)
    lines = list(show.events([bad, good, other]))
    assert lines == [
        "-  applied        5555555555555555  a.service: b",
        "-  applied        5555555555555555  a.service: b",
        "-  rolled-back (went-down)  5555555555555555  a.service: b",
    ]


@pytest.mark.parametrize("verdict", [None, *Verdict])
def test_status_says_with_the_outcome_what_was_wrong(verdict: Verdict | None) -> None:
    last = Event("a.service", Outcome.FAILED, "a.service: b", 0, verdict=verdict)
    service = ServiceStatus("a.service", "systemd", "running", pid=7, last=last)
    said = list(show_status.in_depth(service, [last]))
    wrong = f" ({verdict.value})" if verdict not in (None, Verdict.GOOD) else ""
    assert f"           -  failed{wrong}: b" in said
    assert list(show_status.glance([service]))[1:] == [
        "a.service  its own /etc  -      -      failed",
        "",
        "a.service: b",
        "    confext-watcher history a.service",
    ]


def test_json_names_a_file_as_every_answer_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone surrogate, which is what Python makes of such a byte, is not JSON (RFC 8259, section 8.2)."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.raw")
    assert main.main(["check", "--json", path]) == 1
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert image["image"] == f"{tmp_path}/\\xff.raw"


def test_services_are_chosen_as_systemctl_does() -> None:
    known = [
        ServiceStatus(name, "systemd", "running") for name in ("web-1.service", "web-2.service", "db.service")
    ]

    def status(name: str | None) -> list[ServiceStatus]:
        found = [one for one in known if name in (None, one.service, one.service.removesuffix(".service"))]
        if not found:
            raise ServiceNotFound(str(name))
        return found

    def chosen(*names: str) -> tuple[list[str], list[str]]:
        unknown: list[ServiceNotFound] = []
        found = status_command._chosen(names, status, unknown)
        return [one.service for one in found], [error.service for error in unknown]

    assert chosen() == (["web-1.service", "web-2.service", "db.service"], [])
    assert chosen("db", "web-1.service", "db") == (["db.service", "web-1.service"], [])
    assert chosen("web-*") == chosen("web-?.service") == (["web-1.service", "web-2.service"], [])
    assert chosen("none*", "db", "nobody") == (["db.service"], ["none*", "nobody"])


def test_settings_are_shown_with_where_they_are_written() -> None:
    setting = Setting("Check", "/usr/sbin/nginx -t", "/etc/systemd/system/a.service.d/check.conf:2")
    services = [
        ServiceStatus("a.service", "systemd", "running", settings=(setting,)),
        ServiceStatus("b.service", "systemd", "running"),
    ]
    first, second = (list(show_status.in_depth(one)) for one in services)
    assert first[-2:] == [
        "Settings, all others are the defaults",
        "  Check=/usr/sbin/nginx -t  (/etc/systemd/system/a.service.d/check.conf:2)",
    ]
    assert second[-1] == "All its settings are the defaults."
    assert len(list(show_status.glance(services))) == 3


def test_lines_fit_the_terminal_and_are_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["  one two three", "a\ntable that is wider", "http://a-long-word-that-is-not-broken"]
    monkeypatch.setenv("COLUMNS", "11")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert list(show.fit(lines)) == lines
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(show.fit(lines)) == ["  one two", "      three", *lines[1:]]


def test_check_tells_what_an_image_does_to_the_hosts_etc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = confext(tmp_path / "web", "web", release="ID=_any\nEXTENSION_RESTART_UNITS=web.*\n")
    (tree / "etc/os-release").mkdir()
    assert main.main(["check", str(tree)]) == 0
    good, trust, warning, passed_over = capsys.readouterr().out.splitlines()
    assert passed_over.startswith(
        f"{tree}: warning: EXTENSION_RESTART_UNITS= in it has web.*, which is no unit"
    )
    assert f"{tree}: good: web" in good and trust == f"{tree}: unprotected"
    assert warning.startswith(f"{tree}: warning: hides the host's etc/os-release, which is a ")
    assert main.main(["check", "--json", str(tree)]) == 0
    assert "hides the host's etc/os-release" in capsys.readouterr().out
