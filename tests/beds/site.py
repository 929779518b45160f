# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit, `web.service`, that takes the versions of one image from `site.raw.v/`: most tests need no more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from beds.bed import Bed
from beds.host import SECONDS, Host, Journal, install

WEB = "web.service"
STATE = "/var/lib/confext-watcher"


@contextlib.contextmanager
def host(bed: Bed) -> Iterator[Host]:
    """A bed with the program for one test."""
    install(bed)
    with contextlib.ExitStack() as stack:
        yield Host(bed, stack)


def drop(host: Host, version: int | str, files: Mapping[str, str], unit: str = WEB) -> Path:
    """Copy a version into the unit's directory."""
    name = f"site_{version}"
    return host.drop(host.image(name, dict(files)), unit, f"site.raw.v/{name}.raw")


def run(host: Host, text: str, files: Mapping[str, str]) -> Journal:
    """The unit, which runs well on version 1."""
    host.unit(WEB, text)
    drop(host, 1, files)
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
    return journal


def kept(host: Host, unit: str = WEB) -> str:
    """What the next start of a unit gets."""
    return host.bed.run(["sh", "-c", f"readlink {STATE}/units/{unit}/*"], check=False).stdout


def sees(host: Host, text: str, unit: str = WEB, path: str = "/etc/web.conf") -> None:
    """Wait for the service to show that; systemd tells of a process before its namespaces are made."""
    deadline = time.monotonic() + SECONDS
    while (found := host.see(unit, path)) != text:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
