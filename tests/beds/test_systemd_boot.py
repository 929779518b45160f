# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generator at boot: units start on their accepted stack, whoever runs, and nothing waits in a circle."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from images import confext, image

import needs
from beds import host as hosts
from beds.bed import Bed
from watcher.model import Entry, Kind, Layer, Stack
from watcher.stacks import Stacks

pytestmark = needs.bed

GENERATOR = "/usr/lib/systemd/system-generators/confext-watcher-generator"
WEB = "[Service]\nExecStart=/bin/sleep infinity\n"
EARLY = (
    "[Unit]\nDefaultDependencies=no\nBefore=sysinit.target\n"
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/cat /etc/web.txt\nStandardOutput=file:/run/early\n"
)


class Prepared(Bed):
    """A container with the program, two units that take part and what they were given before, at its next boot."""

    def __init__(self, version: str, watcher: bool) -> None:
        super().__init__(version, project=False)
        self._watcher = watcher

    def _copy(self, cached: Path) -> None:
        super()._copy(cached)
        installer = Path(__file__).parents[2] / "contrib/packaging/install.py"
        install = ["--destdir", str(self.root), "--prefix", "/usr", "--no-compile"]
        subprocess.run([sys.executable, str(installer), *install], check=True)
        for name, text, target in (("web", WEB, "multi-user"), ("early", EARLY, "sysinit")):
            self._unit(f"{name}.service", text, f"{target}.target")
        units = self.root / "etc/systemd/system"
        if self._watcher:
            wants = units / "multi-user.target.wants"
            (wants / "confext-watcher.service").symlink_to("/usr/lib/systemd/system/confext-watcher.service")
        else:
            (units / "confext-watcher.service").symlink_to("/dev/null")

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
