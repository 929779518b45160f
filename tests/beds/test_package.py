# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian package in fresh containers: installed, booted, upgraded, removed, purged."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds.bed import Bed
from beds.host import SLEEP, Host
from support import needs

pytestmark = [needs.bed, needs.tool("dpkg-deb")]

BUILDER = Path(__file__).parents[2] / "contrib/packaging/deb.py"
DROPS = "/srv/web.raw.v"
# It declares its images itself, so that systemd has something to go by once the package is gone.
WEB = f"""{SLEEP}ExecReload=/bin/sh -c 'echo >>/var/reloads'
ExtensionImages=-{DROPS}
[Install]
WantedBy=multi-user.target
"""


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


def drop(host: Host, version: str) -> None:
    """A version of what web.service declares; returns when it is applied."""
    built = host.image(f"web_{version}", {"web.txt": version})
    shutil.copyfile(built, host.bed.path(f"{DROPS}/{built.name}"))
    host.bed.run(["confext-watcher", "wait", "web.service", f"{DROPS}/{built.name}", "--timeout=30"])


def state(host: Host) -> tuple[str, str]:
    return (
        host.bed.property("confext-watcher", "ActiveState"),
        host.bed.property("confext-watcher", "UnitFileState"),
    )


def running(host: Host) -> tuple[int, list[list[str]], str]:
    """What an upgrade must not touch."""
    return (
        host.main_pid("web.service"),
        host.mounts("web.service"),
        host.bed.path("/var/reloads").read_text(),
    )


@pytest.mark.limit(400)
def test_the_life_of_the_package(fresh: Host, packages: dict[str, Path]) -> None:
    host = fresh
    install(host, packages["1.0"])
    assert state(host) == ("active", "enabled")
    host.bed.path(DROPS).mkdir()
    host.bed.path("/etc/systemd/system/web.service").write_text(WEB)
    host.systemctl("daemon-reload")
    host.systemctl("enable", "--now", "web.service")
    drop(host, "1")
    assert host.see("web.service", "/etc/web.txt") == "1"
    assert "is in place for web.service" in host.bed.journal("--catalog", "--unit=web.service")

    # The group is there, and the watcher knows it: its members are told what others are not.
    stranger = ["setpriv", "--reuid=65534", "--regid=65534"]
    for groups, redacted in ((["--clear-groups"], True), (["--groups=confext-watcher"], False)):
        said = host.bed.run([*stranger, *groups, "confext-watcher", "history", "--json"]).stdout
        assert json.loads(said)["redacted"] is redacted
        assert (DROPS in said) is not redacted

    # After a power cut, both are there again, and all is as before.
    host.bed.reboot()
    assert state(host) == ("active", "enabled")
    assert host.see("web.service", "/etc/web.txt") == "1"
    drop(host, "2")
    assert host.see("web.service", "/etc/web.txt") == "2"

    # An upgrade is another watcher, and nothing else.
    before, watcher = running(host), host.main_pid("confext-watcher")
    install(host, packages["1.1"])
    assert state(host) == ("active", "enabled")
    assert "1.1" in host.bed.run(["dpkg-query", "--show", "confext-watcher"]).stdout
    assert host.main_pid("confext-watcher") != watcher
    assert running(host) == before
    drop(host, "3")
    assert host.see("web.service", "/etc/web.txt") == "3"

    # Removed, it leaves the running service alone; from its next start on, it is systemd's.
    pid = host.main_pid("web.service")
    host.bed.run(["dpkg", "--remove", "confext-watcher"])
    assert (host.main_pid("web.service"), host.see("web.service", "/etc/web.txt")) == (pid, "3")
    assert host.bed.property("web.service", "DropInPaths") == ""
    assert DROPS in host.bed.property("web.service", "ExtensionImages")
    built = host.image("web_4", {"web.txt": "4"})
    shutil.copyfile(built, host.bed.path(f"{DROPS}/{built.name}"))
    assert host.see("web.service", "/etc/web.txt") == "3"
    host.systemctl("restart", "web.service")
    assert host.see("web.service", "/etc/web.txt") == "4"

    # It comes back as if it had not been away, and takes over what systemd has mounted meanwhile, as it is.
    before = running(host)
    install(host, packages["1.0"])
    assert state(host) == ("active", "enabled")
    host.bed.run(["confext-watcher", "wait", "web.service", f"{DROPS}/web_4.raw", "--timeout=30"])
    assert running(host) == before
    # What an administrator then chooses outlives an upgrade.
    host.systemctl("disable", "--now", "confext-watcher")
    install(host, packages["1.1"])
    assert state(host) == ("inactive", "disabled")

    host.bed.run(["dpkg", "--purge", "confext-watcher"])
    assert host.see("web.service", "/etc/web.txt") == "4"
    everywhere = ["/usr", "/etc", "/var", "/run"]
    left = host.bed.run(["find", *everywhere, "-xdev", "-name", "*confext*watcher*"], check=False).stdout
    assert left == ""


def test_purged_it_leaves_the_trees_that_services_still_have(fresh: Host, packages: dict[str, Path]) -> None:
    """Both those that were swapped in, and those that systemd has mounted at the start of a service."""
    host = fresh
    install(host, packages["1.0"])
    names = ("swapped.service", "started.service", "stopped.service")
    for name in names:
        host.bed.path(f"/etc/systemd/system/{name}.confext.d/web.v").mkdir(parents=True)
        host.bed.path(f"/etc/systemd/system/{name}").write_text(f"{SLEEP}ExecReload=/bin/true\n")
    host.systemctl("daemon-reload")
    host.systemctl("start", *names)
    for name in names:
        tree = f"/etc/systemd/system/{name}.confext.d/web.v/web_1"
        host.drop_tree(host.tree("web_1", {"web.txt": name}), tree)
        host.bed.run(["confext-watcher", "wait", name, tree, "--timeout=30"])
    host.systemctl("restart", "started.service")
    host.systemctl("stop", "stopped.service")
    store = host.bed.path("/var/lib/confext-watcher/store")
    assert len([path for path in store.iterdir() if path.is_dir()]) == 3

    said = host.bed.run(["dpkg", "--purge", "confext-watcher"]).stderr
    assert "until their next start: started.service swapped.service" in said
    assert "rm -rf /var/lib/confext-watcher" in said
    for name in names[:2]:
        assert host.see(name, "/etc/web.txt") == name
        assert host.see(name, "/etc/hostname") == host.bed.name
    assert [path.name for path in store.parent.iterdir()] == ["store"]
    assert len(list(store.iterdir())) == 2

    # It comes back, and goes on from there.
    install(host, packages["1.1"])
    for name in names[:2]:
        tree = f"/etc/systemd/system/{name}.confext.d/web.v/web_2"
        host.drop_tree(host.tree("web_2", {"web.txt": f"{name} 2"}), tree)
        host.bed.run(["confext-watcher", "wait", name, tree, "--timeout=30"])
        assert host.see(name, "/etc/web.txt") == f"{name} 2"

    # Nobody has them any more.
    host.systemctl("stop", *names)
    said = host.bed.run(["dpkg", "--purge", "confext-watcher"]).stderr
    assert "until their next start" not in said
    assert not store.parent.exists()
