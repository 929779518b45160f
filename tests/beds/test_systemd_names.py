# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd reads what we write as it was meant, whatever the names are: it is asked, not our own parser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, SLEEP, UNITS, Host
from support import nasty, needs
from support.images import image
from watcher.managers.systemd import drop_ins
from watcher.managers.systemd.unit_files import DROPIN

pytestmark = needs.bed

PROPERTIES = ("ExtensionImages", "ExtensionDirectories", "BindReadOnlyPaths", "ReadOnlyPaths")
REC = 16384  # MS_REC
COMMANDS = ("ExecStartPre", "ExecStartPost", "ExecReload", "ExecCondition", "ExecStop", "Environment")


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def properties(host: Host, unit: str, *names: str) -> dict[str, Any]:
    """As the bus has them, without anybody's quotes."""
    escaped = "".join(char if char.isalnum() else f"_{ord(char):02x}" for char in unit)
    path = f"/org/freedesktop/systemd1/unit/{escaped}"
    asked = ["busctl", "get-property", "--json=short", "org.freedesktop.systemd1", path]
    said = host.bed.run([*asked, "org.freedesktop.systemd1.Service", *names]).stdout
    return dict(zip(names, (json.loads(line)["data"] for line in said.splitlines()), strict=True))


def test_systemd_reads_each_name_as_it_was_meant(host: Host) -> None:
    drop_in = drop_ins.DropIn("for a test")
    meant: dict[str, list[object]] = {key: [] for key in PROPERTIES}
    refused = 0
    for number, name in enumerate(nasty.names(400)):
        path = f"/srv/{number}{name}/x"
        bound = f"/opt{path}"
        makers: dict[str, tuple[Callable[[], drop_ins.Word], object]] = {
            "ExtensionImages": (
                partial(drop_ins.image, path, "ro", optional=True),
                [path, True, [["root", "ro"]]],
            ),
            "ExtensionDirectories": (partial(drop_ins.path, path, optional=True), f"-{path}"),
            "BindReadOnlyPaths": (
                partial(drop_ins.path, path, bound, optional=True),
                [path, bound, True, REC],
            ),
            "ReadOnlyPaths": (partial(drop_ins.path, path, optional=True), f"-{path}"),
        }
        for key, (make, value) in makers.items():
            try:
                drop_in.assign("Service", key, make())
                meant[key].append(value)
            except drop_ins.Unwritable:
                refused += 1
    host.unit("names.service", "[Service]\nExecStart=/bin/true\n", takes_part=False)
    directory = host.bed.path(f"{UNITS}/names.service.d")
    directory.mkdir()
    (directory / DROPIN).write_text(str(drop_in))
    host.systemctl("daemon-reload")
    found = properties(host, "names.service", *PROPERTIES, *COMMANDS)
    assert refused and len(meant["ReadOnlyPaths"]) > 200
    for key in PROPERTIES:
        assert found[key] == meant[key]
    assert [found[key] for key in COMMANDS] == [[]] * len(COMMANDS)
    verified = host.bed.run(["systemd-analyze", "verify", f"{UNITS}/names.service"], check=False)
    assert DROPIN not in verified.stdout + verified.stderr


def test_nobody_gets_a_line_of_his_own_into_a_unit(host: Host) -> None:
    """A directory of sysexts to which a stranger may write, and the unit starts on the good one."""
    attack = os.fsdecode(b'tools_2_a"\nExecStartPre=+touch /run/owned #')
    tools = host.bed.path("/srv/tools.v")
    host.stack.callback(shutil.rmtree, tools)
    for name in ("tools_1", attack):
        release = tools / name / "usr/lib/extension-release.d/extension-release.tools"
        release.parent.mkdir(parents=True)
        release.write_text("ID=_any\n")
        (tools / name / "usr/tools").write_text(name)
    host.unit("tools.service", f"{SLEEP}ExtensionDirectories=/srv/tools.v/tools___\n", takes_part=False)
    journal = host.journal()
    host.watch()
    # The watcher looks into what is declared, and has the generator run again.
    host.systemctl("daemon-reload")
    host.systemctl("restart", "tools.service")
    assert not host.bed.path("/run/owned").exists()
    found = properties(host, "tools.service", "ExecStartPre", "ExtensionDirectories")
    assert found["ExecStartPre"] == []
    assert found["ExtensionDirectories"][-1] == "/srv/tools.v/tools_1"
    assert all(path.startswith(f"-{site.STATE}/units/") for path in found["ExtensionDirectories"][:-1])
    assert host.see("tools.service", "/usr/tools") == "tools_1"
    entry = journal.until(lambda entry: "left out" in entry["MESSAGE"])
    assert "ExecStartPre" in entry["MESSAGE"] and entry["MESSAGE"].isprintable()


STACKED = (
    "100%",
    "a b",
    "c:d",
    "%n",
    "%%n%",
    "%",
    'q"q',
    "it's",
    "'both\" ",
    "back\\slash",
    "back\\x20slash\\",
    "$HOME",
    "-dash",
    "{a,b}",
    "a*?[b]",
    ";#",
    "prénom",
    "日本語",
    " ",
)
# No release file may have such a name: these are named, once.
NAMED = ("two\nlines", "tab\tulator", "invalid\udcff", "escape\x1b[31m")


def test_entries_are_stacked_or_named_once_and_the_unit_always_loads(host: Host) -> None:
    host.unit("odd.service", f"{SLEEP}[X-Confext]\nReload=none\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "odd.service")
    for number, name in enumerate((*NAMED, *STACKED), -len(NAMED)):
        tree = host.tree("web", {f"file-{number}": name if number >= 0 else ""}) / "etc/extension-release.d"
        (tree / "extension-release.web").rename(tree / f"extension-release.{name}_1")
        made = image(tree.parents[1], tree.parents[2] / "odd.raw")
        host.drop(made, "odd.service", f"{name}.raw.v/{name}_1.raw")
    all_there = 'until [ $(ls /etc | grep -c ^file-) = "$0" ]; do sleep 0.1; done'
    pid = str(host.started("odd.service"))
    host.bed.run(["nsenter", "-t", pid, "-m", "sh", "-c", all_there, str(len(STACKED))], timeout=SECONDS)
    for start in (False, True):
        if start:
            host.systemctl("daemon-reload")
            host.systemctl("restart", "odd.service")
        seen = {name: host.see("odd.service", f"/etc/file-{n}") for n, name in enumerate(STACKED)}
        assert seen == {name: name.strip() for name in STACKED}
        assert host.see("odd.service", "/etc/file--1") == ""
    assert host.bed.property("odd.service", "LoadState") == "loaded"
    messages = [entry["MESSAGE"] for entry in journal.said()]
    for name in NAMED:
        assert len([line for line in messages if f"/{name[:3]}" in line and "refused" in line]) == 1, (
            name,
            messages,
        )
    assert all(isinstance(line, str) and line.isprintable() for line in messages)
    verified = host.bed.run(["systemd-analyze", "verify", "odd.service"], check=False)
    assert "odd.service" not in verified.stdout + verified.stderr
