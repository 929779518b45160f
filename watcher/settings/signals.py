# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals by the names that systemd.exec(5) and kill(1) use, and exit statuses in words."""

from __future__ import annotations

import re
import signal

from watcher.text import shown

_SIGNAL = re.compile(
    r"(?P<number>[0-9]{1,3})|(?:SIG)?(?P<name>[A-Z0-9]+)(?P<further>(?<=RTMIN|RTMAX)[+-][0-9]{1,2})?"
)
# The set is made anew each time that it is asked for, which takes as long as reading a whole registration.
_VALID = signal.valid_signals()


def signal_number(text: str) -> int:
    """1 for "SIGHUP", "HUP", "hup" and "1"; "SIGRTMIN+2" and "SIGRTMAX-2" as kill(1) has them.

    Raises:
        ValueError: not a signal that this system has.
    """
    match = _SIGNAL.fullmatch(text.upper())
    number = 0
    if match and match["number"]:
        number = int(match["number"])
    elif match and (name := f"SIG{match['name']}") in signal.Signals.__members__:
        number = signal.Signals[name] + int(match["further"] or 0)
    if number not in _VALID:
        raise ValueError(f"not a signal: {shown(text)}")
    return number


def signal_name(number: int) -> str:
    """ "SIGHUP" for 1; for a signal without a name "signal N"."""
    if signal.SIGRTMIN < number < signal.SIGRTMAX:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # the C library keeps it for itself


def reason_of(status: int) -> str:
    """An exit status, negative for a signal, in words that follow the name of a command; "" for success."""
    if status < 0:
        return f"was ended by {signal_name(-status)}"
    return f"failed with exit status {status}" if status else ""
