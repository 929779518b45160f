# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher doctor` on real systemd: what is wrong with units, the generator and the daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = """[Service]
ExecStart=/bin/sleep infinity
[X-Confext]
Check=/bin/true
"""
NEEDS_RESTART = f'confext-watcher status --json {WEB} | grep -q \'"state": "needs-restart"\''
GENERATOR = "/usr/lib/systemd/system-generators/confext-watcher-generator"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def findings(host: Host, about: str) -> list[tuple[str, str, str]]:
    """(level, text, what helps)."""
    done = host.bed.run(["confext-watcher", "doctor", "--json"], check=False)
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == any(one["level"] == "error" for one in found)
    return [(one["level"], one["text"], one["helps"]) for one in found if one["about"] == about]


def test_each_thing_that_is_wrong_is_said_with_what_to_do(host: Host) -> None:
    host.unit(WEB, UNIT, takes_part=False)
    host.systemctl("start", WEB)
    host.watch()
    ((level, text, _),) = findings(host, "daemon")[:1]
    assert level == "ok" and text.startswith("runs; ")
    assert findings(host, "generator")[0][0] == findings(host, "systemd")[0][0] == "ok"

    # It takes part from now on, and was started before.
    host.take_part(WEB)
    drop(host, 1, {"web.conf": "one"})
    host.bed.run(["sh", "-c", f"until {NEEDS_RESTART}; do sleep 0.1; done"])
    restart = (
        "warning",
        "was started before it took part, and has none of its images yet",
        f"systemctl restart {WEB}",
    )
    assert restart in findings(host, WEB)
    host.systemctl("restart", WEB)
    host.bed.run(["sh", "-c", f"while {NEEDS_RESTART}; do sleep 0.1; done"])
    assert findings(host, WEB) == [("ok", "what is dropped is looked at; checked before it is used", "")]

    # Who may write there is another.
    directory = host.confext_dir(WEB) / "site.raw.v"
    directory.chmod(0o777)
    ((level, text, _),) = findings(host, WEB)
    assert level == "warning" and "chmod" in text
    directory.chmod(0o755)

    # The generator is gone.
    path = host.bed.path(GENERATOR)
    aside = path.with_name(".aside")
    path.rename(aside)
    try:
        host.systemctl("daemon-reload")
        assert findings(host, "generator")[0][:2] == (
            "error",
            "is not installed: units do not start on what was accepted",
        )
        stale = ("error", "systemd has not loaded its drop-in: it would not start on what was accepted")
        assert stale in [found[:2] for found in findings(host, WEB)]
    finally:
        aside.rename(path)
        host.systemctl("daemon-reload")
    host.systemctl("stop", "confext-watcher.service")
    assert findings(host, "daemon")[0] == (
        "error",
        "does not run: nothing that is dropped is used",
        "systemctl enable --now confext-watcher",
    )
