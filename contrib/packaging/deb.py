#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the Debian package with nothing but dpkg-deb: `deb.py DIRECTORY [VERSION]` prints the path of the package.

It depends on Debian 13's own Python packages; inotify-simple, which Debian does not have, comes along in the program's
private directory. Upgrading restarts the watcher and leaves every service on its stack; removing it gives every unit
back to systemd at its next start.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import install

NAME = "confext-watcher"
CONTROL = """\
Package: confext-watcher
Version: {version}
Architecture: all
Maintainer: confext-watcher developers <maintainers@confext-watcher.invalid>
Section: admin
Priority: optional
Depends: python3 (>= 3.11), python3-trio (>= 0.29), python3-structlog (>= 25.3), python3-psutil (>= 7.0),
 python3-jeepney (>= 0.9), python3-varlink (>= 31.0), python3-rich (>= 13.9), systemd (>= 255),
 default-dbus-system-bus | dbus-system-bus
Installed-Size: {kilobytes}
Description: drop a configuration extension, and the running service has it
 Watches for configuration extension images ("confexts") dropped for a service, and puts
 them on the /etc of the running service: checked before, all files at once, the service
 asked to reload, and taken back if that goes wrong.
"""
POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    python3 -m compileall -q -f --invalidation-mode unchecked-hash /usr/lib/confext-watcher
    systemd-tmpfiles --create confext-watcher.conf || :
    journalctl --update-catalog || :
    if [ -z "$2" ]; then
        systemctl preset confext-watcher.service || :
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || :
        if [ -z "$2" ]; then
            if systemctl -q is-enabled confext-watcher.service; then systemctl start confext-watcher.service || :; fi
        else
            systemctl try-restart confext-watcher.service || :
        fi
    fi
fi
"""
PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl --no-reload disable --now confext-watcher.service || :
fi
find /usr/lib/confext-watcher -name __pycache__ -type d -prune -exec rm -rf {} +
"""
POSTRM = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload || :
fi
if [ "$1" = purge ]; then
    rm -rf /var/lib/confext-watcher /run/confext-watcher /etc/confext-watcher
fi
"""


def version() -> str:
    text = (install.SOURCE / "watcher/__init__.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    assert found, "watcher/__init__.py has no __version__"
    return found[1]


def build(directory: Path, number: str) -> Path:
    """Build the package of that version in a directory; returns its path.

    Raises:
        subprocess.CalledProcessError: dpkg-deb failed, and has said why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    package = directory / f"{NAME}_{number}_all.deb"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        install.install(root, "/usr", "/usr/bin/python3", ["inotify-simple"])
        documents = root / "usr/share/doc" / NAME
        documents.mkdir(parents=True)
        (documents / "copyright").write_text((install.SOURCE / "LICENSE").read_text())
        kilobytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
        install.write(root / "DEBIAN/control", CONTROL.format(version=number, kilobytes=kilobytes), False)
        for name, script in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
            install.write(root / "DEBIAN" / name, script, True)
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        command = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(package)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return package


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else version()))
