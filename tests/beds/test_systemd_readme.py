# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README has people type on a systemd host does what it says there, also pasted in one go."""

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
    found = re.search(r"^    mkdir -p /etc/systemd/system/.*\n(?:    \S.*\n)+", text, re.MULTILINE)
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
