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
