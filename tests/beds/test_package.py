# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package in fresh containers: installed, upgraded, removed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import needs
from beds.bed import Bed
from beds.host import SLEEP, Host

pytestmark = [needs.bed, needs.tool("dpkg-deb")]

BUILDER = Path(__file__).parents[2] / "contrib/packaging/deb.py"
RELOADS = "ExecReload=/bin/sh -c 'echo >>/run/reloads'\n"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("packages")
    found = {}
    for version in ("1.0", "1.1"):
        done = subprocess.run(
            [sys.executable, str(BUILDER), str(directory), version],
            check=True,
            capture_output=True,
            text=True,
        )
        found[version] = Path(done.stdout.strip())
    return found


@pytest.fixture(params=["262", "257"])
def fresh(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A container that has never seen the program."""
    with Bed(request.param, project=False) as bed, contextlib.ExitStack() as stack:
        yield Host(bed, stack)


def install(host: Host, package: Path) -> None:
    shutil.copyfile(package, host.bed.path(f"/root/{package.name}"))
    host.bed.run(["dpkg", "--install", f"/root/{package.name}"])


@pytest.mark.limit(300)
def test_installed_upgraded_and_removed(fresh: Host, packages: dict[str, Path]) -> None:
    host = fresh
    install(host, packages["1.0"])
    state = (host.bed.property("confext-watcher", name) for name in ("ActiveState", "UnitFileState"))
    assert list(state) == ["active", "enabled"]
    host.unit("web.service", SLEEP + RELOADS)
    host.systemctl("start", "web.service")
    journal = host.journal()
    host.drop(host.image("web", {"web.txt": "1"}), "web.service")
    journal.applied("web.service")
    before = (
        host.main_pid("web.service"),
        host.mounts("web.service"),
        host.bed.path("/run/reloads").read_text(),
    )

    install(host, packages["1.1"])
    assert host.bed.property("confext-watcher", "ActiveState") == "active"
    assert "1.1" in host.bed.run(["dpkg-query", "--show", "confext-watcher"]).stdout
    after = (
        host.main_pid("web.service"),
        host.mounts("web.service"),
        host.bed.path("/run/reloads").read_text(),
    )
    assert after == before

    host.bed.run(["dpkg", "--remove", "confext-watcher"])
    assert host.see("web.service", "/etc/web.txt") == "1"
    host.systemctl("restart", "web.service")
    assert host.see("web.service", "/etc/web.txt") == ""
    assert "confext" not in host.bed.property("web.service", "DropInPaths")
    host.bed.run(["dpkg", "--purge", "confext-watcher"])
    left = host.bed.run(["find", "/usr", "/etc", "/var/lib", "-name", "*confext-watcher*"]).stdout.split()
    assert [path for path in left if "/dpkg/" not in path and "/systemd/deb-" not in path] == []
