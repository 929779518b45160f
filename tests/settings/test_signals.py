# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals by their names, and how a command was ended by one."""

from __future__ import annotations

import signal

import pytest

from watcher.settings import config, signals


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SIGHUP", "SIGHUP"),
        ("hup", "SIGHUP"),
        ("1", "SIGHUP"),
        ("USR1", "SIGUSR1"),
        ("RTMIN", "SIGRTMIN"),
        ("sigrtmin+2", "SIGRTMIN+2"),
        ("SIGRTMAX", "SIGRTMAX"),
    ],
)
def test_signals_by_any_of_their_names(text: str, name: str) -> None:
    assert signals.signal_name(signals.signal_number(text)) == name
    assert config.reload_kind(f"signal:{text}") == f"signal:{name}"


@pytest.mark.parametrize("text", ["", "SIG", "0", "-1", "99", "33", "HUP+1", "RTMIN+60", "²"])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(ValueError, match="not a signal"):
        signals.signal_number(text)


def test_every_signal_that_may_end_a_command_has_a_name() -> None:
    for number in range(1, 65):
        assert signals.reason_of(-number).startswith("was ended by ")
    assert signals.reason_of(-signal.SIGRTMIN - 1) == "was ended by SIGRTMIN+1"
