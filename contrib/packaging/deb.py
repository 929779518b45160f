#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the Debian package with nothing but dpkg-deb: `deb.py DIRECTORY [VERSION]` prints the path of the package.

No debhelper: there is nothing to compile, what it would do for a unit is the few lines of `debian/postinst`, and so the
package can be built wherever there is dpkg, whatever its release.

It depends on Debian 13's own Python packages; inotify-simple, which Debian does not have, comes along in the program's
private directory. Upgrading restarts the watcher and leaves every service on its stack; removing it gives every unit
back to systemd at its next start.
"""

from __future__ import annotations

import importlib.metadata
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
 default-dbus-system-bus | dbus-system-bus, openssl
Recommends: cryptsetup-bin, squashfs-tools
Suggests: erofs-utils, systemd-repart
Installed-Size: {kilobytes}
Description: drop a configuration extension, and the running service has it
 Watches for configuration extension images ("confexts") dropped for a service, and puts
 them on the /etc of the running service: checked before, all files at once, the service
 asked to reload, and taken back if that goes wrong.
"""
COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: confext-watcher

Files: *
Copyright: the confext-watcher developers
License: LGPL-2.1-or-later
 On Debian systems, the text of the license is in /usr/share/common-licenses/LGPL-2.1.

Files: inotify_simple.py
Copyright: {vendored}
"""
SCRIPTS = Path(__file__).with_name("debian")


def version() -> str:
    text = (install.SOURCE / "watcher/__init__.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    assert found, "watcher/__init__.py has no __version__"
    return found[1]


def copyright_file() -> str:
    """What Debian's copyright file says, the license of what comes along included."""
    files = importlib.metadata.files("inotify-simple") or []
    license_file = next(file for file in files if file.name == "LICENSE")
    who, *terms = (line.rstrip() for line in license_file.read_text().splitlines())
    lines = [
        who.removeprefix("Copyright (c) "),
        "License: BSD-2-Clause",
        *(f" {line or '.'}" for line in terms),
    ]
    return COPYRIGHT.format(vendored="\n".join(lines))


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
        install.write(root / "usr/share/doc" / NAME / "copyright", copyright_file(), False)
        kilobytes = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) // 1024
        install.write(root / "DEBIAN/control", CONTROL.format(version=number, kilobytes=kilobytes), False)
        for script in SCRIPTS.iterdir():
            install.write(root / "DEBIAN" / script.name, script.read_text(), True)
        for path in (root, *root.rglob("*")):
            # Whatever the umask is of who builds it.
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        command = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(package)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return package


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else version()))
