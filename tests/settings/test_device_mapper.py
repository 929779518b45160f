# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is a device mapper: its node may be there without one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from support.needs import root
from watcher.settings import device_mapper

MISC, MINOR = 10, 236  # MISC_MAJOR, MAPPER_CTRL_MINOR


@root
def test_a_node_that_nothing_answers_at_is_no_device_mapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "control"
    monkeypatch.setattr(device_mapper, "CONTROL", str(node))
    assert not device_mapper.is_there()
    # As libdevmapper makes it in a container, when systemd has tried to set up verity.
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(MISC, MINOR))
    assert device_mapper.is_there() == ("device-mapper" in Path("/proc/misc").read_text())
