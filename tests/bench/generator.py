# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generator on a host with 500 units that take part: systemd waits for it at boot and at every daemon-reload.

Processor time of the whole process, the start of Python included, so that it can be told on a busy machine too; the
floor is a Python that does nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support import CHECKOUT
from watcher.images.stacks import Stacks
from watcher.model import Entry, Kind, Layer, Stack

from .report import figure
from .result import Figure
from .rig import rig

UNITS = 500
KINDS = {
    "plain": "",
    "sandboxed": "ProtectSystem=full\n",
    "declared": "ExtensionImages=/srv/web.raw.v\n",
    "declared-sandboxed": "ProtectSystem=full\nExtensionImages=/srv/web.raw.v\n",
}
# As a packaged unit is: what it says of itself, and a sandbox.
_TEXT = """\
[Unit]
Description=Number {number}
Documentation=man:number(8)
After=network.target remote-fs.target nss-lookup.target

[Service]
Type=notify
ExecStartPre=/usr/sbin/number -t -q -g 'daemon on; master_process on;'
ExecStart=/usr/sbin/number -g 'daemon on; master_process on;'
ExecReload=/usr/sbin/number -g 'daemon on; master_process on;' -s reload
TimeoutStopSec=5
KillMode=mixed
NoNewPrivileges=yes
PrivateTmp=yes
{setting}
[Install]
WantedBy=multi-user.target
"""
_RUN = """\
import gc, sys
gc.disable()
sys.path.insert(0, sys.argv[1])
from watcher.generator import generate
from watcher.managers.systemd.unit_files import Index
generate(sys.argv[2], Index(sys.argv[3:4]), sys.argv[4], print)
"""


def run(count: int = 10) -> list[Figure]:
    """Where nobody takes part; then one row for each kind of unit, with accepted stacks and before any was."""
    with rig() as place:
        library = _library(place.where)
        kinds = ((kind, accepted) for kind in KINDS for accepted in (True, False))
        return [
            _nobody(place.where, count),
            *(_measure(place.where, library, kind, accepted, count) for kind, accepted in kinds),
        ]


def _library(scratch: Path) -> Path:
    """The program as it is installed, compiled."""
    library = scratch / "lib"
    command = [sys.executable, str(CHECKOUT / "contrib/packaging/install.py"), "--prefix", "/"]
    subprocess.run([*command, "--destdir", str(scratch), "--python", sys.executable], check=True)
    return library / "confext-watcher"


def _nobody(scratch: Path, count: int) -> Figure:
    """The shell that looks whether there is anything to do for Python."""
    units = scratch / "nobody"
    units.mkdir()
    for number in range(UNITS):
        (units / f"number{number}.service").write_text(_TEXT.format(number=number, setting=""))
    script = (scratch / "lib/systemd/system-generators/confext-watcher-generator").read_text()
    script, replaced = re.subn(r'^paths="[^"]*"$', f'paths="{units}"', script, flags=re.MULTILINE)
    assert replaced == 1
    times, floor = [], []
    for _ in range(count):
        times.append(_cpu(["/bin/sh", "-c", script, "generator", str(scratch / "none")]))
        floor.append(_cpu(["/bin/sh", "-c", ":"]))
    assert not (scratch / "none").exists()
    what = f"generator, {UNITS} units, none takes part, CPU"
    return figure("generator.nobody", what, "ms", (times, floor))


def _measure(scratch: Path, library: Path, kind: str, accepted: bool, count: int) -> Figure:
    directory = Path(tempfile.mkdtemp(dir=scratch))
    units, state = directory / "system", directory / "state"
    for path in (units, state):
        path.mkdir()
    for name in _units(units, KINDS[kind]):
        if accepted:
            layer = Layer("web.raw", "web", "1", "0" * 64, Kind.IMAGE, "/srv/web_1.raw")
            entry = Entry("web.raw", "/srv/web_1.raw", Kind.IMAGE)
            Stacks(str(state)).accept(name, Stack((layer,)), [entry])
    python = [sys.executable, "-ISB", "-c"]
    times, floor = [], []
    for _ in range(count):
        output = Path(tempfile.mkdtemp(dir=scratch / "run"))  # generators write to /run
        times.append(_cpu([*python, _RUN, *map(str, (library, output, units, state))]))
        floor.append(_cpu([*python, "pass"]))
        assert len(list(output.iterdir())) == UNITS
    what = f"generator, {UNITS} units: {kind}, {'accepted' if accepted else 'nothing accepted yet'}, CPU"
    key = f"generator.{kind}.{'accepted' if accepted else 'new'}"
    return figure(key, what, "ms", (times, floor), "100 ms")


def _units(directory: Path, setting: str) -> Iterator[str]:
    for number in range(UNITS):
        name = f"number{number}.service"
        (directory / name).write_text(_TEXT.format(number=number, setting=setting))
        if "Extension" not in setting:
            (directory / f"{name}.confext.d").mkdir()
            (directory / f"{name}.confext.d/web.raw").touch()
        yield name


def _cpu(command: list[str]) -> float:
    """Milliseconds of processor time, in user space and in the kernel."""
    pid = os.posix_spawn(command[0], command, {"PATH": os.defpath})
    _, status, used = os.wait4(pid, 0)
    assert status == 0, command
    return (used.ru_utime + used.ru_stime) * 1000
