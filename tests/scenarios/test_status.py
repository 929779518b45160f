# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher status` (control/status.py) and `check` (images/image_check.py): the truth, without the daemon."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from scenarios.place import Place, image, tree
from support.needs import filesystem, root, tool
from support.signed import make_key, protected, trusted

images_only = pytest.mark.parametrize("place", ["images"], indirect=True)


def test_status_says_what_a_service_runs_on(shared: Place) -> None:
    service = shared.start()
    assert service.status()["layers"] == []
    before = time.time_ns() // 1000
    dropped = service.put("1.3")
    service.logged("web 1.3 added")
    found = service.status()
    assert (found["service"], found["manager"], found["state"]) == (service.name, "standalone", "running")
    assert found["pid"] == service.pid
    (layer,) = found["layers"]
    assert (layer["name"], layer["version"], layer["source"]) == ("web", "1.3", str(dropped))
    if not shared.trees:
        assert layer["digest"] == hashlib.sha256(dropped.read_bytes()).hexdigest()
    assert found["stack"] == found["accepted"] != ""
    assert before < found["since"] <= found["last"]["when"] < time.time_ns() // 1000
    assert found["last"]["outcome"] == "applied"
    table = shared.run("status", service.name).stdout
    assert all(
        word in table for word in (service.name, str(service.pid), "web 1.3", layer["digest"][:12], "applied")
    )


def test_status_reads_the_kernel_and_no_record(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    assert place.daemon is not None
    place.daemon.stop()
    service.put("1.4")
    assert [layer["version"] for layer in service.status()["layers"]] == ["1.3"]
    place.inside("nsenter", f"--target={service.pid}", "--mount", "umount", "/etc")
    assert service.status()["layers"] == []
    assert service.status()["accepted"] != ""


def test_status_of_what_is_not_there(place: Place) -> None:
    assert "no service takes part" in place.run("status").stdout
    place.start_daemon()
    assert "no service takes part" in place.run("status").stdout
    done = place.run("status", "nobody.service", check=False)
    assert done.returncode != 0
    assert "nobody.service" in done.stderr


def test_a_service_that_has_ended_is_stopped(place: Place) -> None:
    service = place.start()
    service.put("1.3")
    service.kill()
    service = place.start(name=service.name)
    service.kill()
    found = service.status()
    assert (found["state"], found["pid"], found["layers"]) == ("stopped", None, [])
    assert found["accepted"] != ""


def test_what_is_not_judged_yet_is_on_trial_and_wait_waits_for_it(place: Place) -> None:
    place.start_daemon()
    well = place.path / "well"
    health = ("--health-check", f"test -e {well}", "--set", "HealthStableSec=100ms")
    service = place.start("--reload-signal", "SIGHUP", *health)
    dropped = service.put("1.3")
    service.reloaded("1.3")
    waiting = place.run("wait", "--timeout=0.5", service.name, dropped.name, check=False)
    assert waiting.returncode == 4
    assert service.status()["onTrial"]
    said = "on trial: it is told to reload, and watched, for "
    assert said in place.run("status").stdout and said in place.run("status", service.name).stdout
    well.touch()
    assert "1.3 added, applied" in place.run("wait", service.name, dropped.name).stdout
    assert not service.status()["onTrial"]
    assert "on trial" not in place.run("status", service.name).stdout


def test_a_broken_image_does_not_change_since_when(shared: Place) -> None:
    service = shared.start()
    service.put("1.3")
    service.logged("web 1.3 added")
    since = service.status()["since"]
    made = shared.confext("1.4")
    if shared.trees:
        shutil.copytree(made, service.versions / ".new")
        (service.versions / ".new/etc/extension-release.d/extension-release.web").write_text("ID=other\n")
    else:
        (service.versions / ".new").write_bytes(made.read_bytes()[:4096])
    (service.versions / ".new").rename(service.versions / f"web_1.4{shared.suffix}")
    service.logged("web_1.4", "refused|incomplete", "it keeps web 1.3")
    found = service.status()
    assert [layer["version"] for layer in found["layers"]] == ["1.3"]
    assert found["since"] == since < found["last"]["when"]


@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_since_when_is_known_without_history(place: Place) -> None:
    versions = place.versions("web.service")
    versions.mkdir(parents=True)
    place.bring(place.confext("1.3"), versions / "web_1.3")
    before = time.time_ns() // 1000
    service = place.start(name="web.service")
    since = service.status()["since"]
    assert before < since < time.time_ns() // 1000
    place.start_daemon()
    assert service.status()["since"] == since


@images_only
def test_exit_statuses(place: Place) -> None:
    assert place.run("plan", check=False).returncode == 3
    assert place.run("plan", "--debug", "web.service", check=False).returncode == 3
    assert place.run("plan", "--debug", "web.service", "db.service", check=False).returncode == 2
    done = place.run("plan", "--debug", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "confext-watcher: plan --debug: of which SERVICE? It takes exactly one\n"
    assert place.run("wait", "web.service", "web_1.raw", check=False).returncode == 3
    assert place.run("history", "-n", "0", check=False).returncode == 2
    assert place.run("history", "--nonsense", check=False).returncode == 2
    place.start_daemon()
    assert place.run("wait", "web.service", "web_1.raw", check=False).returncode == 1
    place.start(name="web.service")
    assert place.run("wait", "web.service", "web_1.raw", check=False).returncode == 1
    (place.versions("web.service") / "web_1.raw").write_bytes(place.confext("1").read_bytes()[:9000])
    words = ("wait", "--timeout", "1", "web.service", "web_1.raw")
    assert place.run(*words, check=False).returncode == 4


@images_only
@pytest.mark.parametrize(
    "fstype", ["squashfs", pytest.param("erofs", marks=[tool("mkfs.erofs"), filesystem("erofs")])]
)
def test_check_says_that_an_image_is_good(place: Place, fstype: str) -> None:
    path = place.path / "web_1.4.raw"
    place.bring(image("web_1.4", "1.4", fstype=fstype), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    done = place.run("check", str(path))
    good = f"{path}: good: web 1.4, {fstype}, {path.stat().st_size} bytes, sha256 {digest}"
    assert done.stdout.splitlines() == [good, f"{path}: unprotected"]


@root
@tool("mksquashfs")
@tool("veritysetup")
@pytest.mark.parametrize("trees", [False, True], ids=["as-root", "in-a-user-namespace"])
def test_check_of_a_disk_image_says_what_of_it_is_proved(tmp_path: Path, trees: bool) -> None:
    maker, stranger = make_key(tmp_path, "maker"), make_key(tmp_path, "stranger")
    with Place(tmp_path, trees=trees) as place, trusted(maker):
        path = tmp_path / "web_1.4.raw"
        content = image("web_1.4", "1.4").read_bytes()
        path.write_bytes(protected(content, maker))
        place.bring(path, path)
        good, signed, *more = place.run("check", str(path)).stdout.splitlines()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        assert good == f"{path}: good: web 1.4, disk image with squashfs, {size} bytes, sha256 {digest}"
        by = f"signed by CN=maker (certificate sha256 {maker.fingerprint})"
        assert signed.startswith(
            f"{path}: {by}: its hash tree was verified over the file, by the root hash of its"
        )
        assert more == []
        path.write_bytes(protected(content, stranger))
        _, verity, warning = place.run("check", str(path)).stdout.splitlines()
        assert verity.startswith(
            f"{path}: verity: its hash tree was verified over the file, by the root hash of its"
        )
        assert warning.startswith(f"{path}: warning: signed by an unknown key")
        (found,) = json.loads(place.run("check", "--json", str(path)).stdout)["images"]
        assert (found["trust"]["protection"], found["trust"]["signer"]) == ("verity", "")


def test_check_of_a_tree(place: Place) -> None:
    path = place.path / "web_1.4"
    place.bring(tree("web_1.4", "1.4"), path)
    (found,) = json.loads(place.run("check", "--json", str(path)).stdout)["images"]
    assert found["admitted"]
    assert (found["name"], found["version"], found["format"]) == ("web", "1.4", "directory")


def test_the_digest_of_a_tree_is_the_one_that_runs(shared: Place) -> None:
    service = shared.start()
    path = service.put("1.3")
    service.logged("web 1.3 added")
    (found,) = json.loads(shared.run("check", "--json", str(path)).stdout)["images"]
    assert found["digest"] == service.status()["layers"][0]["digest"]


def test_check_names_each_image_that_would_be_refused(place: Place, tmp_path: Path) -> None:
    good = tmp_path / "web_1.4"
    place.bring(tree("web_1.4", "1.4"), good)
    foreign = tmp_path / "web_1.5"
    place.bring(tree("web_1.5", "1.5", release="ID=other\n"), foreign)
    empty = tmp_path / "web_1.6.raw"
    empty.touch()
    done = place.run("check", *map(str, (good, foreign, empty, tmp_path / "none.raw")), check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert "good: web 1.4" in lines[0] and lines[1] == f"{good}: unprotected"
    assert "would be refused: made for ID=other" in lines[2]
    assert "would be refused: empty" in lines[3]
    assert "No such file" in lines[4]


@root
@tool("mksquashfs")
def test_check_needs_no_root(tmp_path: Path) -> None:
    """In a user namespace nothing can be mounted: the release file is taken out by the image's own tools."""
    with Place(tmp_path, trees=True) as place:
        path = tmp_path / "web_1.4.raw"
        place.bring(image("web_1.4", "1.4"), path)
        assert "good: web 1.4, squashfs" in place.run("check", str(path)).stdout
        assert (
            subprocess.run(["losetup", "--associated", path], capture_output=True, check=True).stdout == b""
        )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (".web_1", "called like a copy in progress, or hidden"),
        ("web.v", "it is a directory for versions: name the versions in it"),
        ("web.v/web_1 4", "not called web_VERSION"),
        ("web.v/other_1", "not called web_VERSION"),
        ("web.v/web_1_s390x", "made for s390x"),
    ],
)
@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_check_refuses_what_would_not_be_looked_at(place: Place, path: str, reason: str) -> None:
    target = place.path / path
    target.parent.mkdir(exist_ok=True)
    place.bring(tree("web_1.4", "1.4"), target)
    done = place.run("check", str(target), check=False)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{target}: would be refused: it") and reason in done.stdout


@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_check_holds_a_tree_against_its_limit(place: Place) -> None:
    place.configure("ImageMax=10K")
    target = place.path / "web"
    place.bring(tree("web_1.4", "1.4"), target)
    done = place.run("check", str(target), check=False)
    assert "would be refused: too large" in done.stdout and "10240 are allowed (ImageMax=)" in done.stdout


@root
@tool("mksquashfs")
def test_a_tool_that_dies_silently_is_one_line(tmp_path: Path) -> None:
    with Place(tmp_path, trees=True) as place:
        path = tmp_path / "web_1.4.raw"
        place.bring(image("web_1.4", "1.4"), path)
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "unsquashfs").write_text("#!/bin/sh\nkill -SEGV $$\n")
        (tools / "unsquashfs").chmod(0o755)
        place.environment["PATH"] = f"{tools}:{os.environ['PATH']}"
        done = place.run("check", str(path), check=False)
        assert done.stdout == f"{path}: would be refused: unsquashfs cannot read it: was ended by SIGSEGV\n"


def test_status_of_a_named_service_has_its_settings_also_without_the_daemon(place: Place) -> None:
    service = place.start("--check", "true", "--set", "SettleSec=0", "--reload-signal", "SIGHUP")
    settings = [
        {"key": "SettleSec", "value": "0", "source": "--set"},
        {"key": "Check", "value": "true", "source": "--check"},
    ]
    assert service.status()["settings"] == settings
    place.start_daemon()
    assert service.status()["settings"] == settings
    for name in (service.name, service.name.removesuffix(".service"), "web-*"):
        assert "  Check=true  (--check)" in place.run("status", name).stdout
    assert "Check=" not in place.run("status").stdout
    assert place.run("history", service.name.removesuffix(".service")).stdout
    done = place.run("status", service.name, "nobody", check=False)
    assert (done.returncode, service.name in done.stdout, "nobody" in done.stderr) == (1, True, True)


def test_the_same_content_under_a_new_version_has_its_line(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    first = service.put("1.3")
    service.logged("web 1.3 added")
    place.bring(first, first.with_name(first.name.replace("1.3", "1.4")))
    line = service.logged("web 1.4 has the content that it had before: unchanged")
    assert "outcome=unchanged" in line
    assert service.heard == ["nothing", "1.3"]
    assert service.status()["last"]["outcome"] == "unchanged"
