# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image of 500 MiB: it takes seconds, and nobody waits for it but its own service."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scenarios.place import Place
from support import images
from support.needs import root, tool

pytestmark = [root, tool("mksquashfs"), pytest.mark.parametrize("place", ["images"], indirect=True)]

_SIZE = 500 << 20


def test_a_large_image_is_applied_and_others_go_on_meanwhile(place: Place, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 4 * _SIZE:
        pytest.skip("needs 2 GiB of disk")
    tree = images.confext(tmp_path / "large", "web", {"etc/web.conf": b"large\n"})
    with (tree / "etc/data").open("wb") as file:
        for number in range(1, (_SIZE >> 20) + 1):
            file.write(number.to_bytes(4, "big") * (1 << 18))
    large = tmp_path / "large.raw"
    plain = ["-noI", "-noD", "-noF", "-noX", "-no-duplicates"]
    subprocess.run(["mksquashfs", tree, large, "-quiet", "-no-progress", "-noappend", *plain], check=True)
    (tree / "etc/data").unlink()
    assert large.stat().st_size > _SIZE
    place.start_daemon()
    service, other = place.start(), place.start()
    shutil.move(large, service.versions / "web_2.raw")
    for number in range(3, 13):
        other.put(f"{number}")
        other.reloaded(f"{number}")
    service.reloaded("large")
    assert service.etc("data").stat().st_size == _SIZE
    service.put("3")
    service.reloaded("3")
