# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit with `ConfigurationDirectory=` starts on what an image brings there, and not on what the host has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop, run
from support import needs
from support.place import eventually

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = """[Service]
ConfigurationDirectory=web
ProtectSystem=strict
ReadWritePaths=/run
ExecStart=/bin/sh -c 'cat ${CONFIGURATION_DIRECTORY}/web.conf >>/run/seen; exec sleep infinity'
[X-Confext]
Reload=restart
SettleSec=0
"""


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        made.bed.run(["sh", "-c", "mkdir /etc/web; echo host >/etc/web/web.conf"])
        made.stack.callback(made.bed.run, ["rm", "-rf", "/etc/web", "/run/seen"])
        yield made


def test_each_start_reads_what_the_image_brings_and_there_are_no_more_than_that(host: Host) -> None:
    journal = run(host, UNIT, {"web/web.conf": "1\n"})
    drop(host, 2, {"web/web.conf": "2\n"})
    journal.applied(WEB)
    seen = host.bed.path("/run/seen")

    def has_seen(*versions: str) -> None:
        """systemd says that a service is started before its `/etc` is there."""
        eventually(lambda: seen.read_text().split() == [*versions], seen.read_text)

    host.systemctl("restart", WEB)
    has_seen("1", "2", "2")
    drop(host, 3, {"web/web.conf": "3\n"})
    assert "site 2 -> 3" in journal.applied(WEB)["MESSAGE"]
    has_seen("1", "2", "2", "3")
