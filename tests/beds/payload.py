# SPDX-License-Identifier: LGPL-2.1-or-later
"""Put this checkout's program into a root file system, the way a package would lay it out.

The program and the one module that Debian does not have live in a private directory, everything else is Debian's.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path

PRIVATE = "usr/lib/confext-watcher"
_WRAPPER = """\
#!/usr/bin/python3 -I
import sys
sys.path.insert(0, "/usr/lib/confext-watcher")
from watcher.cli import main
sys.exit(main())
"""


def install(root: Path, *, vendored: bool = False) -> None:
    """Install the program as /usr/bin/confext-watcher.

    Args:
        vendored: bring all dependencies along (where Debian's are too old), rather than only inotify-simple.
    """
    private = root / PRIVATE
    if private.exists():
        shutil.rmtree(private)
    checkout = Path(__file__).resolve().parents[2]
    shutil.copytree(checkout / "watcher", private / "watcher", ignore=shutil.ignore_patterns("__pycache__"))
    for name in _requirements("confext-watcher") if vendored else {"inotify-simple"}:
        _copy_distribution(name, private)
    command = root / "usr/bin/confext-watcher"
    command.write_text(_WRAPPER)
    command.chmod(0o755)


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


def _copy_distribution(name: str, target: Path) -> None:
    for file in importlib.metadata.files(name) or []:
        if file.parts[0] == ".." or file.suffix == ".pyc" or "tests" in file.parts or "_tests" in file.parts:
            continue
        destination = target / file
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), destination)
