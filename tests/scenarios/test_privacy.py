# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a user without rights finds out: versions, digests and outcomes; no reason, no output, no path."""

from __future__ import annotations

import json
import stat
import subprocess

import pytest

from scenarios.place import Place
from support.needs import root, tool
from support.nobody import AS_NOBODY

pytestmark = [root, tool("mksquashfs")]

TOKEN = "api_token=s3cret"
CHECK = f"sh -c 'echo line; echo {TOKEN}; test ! -e /etc/bad.conf'"
HINT = "confext-watcher: you see outcomes only: to see reasons, paths and outputs join the group confext-watcher\n"


@pytest.fixture
def place(open_place: Place) -> Place:
    """With a path that other users can reach, and a drop directory that they cannot."""
    return open_place


def refused(place: Place) -> str:
    """A service that runs on "web 1.3", and has refused "bad" and a file that is no image; returns its name."""
    place.start_daemon()
    service = place.start("--check", CHECK, "--reload-signal", "HUP")
    service.drops.chmod(0o700)
    service.put("1.3")
    service.logged("applied")
    place.bring(place.confext("1", None, "bad"), service.drops / "bad.raw")
    service.logged("refused", TOKEN)
    (service.drops / "empty.raw").touch()
    service.logged("empty.raw refused")
    return service.name


def test_strangers_see_outcomes_only(place: Place) -> None:
    name = refused(place)
    for words in (("status",), ("history",), ("plan",), ("wait", "--timeout=20", name, "bad.raw")):
        for json_too in ((), ("--json",)):
            done = place.run(*words, *json_too, prefix=AS_NOBODY, check=False)
            assert done.returncode == (1 if words[0] == "wait" else 0), done
            for secret in ("s3cret", "line", ".confext.d", str(place.path), "exit status", "sh -c"):
                assert secret not in done.stdout + done.stderr, words
            assert done.stderr == ("" if json_too else HINT)
            if json_too:
                assert json.loads(done.stdout)["redacted"] is True
            full = place.run(*words, *json_too, check=False)
            assert full.stderr == ""
            # A glance at all services names files, one at a service in depth has their paths.
            file = f"{name}.confext.d" if json_too or words[0] != "status" else "empty.raw is refused: empty"
            assert file in full.stdout or words[0] == "wait"
            assert TOKEN in full.stdout
            if json_too:
                assert json.loads(full.stdout)["redacted"] is False
    assert f"{name}: bad refused" in place.run("history", prefix=AS_NOBODY).stdout
    assert "  web 1.3  " in place.run("status", prefix=AS_NOBODY).stdout
    told = place.run("status", name, prefix=AS_NOBODY).stdout
    assert "refused (check-failed): bad refused (check-failed)" in told
    for secret in ("s3cret", ".confext.d", "empty.raw", "bad.raw", "Settings", "sh -c"):
        assert secret not in told


def test_strangers_get_no_report(place: Place) -> None:
    name = refused(place)
    plain = place.run("plan", name, prefix=AS_NOBODY).stdout
    done = place.run("plan", "--debug", name, prefix=AS_NOBODY, check=False)
    assert (done.returncode, done.stdout) == (1, plain)
    assert done.stderr == (
        "confext-watcher: you get no report, it has reasons, paths and outputs: "
        "to see these join the group confext-watcher\n"
    )
    done = place.run("plan", "--debug", "--json", name, prefix=AS_NOBODY, check=False)
    answer = json.loads(done.stdout)
    assert (done.returncode, done.stderr, answer["redacted"]) == (1, "", True)
    assert [change["report"] for change in answer["changes"]] == [None]
    full = place.run("plan", "--debug", name)
    assert full.stderr == ""
    assert TOKEN in full.stdout and f"{name}.confext.d" in full.stdout


def test_a_stranger_cannot_ask_which_paths_there_are(place: Place) -> None:
    """Only by its name is an image known to him: at the right path and at a wrong one it is the same."""
    name = refused(place)
    answers = [
        place.run("wait", "--timeout=20", name, f"{directory}/bad.raw", prefix=AS_NOBODY, check=False)
        for directory in (place.drops(name), "/no/such")
    ]
    assert answers[0].returncode == answers[1].returncode == 1
    assert answers[0].stdout == answers[1].stdout == f"{name}: bad refused (check-failed)\n"
    # Root means the path that he says.
    done = place.run("wait", "--timeout=20", name, "/no/such/bad.raw", check=False)
    assert (done.returncode, "does not look into that directory" in done.stdout) == (1, True)


def test_no_file_tells_what_the_daemon_does_not(place: Place) -> None:
    name = refused(place)
    assert place.daemon is not None
    for directory in (place.runtime, place.state):
        for path in (found for found in directory.rglob("*") if found.is_file() and not found.is_symlink()):
            mode = path.stat().st_mode
            assert stat.S_ISSOCK(mode) or not mode & 0o007, path
    found = subprocess.run(
        [*AS_NOBODY, "grep", "-rlsE", "confext\\.d|api_token", str(place.runtime), str(place.state)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
    place.daemon.stop()
    for words in (("status", name), ("history", name)):
        done = place.run(*words, prefix=AS_NOBODY, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert "ledger.sqlite: only root may read it: use sudo; the daemon is not running" in done.stderr
        assert TOKEN in place.run(*words).stdout
