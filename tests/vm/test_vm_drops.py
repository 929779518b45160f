# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a drop to the reload, on Debian 13's own kernel."""

from __future__ import annotations

import json

import pytest

from support import needs
from vm.machine import Machine
from vm.web import web

pytestmark = [needs.vm, pytest.mark.limit(900), needs.tool("mksquashfs"), needs.tool("mkfs.erofs")]

FORMATS = ("squashfs", "erofs", "disk image with squashfs", "disk image with erofs")

# Reads two files through one directory, again and again. At SIGTERM it writes down what it saw.
READER = """
import json, os, signal, time
seen, told, errors, reads, going = [], [], [], 0, [True]
def read(name, directory=None):
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    content = os.read(fd, 64).decode()
    os.close(fd)
    return content
signal.signal(signal.SIGTERM, lambda *_: going.clear())
signal.signal(signal.SIGHUP, lambda *_: told.append(read("/etc/app/one")))
while going:
    try:
        directory = os.open("/etc/app", os.O_RDONLY)
        one, two, host = read("one", directory), read("two", directory), read("/etc/hostname")
        os.close(directory)
    except OSError as error:
        errors.append(str(error))
    else:
        if one != two or host != "machine\\n":
            errors.append(f"{one}, {two}, {host}")
        if seen[-1:] != [one]:
            seen.append(one)
    reads += 1
    time.sleep(0.001)
json.dump({"seen": seen, "told": told, "errors": errors, "reads": reads}, open("/run/reader", "w"))
"""

UNIT = """
[Service]
Type=exec
ExecStart=/usr/bin/python3 /root/reader.py
ExecReload=/bin/kill -HUP $MAINPID
InaccessiblePaths=-/etc/shadow
"""

LOOPS = ["losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE"]


def test_each_drop_is_on_etc_at_once_and_told(machine: Machine) -> None:
    """The first image is one that needs a loop device, of which the kernel had not loaded the driver at boot."""
    with web(machine) as site:
        site.unit(UNIT, reader=READER)
        for version, format in enumerate(FORMATS):
            files = {f"app/{name}": str(version) for name in ("one", "two")}
            made = site.image(version, files, format)
            site.drop(made)
            if version == 0:
                journal = site.start()
                pid = machine.property("web.service", "MainPID")
            else:
                assert f"-> {version} applied" in journal.applied("web.service")["MESSAGE"]
        assert machine.property("web.service", "MainPID") == pid
        machine.run(["systemctl", "stop", "web.service", "confext-watcher"])
        found = json.loads(machine.run(["cat", "/run/reader"]).stdout)
        assert found["errors"] == []
        assert found["seen"] == ["0", "1", "2", "3"]
        assert found["told"] == ["1", "2", "3"]
        assert machine.run(LOOPS).stdout == ""
