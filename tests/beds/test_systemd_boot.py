# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generator at boot: units start on their accepted stack, whoever runs, and nothing waits in a circle.

Covers managers/combined.py: a service of `exec` runs beside the units.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from beds import host as hosts
from beds.bed import Bed
from support import needs
from support.images import confext, image
from watcher.images.stacks import Stacks
from watcher.model import Entry, Kind, Layer, Stack

pytestmark = needs.bed

WATCHER = "confext-watcher.service"
GENERATOR = "/usr/lib/systemd/system-generators/confext-watcher-generator"
WEB = "[Service]\nExecStart=/bin/sleep infinity\n"
BOXED = f"""{WEB}ExecReload=/bin/true
TemporaryFileSystem=/opt
ExtensionImages=-/srv/boxed/web.raw.v
"""
EARLY = (
    "[Unit]\nDefaultDependencies=no\nBefore=sysinit.target\n"
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/cat /etc/web.txt\nStandardOutput=file:/run/early\n"
)


class Prepared(Bed):
    """A container with the program, two units that take part and what they were given before, at its next boot.

    Args:
        spoil: what else is done to its root directory before.
    """

    def __init__(
        self,
        version: str,
        watcher: bool,
        prefix: str = "/usr",
        spoil: Callable[[Path], None] = lambda root: None,
    ) -> None:
        super().__init__(version, project=False)
        self._watcher = watcher
        self._prefix = prefix
        self._spoil = spoil

    def _copy(self, cached: Path) -> None:
        super()._copy(cached)
        self.installer("--no-compile")
        for name, text, target in (("web", WEB, "multi-user"), ("early", EARLY, "sysinit")):
            self._unit(f"{name}.service", text, f"{target}.target")
        units = self.root / "etc/systemd/system"
        if self._watcher:
            wants = units / "multi-user.target.wants"
            (wants / WATCHER).symlink_to(f"{self._prefix}/lib/systemd/system/{WATCHER}")
        else:
            (units / WATCHER).symlink_to("/dev/null")
        self._spoil(self.root)

    def installer(self, *options: str) -> None:
        installer = Path(__file__).parents[2] / "contrib/packaging/install.py"
        where = ["--destdir", str(self.root), "--prefix", self._prefix]
        subprocess.run([sys.executable, str(installer), *where, *options], check=True)

    def _unit(self, name: str, text: str, target: str) -> None:
        units = self.root / "etc/systemd/system"
        (units / name).write_text(text)
        (units / f"{target}.wants").mkdir(exist_ok=True)
        (units / f"{target}.wants" / name).symlink_to(f"/etc/systemd/system/{name}")
        (units / f"{name}.confext.d").mkdir()
        with tempfile.TemporaryDirectory() as scratch:
            tree = confext(Path(scratch) / "tree", "web", {"etc/web.txt": b"accepted\n"})
            source = image(tree, Path(scratch) / "web.raw")
            shutil.copyfile(source, units / f"{name}.confext.d/web.raw")
            content = source.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        state = self.root / "var/lib/confext-watcher"
        (state / "store").mkdir(parents=True, exist_ok=True)
        (state / "store" / digest).write_bytes(content)
        path = f"/etc/systemd/system/{name}.confext.d/web.raw"
        layer = Layer("web.raw", "web", "", digest, Kind.IMAGE, path)
        entry = Entry("web.raw", path, Kind.IMAGE, optional=True)
        Stacks(str(state)).accept(name, Stack((layer,)), [entry])


@pytest.mark.parametrize("version", ["262", "257"])
@pytest.mark.parametrize("watcher", [True, False], ids=["watcher", "no-watcher"])
def test_a_boot_brings_each_unit_up_on_its_accepted_stack(version: str, watcher: bool) -> None:
    with Prepared(version, watcher) as bed, contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        assert host.see("web.service", "/etc/web.txt") == "accepted"
        assert bed.path("/run/early").read_text() == "accepted\n"
        assert not bed.path("/etc/web.txt").exists()
        assert "ordering cycle" not in bed.journal("--boot", "_PID=1")
        assert bed.property("confext-watcher", "ActiveState") == ("active" if watcher else "inactive")


def failed(bed: Bed) -> list[str]:
    listed = bed.run(["systemctl", "list-units", "--failed", "--plain", "--no-legend"]).stdout
    return [line.split()[0] for line in listed.splitlines()]


def break_the_library(root: Path) -> None:
    (root / "usr/lib/confext-watcher/watcher/generator.py").write_text("raise RuntimeError('broken')\n")


@pytest.mark.parametrize("version", ["262", "257"])
def test_a_broken_program_does_not_break_the_boot(version: str) -> None:
    with Prepared(version, False, spoil=break_the_library) as bed:
        assert failed(bed) == ["early.service"]  # it cannot do without its stack
        assert bed.property("web.service", "ActiveState") == "active"
        assert bed.property("web.service", "DropInPaths") == ""
        done = bed.run([GENERATOR, "/tmp/out", "/tmp/out", "/tmp/out"])
        assert "RuntimeError: broken" in done.stderr


def put_odd_files(root: Path) -> None:
    """Links to themselves, a file that never ends, names that are none; among units and among what was accepted."""
    units = root / "etc/systemd/system"
    for directory in ("web.service.d", "other.service.d", "service.d"):
        (units / directory).mkdir()
        (units / directory / "x.conf").symlink_to("x.conf")
    for name in ("loop.service", "loop.service.d", "loop.service.confext.d"):
        (units / name).symlink_to(name)
    os.mkfifo(units / "fifo.service")
    for name in ("my@thing", "web", "a b@c.service"):
        Stacks(str(root / "var/lib/confext-watcher")).accept(name, Stack(), [])


@pytest.mark.parametrize("version", ["262", "257"])
def test_odd_files_and_names_cost_no_unit_its_stack(version: str) -> None:
    with Prepared(version, True, spoil=put_odd_files) as bed, contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        assert failed(bed) == []
        assert host.see("web.service", "/etc/web.txt") == "accepted"
        # Nor do those of services without systemd.
        bed.path("/srv/drops").mkdir()
        journal = host.journal()
        exec_ = ["confext-watcher", "exec", "--name", "web@1", "--confext-dir", "/srv/drops"]
        bed.run(["systemd-run", "--quiet", "--unit=standalone", *exec_, "--", "sleep", "infinity"])
        bed.run(["sh", "-c", "until confext-watcher status web@1; do sleep 0.1; done"])
        shutil.copyfile(host.image("web", {"web.txt": "2"}), bed.path("/srv/drops/web.raw"))
        journal.applied("web@1")
        host.systemctl("daemon-reload")
        host.drop(host.image("web", {"web.txt": "2"}), "web.service")
        journal.applied("web.service")
        assert host.see("web.service", "/etc/web.txt") == "2"
        assert bed.property(WATCHER, "NRestarts") == "0"


@pytest.mark.parametrize("version", ["262", "257"])
def test_after_a_power_cut_a_unit_starts_on_a_copy_that_was_read_before(version: str) -> None:
    with Prepared(version, True) as bed, contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        assert host.see("web.service", "/etc/web.txt") == "accepted"
        state = bed.path("/var/lib/confext-watcher")
        found = json.loads((state / "checked").read_text())
        assert found["boot"]
        # A container has the boot ID of its host.
        (state / "checked").write_text(json.dumps(found | {"boot": "of before"}))
        digest = os.path.basename(os.readlink(state / "units/web.service/web.raw"))
        content = (state / "store" / digest).read_bytes()
        (state / "store" / digest).write_bytes(bytes(16) + content[16:])
        bed.reboot()
        state = bed.path("/var/lib/confext-watcher")
        assert (state / "store" / digest).read_bytes() == content
        assert host.see("web.service", "/etc/web.txt") == "accepted"
        ready, started = (
            int(bed.property(unit, f"{what}TimestampMonotonic"))
            for unit, what in ((WATCHER, "ActiveEnter"), ("web.service", "ExecMainStart"))
        )
        assert 0 < ready <= started
        said = bed.journal("--unit=confext-watcher")
        after = said.partition("went down while the watcher ran")[2]
        assert 0 < after.find("damaged and not used any more") < after.find("watching for")


def add_a_generator(root: Path) -> None:
    generators = root / "etc/systemd/system-generators"
    generators.mkdir()
    quad = "[Service]\\nExecStart=/bin/sleep infinity\\nProtectSystem=full\\n"
    (generators / "quad").write_text(f"#!/bin/sh\nprintf '{quad}' >\"$1/quad.service\"\n")
    (generators / "quad").chmod(0o755)
    (root / "etc/systemd/system/quad.service.confext.d").mkdir()


@pytest.mark.parametrize("version", ["262", "257"])
def test_a_unit_of_another_generator_takes_part_without_a_daemon_reload(version: str) -> None:
    with Prepared(version, True, spoil=add_a_generator) as bed, contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        assert "generator/quad.service.d/zzzz-confext" in bed.property("quad.service", "DropInPaths")
        host.systemctl("start", "quad.service")
        journal = host.journal()
        host.drop(host.image("web", {"web.txt": "1"}), "quad.service")
        journal.applied("quad.service")
        assert host.see("quad.service", "/etc/web.txt") == "1"
        host.systemctl("restart", WATCHER)
        assert bed.property(WATCHER, "ActiveState") == "active"
        said = bed.journal("--boot", f"--unit={WATCHER}")
        assert "did not give it its drop-in" not in said


@pytest.mark.parametrize("version", ["262", "257"])
def test_the_default_prefix_does_as_well(version: str) -> None:
    with Prepared(version, True, prefix="/usr/local") as bed, contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        assert host.see("web.service", "/etc/web.txt") == "accepted"
        assert bed.property(WATCHER, "ActiveState") == "active"
        bed.run(["journalctl", "--update-catalog"])
        journal = host.journal()
        host.drop(host.image("web", {"web.txt": "2"}), "web.service")
        journal.applied("web.service")
        assert "is in place for web.service" in bed.journal("--catalog", "--unit=web.service")
        host.systemctl("disable", WATCHER)
        host.systemctl("preset", WATCHER)
        assert bed.property(WATCHER, "UnitFileState") == "enabled"
        host.systemctl("disable", "--now", WATCHER)
        bed.installer("--uninstall")
        host.systemctl("daemon-reload")
        assert bed.property("web.service", "DropInPaths") == ""
        assert bed.property(WATCHER, "LoadState") == "not-found"


def test_a_unit_that_loses_its_sandbox_by_its_own_images_runs_on_accepted_ones(bed: Bed) -> None:
    hosts.install(bed)
    with contextlib.ExitStack() as stack:
        host = hosts.Host(bed, stack)
        versions = bed.path("/srv/boxed/web.raw.v")
        versions.mkdir(parents=True)
        stack.callback(shutil.rmtree, versions.parent)
        host.unit("boxed.service", BOXED, takes_part=False)
        host.watch()
        journal = host.journal()
        host.systemctl("start", "boxed.service")
        shutil.copyfile(host.image("web_1", {"web.txt": "1"}), versions / "web_1.raw")
        journal.applied("boxed.service")
        tree = confext(versions / ".tree", "web", {"etc/web.txt": b"2"}, "ID=elsewhere\nVERSION_ID=1\n")
        image(tree, versions / ".web").rename(versions / "web_2.raw")
        journal.outcome("boxed.service", "refused")
        mounted = etc(host)
        for _ in range(
            2
        ):  # systemd's own refresh (258 and later) would put it on the newest, the refused one
            host.systemctl("reload", "boxed.service")
            assert etc(host) == mounted
        host.systemctl("restart", "boxed.service")
        assert host.see("boxed.service", "/etc/web.txt") == "1"


def etc(host: hosts.Host) -> list[str]:
    """The mounts on the service's `/etc`: what they are and the number of each."""
    return [" ".join(row) for row in host.mounts("boxed.service") if row[4] == "/etc"]


def test_an_old_systemd_is_refused_in_one_line_and_not_asked_again(bed254: Bed) -> None:
    done = bed254.run(["confext-watcher", "run"], check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("confext-watcher: systemd 254") and done.stderr.count("\n") == 1
    assert bed254.run(["systemctl", "start", WATCHER], check=False).returncode != 0
    assert bed254.property(WATCHER, "SubState") == "failed"
    assert bed254.property(WATCHER, "NRestarts") == "0"
    bed254.run(["systemctl", "reset-failed", WATCHER])


def test_the_generator_starts_no_python_where_nobody_takes_part(bed: Bed) -> None:
    hosts.install(bed)
    run = ["strace", "-f", "-e", "trace=execve", GENERATOR, "/tmp/out", "/tmp/out", "/tmp/out"]
    assert "python" not in bed.run(run).stderr
    assert not bed.path("/tmp/out").exists()
    directory = bed.path("/etc/systemd/system/systemd-journald.service.confext.d")
    directory.mkdir()
    try:
        assert "python" in bed.run(run).stderr
    finally:
        directory.rmdir()
    dropin = bed.path("/tmp/out/systemd-journald.service.d/zzzz-confext-watcher.conf").read_text()
    assert "After=" not in dropin
