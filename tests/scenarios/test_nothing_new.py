# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd.confext=no on the kernel command line: services keep what they have (settings/kernel_command_line.py)."""

from __future__ import annotations

import json

from scenarios.place import Place

WHY = "systemd.confext=no is on the kernel command line"


def test_services_keep_what_they_have(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    service.put("1")
    service.logged("web 1 added, applied")
    assert place.daemon is not None
    place.daemon.stop()
    service.kill()
    place.environment["SYSTEMD_PROC_CMDLINE"] = "quiet systemd.confext=no"
    service.put("2")
    again = place.start(name=service.name)
    again.errors.wait_for(f"starts on what it had, and gets nothing new: {WHY}")
    assert again.has("1")
    fresh = place.start(name="fresh.service")
    fresh.put("1")
    daemon = place.start_daemon()
    daemon.log.wait_for(f"services keep what they have, and get nothing new: {WHY}")
    again.put("3")
    again.remove("1")
    planned = place.run("plan", again.name).stdout
    assert "no change" in planned and WHY in planned
    assert f"services get nothing new: {WHY}" in place.run("status").stdout
    assert json.loads(place.run("status", "--json").stdout)["nothing_new"] == WHY
    place.run("rollback", again.name)  # what is done by hand is done
    again.logged("web 1 removed, applied|back")
    assert not again.etc("web.conf").exists()
    assert not fresh.etc("web.conf").exists()
    daemon.stop()
    del place.environment["SYSTEMD_PROC_CMDLINE"]
    place.run("rollback", "--forget", again.name, check=False)
    place.start_daemon()
    fresh.logged("web 1 added, applied")
    place.run("rollback", "--forget", again.name)
    again.logged("web 3 added, applied")
