# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs openssl(1). What it is to read it gets by descriptor, so no file can be another one meanwhile.

Python's `cryptography` cannot verify PKCS#7 up to 50.0.2, and M2Crypto binds all of OpenSSL to this process, which
hostile bytes would then be parsed in. The program makes the same calls as systemd, and a crash of it is a message: what
it crashes on does not get in.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import NamedTuple

from watcher.model import Later
from watcher.settings.signals import reason_of

_TIMEOUT_SEC = 20
"""It takes 5 ms. What it reads is small, so only a machine that stands still needs longer."""
_PAUSE_SEC = 60
"""So long after such a silence nobody else waits for it: a look at many images would take hours."""
_PACKAGE = "openssl"
_NOT_RUN = (126, 127)
"""Exit statuses of a program that the system cannot run, as where one of its libraries is just being replaced."""


_SILENT = f"openssl, which verifies signatures, has given no answer in {_TIMEOUT_SEC} s"

_silence: list[float] = []
"""When it gave no answer last, `time.monotonic()`; nothing if it did since."""


class Done(NamedTuple):
    """
    Attributes:
        status: its exit status.
        output, errors: what it printed.
    """

    status: int
    output: bytes
    errors: str


def run(*words: str, **contents: bytes) -> Done:
    """Run `openssl WORDS`. A word "{NAME}" becomes the path of a file with the content of that name. Blocks.

    Raises:
        Later: it is not installed, gave no answer in time, was killed, or cannot be run. That says nothing of what it
            was to read, and is not to be remembered.
    """
    if _silence and time.monotonic() < _silence[0] + _PAUSE_SEC:
        raise Later(f"{_SILENT} a moment ago: it is tried again in a minute")
    files: dict[str, int] = {}
    try:
        with contextlib.ExitStack() as stack:
            for name, content in contents.items():
                files[name] = os.memfd_create(name, os.MFD_CLOEXEC)
                stack.callback(os.close, files[name])
                _write(files[name], content)
            paths = {f"{{{name}}}": f"/proc/self/fd/{fd}" for name, fd in files.items()}
            done = subprocess.run(
                ["openssl", *(paths.get(word, word) for word in words)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TIMEOUT_SEC,
                pass_fds=tuple(files.values()),
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            )
    except FileNotFoundError:
        raise Later(
            f"signed, and the program openssl is not installed (package {_PACKAGE}): its signature cannot be verified"
        ) from None
    except subprocess.TimeoutExpired:
        _silence[:] = [time.monotonic()]
        raise Later(f"{_SILENT}: is something wrong with this machine?") from None
    except (OSError, MemoryError) as error:
        raise Later(f"openssl cannot be run to verify its signature: {error}") from error
    _silence.clear()
    if done.returncode < 0 or done.returncode in _NOT_RUN:
        raise Later(f"openssl {reason_of(done.returncode)}: its signature cannot be verified")
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def _write(fd: int, content: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
