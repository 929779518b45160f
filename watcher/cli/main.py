# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry point: runs the module of this room that has the command's name, and turns errors into exit statuses."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Sequence

from watcher.cli import arguments, terminal
from watcher.cli.answers import fail
from watcher.model import Unsupported, problem
from watcher.records.schema import CallError, ExitStatus
from watcher.settings import config

_CAP_SYS_ADMIN = 21


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `--help`.

    Args:
        words: None: those that this process was started with, which is the program then, and nothing else.
    """
    if words is None:
        gc.disable()
    terminal.prepare()
    options = arguments.parse(sys.argv[1:] if words is None else words)
    # As of diff(1): 1 says that something differs.
    trouble = ExitStatus.USAGE if options.command == "diff" else None
    starts = options.command in ("run", "exec")
    try:
        settings, remarks = config.load(root=_as_root(starts))
        if starts:
            _require_kernel()
            _require_mounting()
        command = importlib.import_module(f"watcher.cli.{options.command}")
        if words is None:
            # What is loaded stays. To look through it for garbage would be a tenth of the time of a start, and more of
            # that of an end.
            gc.freeze()
            gc.enable()
        if starts:
            from watcher.records import journal

            journal.configure(level=settings.log_level)
            for remark in remarks:
                journal.say(remark)
        status: ExitStatus = command.run(settings, options)
        return status
    except CallError as error:
        return fail(str(error), trouble or error.exit_code)
    except Unsupported as error:
        return fail(str(error), ExitStatus.UNSUPPORTED)
    except BrokenPipeError:
        # The reader of our output has seen enough. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except OSError as error:
        return fail(problem(error), trouble or ExitStatus.FAILED)
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def _as_root(starts: bool) -> bool:
    """Whether the command is about the system's daemon: root's is, and that of a user who asks and runs no daemon."""
    if config.is_root():
        return True
    own = config.directories(os.environ, root=False)
    system = config.directories(os.environ, root=True)
    has_own = os.path.isdir(own["runtime_directory"])
    return not starts and not has_own and os.path.isdir(system["runtime_directory"])


def _require_kernel() -> None:
    # "6.12.43+deb13-amd64", "6.9rc1", "6.12+"
    running = os.uname().release
    release = tuple(int(part) for part in re.findall(r"\d+", running)[:2])
    if release < config.KERNEL_OLDEST:
        raise Unsupported(f"Linux {running} is too old: 6.8 or newer is needed (overlayfs lowerdir+)")


def _require_mounting() -> None:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.partition(":")[::2] for line in file)
    if not int(fields["CapEff"], 16) >> _CAP_SYS_ADMIN & 1:
        raise OSError(None, "needs root, or a user namespace: unshare --user --map-root-user --mount")
