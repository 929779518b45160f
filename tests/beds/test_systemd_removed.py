# SPDX-License-Identifier: LGPL-2.1-or-later
"""A `.confext.d/` that is removed: what its unit loses is said, whatever else goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import WEB, drop
from support import needs
from support.place import eventually

pytestmark = [needs.bed, needs.tool("mksquashfs")]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


@pytest.mark.parametrize("remove", ["0", "100ms"])
def test_it_is_said_also_while_unit_files_are_read_again(host: Host, remove: str) -> None:
    """From its acceptance on nothing but the record says that the unit takes part."""
    reload = "ExecReload=/bin/sh -c 'systemctl daemon-reload; sleep 0.5'\n"
    host.unit(WEB, f"{SLEEP}{reload}[X-Confext]\nSettleSec=0\nRemoveSec={remove}\n")
    journal = host.journal()
    host.watch()
    host.systemctl("start", WEB)
    for version in range(3):
        host.confext_dir(WEB).mkdir(exist_ok=True)
        drop(host, version, {"web.conf": str(version)})
        assert "added" in journal.applied(WEB)["MESSAGE"]
        shutil.rmtree(host.confext_dir(WEB))
        said = journal.applied(WEB)["MESSAGE"]
        assert f"site {version} removed" in said and "reload done" in said
        site.sees(host, "")


@pytest.mark.parametrize("restarted", [False, True])
def test_one_that_takes_no_part_any_more_is_forgotten(host: Host, restarted: bool) -> None:
    """Also if it was removed, and restarted, while no watcher ran. Its unit file stays as it is."""
    host.unit(WEB, f"{SLEEP}[X-Confext]\nSettleSec=0\nRemoveSec=0\n")
    drop(host, 1, {"web.conf": "1"})
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
    if restarted:
        host.systemctl("stop", "confext-watcher")
    shutil.rmtree(host.confext_dir(WEB))
    if restarted:
        host.systemctl("restart", WEB)
        host.systemctl("start", "confext-watcher")
    journal.until(lambda entry: "site 1 removed" in entry["MESSAGE"])
    eventually(lambda: not host.bed.path(f"{site.STATE}/units/{WEB}").exists())
    assert WEB not in host.bed.run(["confext-watcher", "status"], check=False).stdout
