# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the command line answers before there is anything to ask."""

from __future__ import annotations

import platform

import pytest

from watcher import cli


def test_an_old_kernel_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.7.12-amd64")
    assert cli.main(["run"]) == cli.UNSUPPORTED
    said = capsys.readouterr().err
    assert said.startswith("confext-watcher: Linux 6.7.12-amd64 is too old") and said.count("\n") == 1
