# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put this checkout's program into a root file system, as `make install` and the package do."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

_INSTALLER = Path(__file__).resolve().parents[2] / "contrib/packaging/install.py"


def install(root: Path, *, vendored: bool = False) -> None:
    """Install the program with prefix /usr, its units and generator included; nothing is enabled.

    Args:
        vendored: bring all dependencies along (where Debian's are too old), rather than only inotify-simple.
    """
    options = ["--destdir", str(root), "--prefix", "/usr", "--no-compile"]
    for name in sorted(_requirements("confext-watcher")) if vendored else ["inotify-simple"]:
        options += ["--vendor", name]
    subprocess.run([sys.executable, str(_INSTALLER), *options], check=True)


def _requirements(name: str) -> set[str]:
    """Names of the distributions that `name` needs at run time, of those installed here."""
    found: set[str] = set()
    for requirement in importlib.metadata.requires(name) or []:
        needed = re.match(r"[\w.-]+", requirement)
        if needed is None or "extra ==" in requirement or needed[0] in found:
            continue
        try:
            found |= {needed[0], *_requirements(needed[0])}
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
    return found
