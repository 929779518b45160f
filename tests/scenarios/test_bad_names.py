# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that nobody should give to anything: they work, or one line says why not, and they never break a line."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from scenarios.place import COMMAND, Place, Service

trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)

# (name of an entry, how a line shows it, whether it can be used)
NAMES = {
    "a space": ("my conf", "my conf", True),
    "single quotes": ("it's", "it's", True),
    "double quotes": ('"quoted"', r"\\\"quoted\\\"", True),
    "a colon": ("a:b", "a:b", True),
    "a backslash": ("a\\b", r"a\\\\\\\\b", True),
    "a comma": ("a,b=c", "a,b=c", True),
    "a percent sign": ("100%n", "100%n", True),
    "UTF-8": ("größe", "größe", True),
    "a newline": ("two\nlines", r"two\\\\nlines", False),
    "an escape": ("red\x1b[31m", r"red\\\\x1b\[31m", False),
    "not UTF-8": (os.fsdecode(b"caf\xe9"), r"caf\\\\xe9", False),
}


@pytest.mark.parametrize(("name", "shown", "good"), NAMES.values(), ids=NAMES)
def test_names_of_entries(service: Service, name: str, shown: str, good: bool) -> None:
    place = service.place
    place.bring(place.confext("", "odd", name=name), service.drops / (name + place.suffix))
    if good:
        service.logged(f"{shown} added, applied")
        assert service.has("odd", f"{name}.conf")
        labels = [layer["name"] for layer in service.status()["layers"]]
        assert labels.count(name) == 1
    else:
        service.logged(f"{shown}(.raw)? refused: its etc/extension-release.d/ has", "it goes without")
    service.put("1.5")
    service.reloaded("1.5")


DIRECTORIES = {name: case[0] for name, case in NAMES.items()}


@trees_only
@pytest.mark.parametrize("name", DIRECTORIES.values(), ids=DIRECTORIES)
def test_names_of_directories(shared: Place, name: str) -> None:
    """What leads to a drop may be called anything."""
    top = shared.path / f"{next(shared.numbers)}{name}"
    drops = top / f"{name}.confext.d"
    versions = drops / "web.v"
    versions.mkdir(parents=True)
    service = shared.start("--confext-dir", str(drops), "--reload-signal", "HUP", declared=False)
    service.put("1.3", at=versions)
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    (versions / "web_1.4").symlink_to("nowhere")
    service.logged("web_1.4: passed over: the link leads nowhere")
    printed = shared.run("status", "--json", service.name).stdout
    (found,) = json.loads(printed)["services"]
    assert [layer["version"] for layer in found["layers"]] == ["1.3"]
    history = json.loads(shared.run("history", "--json", service.name).stdout)["events"]
    assert history[0]["version"] == "1.3"
    top.rename(shared.path / f"gone-{next(shared.numbers)}")
    service.reloaded("nothing")


@trees_only
def test_odd_versions(service: Service) -> None:
    """Whatever cannot be a version is told about, and never taken for one."""
    for name in ("web_1 5", "web_1\n5", "web_1:5", os.fsdecode(b"web_1\xe9"), "web_'", "web_"):
        path = service.versions / name
        service.place.bring(service.place.confext("1.5"), path)
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["1.4"]
    assert service.log_lines()


@trees_only
def test_a_very_long_name(service: Service) -> None:
    """overlayfs takes 255 bytes for the path of a layer: the name is cut there, and whole in the status."""
    name = "n" * 230
    service.place.bring(service.place.confext("", "long", name=name), service.drops / name)
    service.logged(f"{name} added, applied")
    assert service.has("long", f"{name}.conf")
    assert name in [layer["name"] for layer in service.status()["layers"]]


def test_output_is_printable_for_any_name(shared: Place, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9\n.raw")
    path.touch()
    done = shared.run("check", str(path), check=False)
    assert done.stdout.endswith("/caf\\xe9\\n.raw: would be refused: empty\n")
    (found,) = json.loads(shared.run("check", "--json", str(path), check=False).stdout)["images"]
    assert found["reason"] == "empty"


FORGED = "red\x1b[31m\nweb.service: web 9 applied"


@trees_only
def test_an_admitted_name_forges_no_line(shared: Place, service: Service) -> None:
    """By this attribute any name goes with any release file."""
    made, target = shared.path / f"{next(shared.numbers)}", service.drops / FORGED
    shutil.copytree(shared.confext("", "odd"), made)
    os.setxattr(made / "etc/extension-release.d/extension-release.web", "user.extension-release.strict", b"0")
    made.rename(target)
    assert "9 applied added, applied in" in service.logged("red")
    assert FORGED in [layer["name"] for layer in service.status()["layers"]]
    printed = [
        shared.run(*words).stdout
        for words in (
            ("status", service.name),
            ("history", service.name),
            ("wait", service.name, str(target)),
        )
    ]
    target.rename(shared.path / f"gone-{next(shared.numbers)}")
    service.logged("red", "removed")
    printed.append(shared.run("history", service.name).stdout)
    printed.append(shared.run("rollback", service.name).stdout)
    printed.append(shared.run("plan", service.name).stdout)
    printed.append(shared.run("rollback", "--forget", service.name).stdout)
    text = "".join(printed)
    assert text.count("red\\x1b") >= 6, text
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("web.service")]


@pytest.mark.parametrize("place", ["images"], indirect=True)
def test_a_terminal_gets_lines_for_people(place: Place) -> None:
    """With the name of a file in them, which is not told to the terminal."""
    drops = place.drops("web.service")
    (drops / f"{FORGED}.raw").mkdir(parents=True)
    leader, follower = pty.openpty()
    words = [str(COMMAND), "exec", "--name", "web.service", "--confext-dir", str(drops), "--", "true"]
    environment = place.environment | {"NO_COLOR": "1"}
    subprocess.run(words, env=environment, stderr=follower, stdin=subprocess.DEVNULL, check=True)
    os.close(follower)
    written = b""
    with contextlib.suppress(OSError), open(leader, "rb", buffering=0) as terminal:
        while part := terminal.read(65536):
            written += part
    (line,) = written.decode().splitlines()
    assert re.match(r"\d\d:\d\d:\d\d  /", line)
    assert "red\\x1b[31m" in line and "\x1b" not in line
