# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which daemon sees to systemd's units: the system's own, and no other that root starts beside it."""

from __future__ import annotations

import dataclasses
import os

import pytest

from watcher import daemon
from watcher.settings.config import Settings


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root on a host that systemd runs."""
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system" or isdir(path))
    monkeypatch.setattr(daemon, "may_mount", lambda: True)


@pytest.mark.usefixtures("booted")
def test_the_systems_daemon_sees_to_units_and_one_with_a_state_of_its_own_does_not() -> None:
    assert daemon.on_systemd(Settings())
    assert not daemon.on_systemd(dataclasses.replace(Settings(), state_directory="/tmp/demo/state"))
