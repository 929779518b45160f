# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher diff` (control/diff.py, cli/diff.py, cli/origin.py) on real services, with and without a daemon."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from scenarios.place import Place, Service
from scenarios.test_origin import NASTY, drop
from support.fork_server import COMMAND
from support.needs import root, tool
from support.nobody import AS_NOBODY
from watcher.rounds.facts import AFTERGLOW_USEC

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)
RELEASE = "/etc/extension-release.d/extension-release.web"


def diff(service: Service, *options: str, status: int = 1) -> dict[str, Any]:
    done = service.place.run("diff", "--json", service.name, *options, check=False)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["differs"] == bool(found["files"]) == bool(status)
    return found


def by_path(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {file["path"]: file for file in found["files"]}


def on(place: Place, *versions: str) -> Service:
    """A service that has had these versions, one after the other; the last one has proved good."""
    place.start_daemon()
    service = place.start()
    for version in versions:
        service.put(version)
        service.reloaded(version)
        service.logged(f"web (.* -> )?{version} ")
    time.sleep(AFTERGLOW_USEC / 1e6)
    return service


def test_nothing_would_change(place: Place) -> None:
    service = on(place, "1.3")
    found = diff(service, status=0)
    assert (found["before"]["what"], found["after"]["what"]) == ("shown", "desired")
    assert "no difference" in place.run("diff", service.name).stdout


def test_what_changed_between_two_stacks_of_the_history(place: Place) -> None:
    service = on(place, "1.3", "1.4")
    assert place.daemon is not None
    place.daemon.stop()
    stacks = [
        event["stack"] for event in json.loads(place.run("history", "--json", service.name).stdout)["events"]
    ]
    for words in (
        ["--from", "1", "--to", "0"],
        ["--from", "1"],
        ["--from", stacks[1][:8], "--to", stacks[0]],
    ):
        files = by_path(diff(service, *words))
        assert set(files) == {"/etc/web.conf", "/etc/web.large"}
        assert files["/etc/web.conf"]["diff"] == "@@ -1 +1 @@\n-1.3\n+1.4\n"
        large = files["/etc/web.large"]
        assert large["diff"] is None and large["before"]["sha256"] != large["after"]["sha256"]
    assert diff(service, "--from", "0", "--to", "shown", status=0)["files"] == []
    done = place.run("diff", service.name, "--to", "0", "1", check=False)
    assert done.returncode == 2 and "--to: one stack, or images" in done.stderr
    for name in ("7", "nothing", stacks[0][:8] + "x"):
        done = place.run("diff", service.name, "--from", name, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "has no stack" in done.stderr


def test_against_the_host_and_as_people_see_it(place: Place) -> None:
    service = on(place, "1.3")
    done = place.run("diff", service.name, "--from", "none", check=False)
    assert done.returncode == 1
    assert f"{service.name}: the host's /etc -> web 1.3 (what it should have now)" in done.stdout
    assert "--- /dev/null\n+++ /etc/web.conf (web 1.3)\n@@ -0,0 +1 @@\n+1.3\n" in done.stdout
    assert re.search(
        r"^/etc/web.large: added, file 0644 of 0:0, 20000 bytes, sha256 \w{64}$", done.stdout, re.M
    )
    assert "\x1b" not in done.stdout
    statistics = place.run("diff", "--stat", service.name, "--from", "none", check=False).stdout
    assert "4 paths differ, 2 lines added, 0 removed" in statistics


def test_what_would_change_if_these_were_dropped(place: Place) -> None:
    service = on(place, "1.3")
    new = place.path / f"web_1.4{place.suffix}"
    place.bring(place.confext("1.4"), new)
    found = diff(service, "--to", str(new))
    assert (found["before"]["what"], found["after"]["what"]) == ("accepted", "dropped")
    assert [layer["version"] for layer in found["after"]["layers"]] == ["1.4"]
    assert by_path(found)["/etc/web.conf"]["diff"] == "@@ -1 +1 @@\n-1.3\n+1.4\n"
    same = place.path / f"web_1.5{place.suffix}"
    place.bring(place.confext("1.3"), same)
    assert diff(service, "--to", str(same), status=0)["files"] == []
    # It is only looked at.
    assert service.status()["layers"][0]["version"] == "1.3"
    (place.path / "web_2.raw").write_text("#!")
    done = place.run("diff", service.name, "--to", str(place.path / "web_2.raw"), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "web_2.raw: would be refused: " in done.stderr


def test_without_the_daemon_it_is_what_the_next_start_gets(place: Place) -> None:
    service = on(place, "1.3")
    assert place.daemon is not None
    place.daemon.stop()
    place.inside("nsenter", f"--target={service.pid}", "--mount", "umount", "/etc")
    found = diff(service)
    assert (found["before"]["what"], found["after"]["what"]) == ("shown", "accepted")
    assert by_path(found)["/etc/web.conf"]["change"] == "added"
    assert "(what its next start gets)" in place.run("diff", service.name, check=False).stdout


@images_only
def test_each_kind_of_change(place: Place) -> None:
    service = on(place, "1.3")
    drop(service, "app", {"hostname": b"whiteout", "passwd/x": b"1", "group": b"a\0b", NASTY: b"\x1b[31m\n"})
    service.logged("app added")
    files = by_path(diff(service, "--from", "1"))
    if os.path.lexists("/etc/hostname"):
        assert files["/etc/hostname"]["change"] == "removed"
        assert "\n-" in files["/etc/hostname"]["diff"]
    passwd = files["/etc/passwd"]
    assert (passwd["before"]["type"], passwd["after"]["type"]) == ("file", "directory")
    assert files["/etc/passwd/x"]["change"] == "added"
    assert files["/etc/group"]["diff"] is None and len(files["/etc/group"]["after"]["sha256"]) == 64
    done = place.run("diff", service.name, "--from", "1", check=False)
    assert (
        "\x1b" not in done.stdout
        and r"/etc/n\x1b[31m\n\xff.conf" in done.stdout
        and r"+\x1b[31m" in done.stdout
    )
    assert "extension-release.d/extension-release.app" in done.stdout


@images_only
def test_colours_are_for_terminals_that_want_them(place: Place) -> None:
    service = on(place, "1.3")

    def seen(**environment: str) -> str:
        main, other = pty.openpty()
        words = [str(COMMAND), "diff", service.name, "--from", "none"]
        variables = place.environment | {"TERM": "xterm"} | environment
        with subprocess.Popen(words, stdin=other, stdout=other, env=variables) as process:
            os.close(other)
            parts = []
            while True:
                try:
                    part = os.read(main, 1 << 16)
                except OSError:  # EIO: nobody writes there any more
                    break
                parts.append(part)
        os.close(main)
        assert process.returncode == 1
        return b"".join(parts).decode()

    assert "\x1b[32m+1.3\x1b[m" in seen()
    for without in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in seen(**without)


@root
@tool("setpriv")
def test_a_user_without_rights_is_told_so(open_place: Place) -> None:
    open_place.start_daemon()
    service = open_place.start()
    done = open_place.run("diff", service.name, prefix=AS_NOBODY, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "only root may, and members of the group confext-watcher: use sudo" in done.stderr


@images_only
def test_a_copy_that_is_gone_is_said(place: Place) -> None:
    service = on(place, "1.3", "1.4")
    assert place.daemon is not None
    place.daemon.stop()
    gone = json.loads(place.run("diff", "--json", service.name, "--from", "1", check=False).stdout)
    digest = gone["before"]["layers"][0]["digest"]
    (place.state / "store" / digest).unlink()
    done = place.run("diff", service.name, "--from", "1", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the copy of web 1.3 ({digest[:12]}) is gone from the store" in done.stderr
    Path(place.state / "store" / digest).write_bytes(b"no image")
    done = place.run("diff", service.name, "--from", "1", check=False)
    assert "is damaged: " in done.stderr and done.returncode == 2
    shutil.rmtree(place.state / "store")
    assert place.run("diff", service.name, "--from", "1", check=False).returncode == 2
