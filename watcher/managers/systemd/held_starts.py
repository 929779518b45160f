# SPDX-License-Identifier: LGPL-2.1-or-later
"""A start that is on trial does not fail before we have made something of that: `systemctl restart` returns with the
service on the stack before.

systemd ends a start job that failed only after `ExecStopPost=`. The one of our drop-ins waits there, if the start is on
trial, until the watcher has taken the stack out again, and has asked for a restart. systemd merges that with the job it
has, which is then made anew: job_install() in src/core/job.c; 257 and 262 were asked (tests/beds). So whoever waits for
the first job waits for the second start, and no unit gets a `Restart=` that it has not.

Starts that are on trial have a file each below the runtime directory. In it stands the one start that is not meant: it
was begun before, or is judged. Where there is no file, no time is lost but for the shell.

Standard library only, for the generator, and of that no `shutil`, which takes a tenth of its time to load.
"""

from __future__ import annotations

import contextlib
import os

_DIRECTORY = "starts"
# In tenths of a second. What is longer than `TimeoutStopSec=` systemd ends.
_WAIT = 100
# "+": as root, outside of most of the sandbox. Not of the images: if these keep systemd from running anything, nothing
# waits, and the service is put right once its start has failed. systemd replaces %n, and makes one $ of two.
COMMAND = (
    f"-+/bin/sh -c 'case $$SERVICE_RESULT in success|exec-condition) exit; esac; left={_WAIT}; "
    'while read -r other <"$$0" && [ "$$other" != "$$INVOCATION_ID" ] && [ $$left -gt 0 ]; '
    f"do sleep 0.1; left=$$((left - 1)); done 2>/dev/null' /run/confext-watcher/{_DIRECTORY}/%n"
)
"""Value of `ExecStopPost=`."""


class HeldStarts:
    """The units whose next start is on trial.

    Args:
        runtime_directory: the watcher's.
    """

    def __init__(self, runtime_directory: str) -> None:
        self._directory = f"{runtime_directory}/{_DIRECTORY}"
        self._held: dict[str, str] = {}

    def begin(self) -> None:
        """A daemon before that was killed has left its files: the first round of each service says what holds."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(f"{self._directory}/{name}")

    def hold(self, unit: str, other: str) -> None:
        """If its next start fails, that waits for `let_go()`.

        Args:
            other: the start (InvocationID) that is not meant; "" if there was none.

        Raises:
            OSError
        """
        if self._held.get(unit) == other:
            return
        os.makedirs(self._directory, exist_ok=True)
        path, new = f"{self._directory}/{unit}", f"{self._directory}/.new"
        with open(new, "w", encoding="ascii") as file:
            file.write(f"{other}\n")
        os.replace(new, path)
        self._held[unit] = other

    def let_go(self, unit: str) -> None:
        """No start of it is on trial; or what follows from its failure is on its way."""
        if self._held.pop(unit, None) is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._directory}/{unit}")

    def close(self) -> None:
        """Nobody is there any more to wait for."""
        for unit in tuple(self._held):
            self.let_go(unit)
