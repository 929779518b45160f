# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd.confext=no on the kernel command line: systemd merges nothing, and we give services nothing new."""

from __future__ import annotations

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, UNITS
from support import needs
from support.images import image

pytestmark = [needs.bed, needs.tool("mksquashfs")]

WHY = "systemd.confext=no is on the kernel command line"


@pytest.mark.parametrize("version", ["262", "257"])
def test_nothing_new_is_applied_and_what_there_is_stays(version: str) -> None:
    with Bed(version, arguments=["quiet", "systemd.confext=no"]) as bed, site.host(bed) as host:
        if version == "262":
            said = bed.run(["systemd-run", "--wait", "--pipe", "--quiet", "systemd-confext", "refresh"])
            assert (
                "Disabled by the kernel command line option 'systemd.confext='" in said.stdout + said.stderr
            )
        host.unit(site.WEB, SLEEP)
        override = bed.path(f"{UNITS}/confext-watcher.service.d/on.conf")
        override.parent.mkdir()
        override.write_text("[Service]\nEnvironment=SYSTEMD_PROC_CMDLINE=quiet\n")
        host.systemctl("daemon-reload")
        host.watch()
        journal = host.journal()
        host.systemctl("start", site.WEB)
        site.drop(host, 1, {"web.conf": "1"})
        journal.applied(site.WEB)
        override.unlink()  # from now on it is as the machine was booted
        host.systemctl("daemon-reload")
        host.systemctl("restart", "confext-watcher")
        journal.until(lambda entry: f"get nothing new: {WHY}" in entry["MESSAGE"])
        site.drop(host, 2, {"web.conf": "2"})
        tree = host.tree("other_1", {"other.conf": "1"})
        host.drop(image(tree, tree.parent / "other_1.raw"), site.WEB, "other.raw.v/other_1.raw")
        host.systemctl("restart", site.WEB)
        site.sees(host, "1")
        assert not host.see(site.WEB, "/etc/other.conf")
        assert WHY in bed.run(["confext-watcher", "status"]).stdout
        assert WHY in bed.run(["confext-watcher", "plan", site.WEB]).stdout
        site.sees(host, "1")
        assert len([one for one in journal.said() if WHY in one["MESSAGE"]]) == 1
