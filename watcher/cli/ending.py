# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a command ends that has begun something: a signal that would kill it raises, and so all is cleaned up."""

from __future__ import annotations

import signal


def end_as_interrupted() -> None:
    """From now on SIGTERM, and SIGHUP of a connection that ends, raise KeyboardInterrupt, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has it ignored
            signal.signal(number, signal.default_int_handler)
