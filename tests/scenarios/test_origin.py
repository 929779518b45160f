# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher origin` (control/origin.py, control/subject.py, cli/show_origin.py, records/traces.py) on real
services, without a daemon (mounts/parts.py, images/stored.py)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scenarios.place import Place, Service
from support import images
from support.needs import root, tool
from support.nobody import AS_NOBODY

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)
NASTY = "n\x1b[31m\n\udcff.conf"


def origin(service: Service, *paths: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(service.place.run("origin", "--json", service.name, *paths).stdout)
    return found


def by_path(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {file["path"]: file for file in found["files"]}


def drop(service: Service, name: str, files: dict[str, bytes]) -> Path:
    """Another entry of the service: an image with these files, "whiteout" and "opaque" in what they are."""
    tree = images.confext(service.place.path / f"tree-{name}", name)
    for path, content in files.items():
        at = tree / "etc" / path
        if content == b"opaque":
            at.mkdir(parents=True)
            os.setxattr(at, "trusted.overlay.opaque", b"y")
            continue
        at.parent.mkdir(parents=True, exist_ok=True)
        if content == b"whiteout":
            os.mknod(at, stat.S_IFCHR, 0)
        else:
            at.write_bytes(content)
    target = service.drops / f"{name}.raw"
    service.place.bring(images.image(tree, service.place.path / f"{name}.squashfs"), target)
    return target


def test_each_file_is_traced_to_its_image_without_a_daemon(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    dropped = service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    assert place.daemon is not None
    place.daemon.stop()
    service.put("1.4")
    found = origin(service)
    (layer,) = found["layers"]
    assert (layer["name"], layer["version"], layer["source"]) == ("web", "1.3", str(dropped))
    assert layer["trust"]["protection"] == "unprotected" and layer["since"] == service.status()["since"]
    if not place.trees:
        assert layer["digest"] == hashlib.sha256(dropped.read_bytes()).hexdigest()
    files = by_path(found)
    assert {path: file["change"] for path, file in files.items()} == {
        f"/etc/{name}": "new"
        for name in (
            "web.conf",
            "web.large",
            "extension-release.d",
            "extension-release.d/extension-release.web",
        )
    }
    assert all(file["layer"] == 0 for file in files.values())
    table = place.run("origin", service.name).stdout
    for words in (
        f"{service.name}: runs on 1 layer",
        "web 1.3: ",
        "unprotected",
        str(dropped),
        "  web.conf ",
    ):
        assert words in table


def test_a_service_that_does_not_run_is_told_what_its_next_start_gets(place: Place) -> None:
    service = place.start()
    service.put("1.3")
    service.kill()
    place.start(name=service.name).kill()
    found = origin(service)
    assert (found["state"], found["layers"][0]["version"]) == ("stopped", "1.3")
    assert "/etc/web.conf" in by_path(found)
    assert "its next start gets 1 layer" in place.run("origin", service.name).stdout


def test_the_kernel_is_asked_and_no_record(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.logged("web 1.3 added")
    assert place.daemon is not None
    place.daemon.stop()
    place.inside("nsenter", f"--target={service.pid}", "--mount", "umount", "/etc")
    found = origin(service)
    assert (found["state"], found["stack"], found["layers"], found["files"]) == ("running", "", [], [])
    assert "every file is as in the host's /etc" in place.run("origin", service.name).stdout


@images_only
def test_what_covers_what(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    drop(service, "lower", {"hostname": b"lower\n", "d/a": b"1", "d/b": b"1", "e/x": b"1", NASTY: b"1"})
    service.logged("lower added")
    drop(service, "upper", {"hostname": b"whiteout", "d": b"opaque", "d/a": b"2", "e": b"a file\n"})
    service.logged("upper added")
    found = origin(service)
    assert [layer["name"] for layer in found["layers"]] == ["lower", "upper"]
    files = by_path(found)
    host = [None] if os.path.lexists("/etc/hostname") else []
    if host:
        assert (files["/etc/hostname"]["change"], files["/etc/hostname"]["layer"]) == ("removed", 1)
        assert files["/etc/hostname"]["covers"] == [0]
    assert (files["/etc/d/a"]["layer"], files["/etc/d/a"]["covers"]) == (1, [])
    assert "/etc/d/b" not in files
    assert (files["/etc/e"]["type"], files["/etc/e"]["covers"]) == ("file", [0])

    (step,) = origin(service, "hostname")["paths"]
    roles = [(piece["layer"], piece["role"], piece["coveredBy"]) for piece in step["chain"]]
    assert roles == [(1, "whiteout", None), (0, "covered", 1), *((one, "covered", 1) for one in host)]
    (step,) = origin(service, "/etc/d/b")["paths"]
    (piece,) = step["chain"]
    assert (piece["layer"], piece["role"], piece["coveredBy"], piece["at"]) == (0, "covered", 1, "/etc/d")
    text = place.run("origin", service.name, "d/b", "e", "hostname", NASTY).stdout
    assert "lower: file 0644 of 0:0, 1 bytes, covered by /etc/d of upper" in text
    assert "upper: a whiteout, which removes it" in text and "so nothing is there" in text
    assert r"/etc/n\x1b[31m\n\xff.conf" in text and "\x1b" not in text


@images_only
def test_what_is_mounted_below_etc_hides_the_stack(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    drop(service, "app", {"app/a.conf": b"1", "other": b"1"})
    service.logged("app added")
    place.inside("nsenter", f"--target={service.pid}", "--mount", "mount", "-t", "tmpfs", "x", "/etc/app")
    files = by_path(origin(service))
    assert files["/etc/app/a.conf"]["mount"] == "tmpfs on /etc/app"
    assert files["/etc/other"]["mount"] == ""
    (step,) = origin(service, "/etc/app/a.conf")["paths"]
    assert step["mount"] == "tmpfs on /etc/app" and step["chain"][0]["layer"] == 0
    assert "hidden by a mount: tmpfs on /etc/app" in place.run("origin", service.name, "app/a.conf").stdout


@tool("prlimit")
def test_a_stack_of_many_layers_takes_more_descriptors_than_a_shell_gives(place: Place) -> None:
    service = place.start()
    for number in range(60):
        made = place.confext(str(number), name=f"app{number}")
        place.bring(made, service.drops / f"app{number}{place.suffix}")
    service.kill()
    place.start(name=service.name).kill()
    few = ("prlimit", "--nofile=100:5000")
    found = json.loads(place.run("origin", "--json", service.name, prefix=few).stdout)
    assert len(found["layers"]) == 60
    files = by_path(found)
    assert all(files[f"/etc/app{number}.conf"]["change"] == "new" for number in range(60))
    assert len(files["/etc/extension-release.d"]["covers"]) == 59


def test_a_service_that_is_not_there(place: Place) -> None:
    done = place.run("origin", "nobody.service", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    said = "no service nobody.service takes part; `confext-watcher status` lists those that do"
    assert done.stderr == f"confext-watcher: {said}\n"


@root
@tool("setpriv")
def test_a_user_without_rights_is_told_so(open_place: Place) -> None:
    open_place.start_daemon()
    service = open_place.start()
    done = open_place.run("origin", service.name, prefix=AS_NOBODY, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "only root may, and members of the group confext-watcher: use sudo" in done.stderr


@images_only
def test_a_reader_that_has_seen_enough_and_a_kill_leave_nothing(place: Place) -> None:
    """What is left behind is looked for after the module (conftest.py)."""
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.logged("web 1.3 added")
    stop = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    source = (
        "import sys; from watcher.control import subject; from watcher.cli.main import main;"
        f"subject.Subject.layers = lambda *_: exec({stop!r});"
        "main(['origin', sys.argv[1]])"
    )
    words = [sys.executable, "-c", source, service.name]
    done = subprocess.run(words, env=place.environment, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert "tmpfs" not in place.run("origin", service.name).stdout
