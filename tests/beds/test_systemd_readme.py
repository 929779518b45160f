# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README has people type on a systemd host does what it says there, also pasted in one go.

Covers setup/enable.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import drop, sees
from support import CHECKOUT, needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def first_lines(unit: str) -> str:
    """How a service comes to take part."""
    text = (CHECKOUT / "README.md").read_text()
    found = re.search(r"^    confext-watcher enable .*\n(?:    \S.*\n)+", text, re.MULTILINE)
    assert found
    return found[0].replace("nginx.service", unit).replace("nginx", unit).replace("web.raw.v", "site.raw.v")


def test_the_first_lines_pasted_together_make_a_service_take_part(host: Host) -> None:
    units = [f"web{number}.service" for number in range(10)]
    text = f"{SLEEP}ExecReload=/bin/true\n[X-Confext]\nSettleSec=0\n"
    host.units(dict.fromkeys(units, text), takes_part=False)
    host.watch()
    host.systemctl("start", *units)
    journal = host.journal()
    for number, unit in enumerate(units):
        host.bed.run(["sh", "-e", "-c", first_lines(unit)])
        drop(host, number, {"web.conf": str(number)}, unit)
        sees(host, str(number), unit)
    assert not [entry["MESSAGE"] for entry in journal.said() if "restart it once" in entry["MESSAGE"]]


def test_enable_says_what_is_to_be_done(host: Host) -> None:
    host.unit("web.service", takes_part=False)
    host.watch()
    host.systemctl("start", "web")

    def enable(*words: str) -> tuple[int, str]:
        done = host.bed.run(["confext-watcher", "enable", *words], check=False)
        return done.returncode, done.stdout + done.stderr

    status, said = enable("web", "site.raw.v")
    place = "/etc/systemd/system/web.service.confext.d/site.raw.v"
    assert status == 0 and f"drop images into {place}/" in said and "systemctl restart web.service" in said
    host.systemctl("restart", "web")
    status, said = enable("web", "site.raw.v")
    assert status == 0 and "Restart it" not in said
    for words, reason in {
        ("nobody-has-this",): "there is no such unit",
        ("web.socket",): "is no service unit",
        ("web", "../up.v"): "no directory of versions",
        ("web", "site.raw"): "no directory of versions",
    }.items():
        status, said = enable(*words)
        assert status == 1 and reason in said
    as_user = ["setpriv", "--reuid=65534", "--clear-groups", "confext-watcher", "enable", "web"]
    assert "only root may" in host.bed.run(as_user, check=False).stderr
