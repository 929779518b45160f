# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Notify=` (rounds/notify.py, managers/aside.py) from a drop to the command, without systemd."""

from __future__ import annotations

import json

from scenarios.place import Place, until


def test_a_command_gets_what_went_wrong_and_a_hanging_one_is_in_nobodys_way(place: Place) -> None:
    told, hung = place.path / "told", place.path / "hung"
    place.configure(
        "SettleSec=20ms",
        f"Notify=/bin/sh -c 'cat >>{told}'",
        f"Notify=/bin/sh -c 'sleep 600; :>{hung}'",
    )
    place.start_daemon()
    service = place.start("--reload-signal", "SIGHUP", "--check", "grep -qv bad /etc/web.conf")
    service.put("1", value="good")
    service.reloaded("good")
    service.put("2", value="bad")
    until(lambda: told.exists() and told.read_text().endswith("\n"))
    service.put("3", value="fine")
    service.reloaded("fine")
    (event,) = [json.loads(line) for line in told.read_text().splitlines()]
    newest = json.loads(place.run("history", "--json", service.name).stdout)["events"]
    shown = next(one for one in newest if one["outcome"] == "refused")
    assert event == {key: value for key, value in shown.items() if key != "time"}
    assert not hung.exists()
