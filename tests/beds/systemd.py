# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real systemd somewhere, a container's or a virtual machine's, and how commands are run beside it."""

from __future__ import annotations

import abc
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
}


class Systemd(abc.ABC):
    """A real systemd.

    Attributes:
        name: of where it runs, unique on this machine.
        patience: seconds that what is going to happen may take.
    """

    name: str
    patience = 60

    @abc.abstractmethod
    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line on the host that runs `argv` in there, with nothing but `env` added to its environment."""

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = None,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there to its end, output captured.

        Raises:
            AssertionError: it failed and `check` is set; with all that it said.
            subprocess.TimeoutExpired: after `timeout` seconds, or `patience` ones.
        """
        done = subprocess.run(
            self.command(argv, env),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout or self.patience,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{self.name}: {list(argv)} exited {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def popen(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[Any]:
        """Start a command in there; `more` as for `subprocess.Popen`. It dies with what it runs in."""
        return subprocess.Popen(self.command(argv, env), **more)

    def property(self, unit: str, name: str) -> str:
        """A property of a unit as `systemctl show --value` prints it; `unit` "" for the manager's own."""
        return self.run(
            ["systemctl", "show", f"--property={name}", "--value", *([unit] if unit else [])]
        ).stdout.strip()

    def journal(self, *arguments: str) -> str:
        """What `journalctl` prints with these arguments, without host name and date by default."""
        return self.run(
            ["journalctl", "--no-pager", "--quiet", "--output=short-precise", *arguments], check=False
        ).stdout
