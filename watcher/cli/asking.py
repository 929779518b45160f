# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks a person before something is done, for commands that show first what that is."""

from __future__ import annotations

import argparse
import sys

from watcher.records.schema import CallError, ExitStatus


class NoTerminal(CallError):
    """There is nobody to ask."""

    exit_code = ExitStatus.USAGE


def agreed(options: argparse.Namespace) -> bool:
    """Whether it is to be done: `--yes`, or a person says so.

    Raises:
        NoTerminal: neither.
    """
    if options.yes:
        return True
    if options.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise NoTerminal("not done, there is no terminal to ask on: --yes does it, --dry-run only shows it")
    try:
        said = input("Do this? [y/N] ")
    except KeyboardInterrupt:
        print()  # or the shell's prompt is behind the question
        raise
    except EOFError:
        print()
        return False
    return said.strip().lower() in ("y", "yes")
