# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd mounts from the slots at a start, and what we mount at a swap, look the same to the service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import WEB
from support import needs
from support.images import image

pytestmark = [needs.bed, needs.tool("mksquashfs")]

# Of whoever may look at all: the service's own root.
LOOK = "find /etc -maxdepth 2 -printf '%m %U:%G %p %l\\n' | sort"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def look(host: Host) -> list[str]:
    """All names in the service's `/etc` with modes and owners."""
    pid = str(host.started(WEB))
    return host.bed.run(["nsenter", "--target", pid, "--mount", "--root", "sh", "-c", LOOK]).stdout.split(
        "\n"
    )


def closed(etc: Path) -> None:
    (etc / "ssl").mkdir()
    (etc / "ssl").chmod(0o700)
    os.chown(etc / "ssl", 1000, 1000)
    etc.chmod(0o700)


def of_another(etc: Path) -> None:
    etc.chmod(0o2751)
    os.chown(etc, 1000, 4242)
    os.chmod(etc, 0o2751)


@pytest.mark.parametrize("kind", ["image", "tree"])
@pytest.mark.parametrize(
    "build", [lambda etc: None, closed, of_another], ids=["usual", "closed", "another's"]
)
def test_modes_and_owners_before_and_after_a_restart(
    host: Host, kind: str, build: Callable[[Path], None]
) -> None:
    host.unit(WEB, f"{SLEEP}[X-Confext]\nReload=none\nSettleTreeSec=0\nSettleSec=0\n")
    journal = host.journal()
    host.watch()
    host.systemctl("start", WEB)
    tree = host.tree("site_1", {"web.conf": "1"})
    build(tree / "etc")
    if kind == "image":
        host.drop(image(tree, tree.parent / "site_1.raw"), WEB, "site.raw.v/site_1.raw")
    else:
        host.confext_dir(WEB).joinpath("site.v").mkdir()
        host.drop_tree(tree, f"/etc/systemd/system/{WEB}.confext.d/site.v/site_1")
    journal.applied(WEB)
    swapped = look(host)
    assert any(" /etc/web.conf " in line for line in swapped)
    host.systemctl("restart", WEB)
    assert look(host) == swapped
    journal.until(lambda entry: f"{WEB}: started well" in entry["MESSAGE"])
    assert look(host) == swapped
