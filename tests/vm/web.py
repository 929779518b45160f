# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit in the virtual machine, `web.service`, that takes the versions of one image from `site.raw.v/`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from beds.host import Journal
from support.images import confext, image
from vm import native
from vm.machine import Machine

WEB = "web.service"
UNITS = "/etc/systemd/system"
DROPS = f"{UNITS}/{WEB}.confext.d/site.raw.v"

_PARTITION = "[Partition]\nType=root\nFormat={}\nCopyFiles=/\nMinimize=best\n"
_REPART = """\
systemd-repart --empty=create --size=auto --offline=yes --dry-run=no --definitions={work}/definitions \
    --copy-source={work}/site {work}/made.raw
"""


class Web:
    """The unit, as long as a test."""

    def __init__(self, machine: Machine, stack: contextlib.ExitStack) -> None:
        self.machine = machine
        self._stack = stack
        self._work = Path(tempfile.mkdtemp(prefix="confext-vm."))
        stack.callback(shutil.rmtree, self._work)

    def unit(self, text: str, name: str = WEB, **files: str) -> None:
        """Make the unit, its drop directory, and files below /root, and start the watcher.

        Args:
            name: of another unit, which is there already: `text` is a drop-in for it.
        """
        tree = self._work / "unit"
        units = tree / UNITS.lstrip("/")
        (units / f"{name}.confext.d/site.raw.v").mkdir(parents=True)
        (units / f"{name}.d").mkdir()
        (units / f"{name}.d/test.conf" if name != WEB else units / name).write_text(text)
        (tree / "root").mkdir()
        for file, content in files.items():
            (tree / "root" / f"{file}.py").write_text(content)
        gone = f"systemctl stop {name} confext-watcher; rm -rf {UNITS}/{name}* /var/lib/confext-watcher/*"
        self._stack.callback(self.machine.run, ["sh", "-c", gone])
        self.machine.send(tree)
        self.machine.run(["systemctl", "daemon-reload"])

    def image(self, version: int, files: Mapping[str, str], fstype: str = "squashfs") -> Path:
        """`site_VERSION.raw`, with files below /etc. A `fstype` "disk image with erofs" has a partition table."""
        tree = confext(
            self._tree(version) / "site",
            "site",
            {f"etc/{path}": text.encode() for path, text in files.items()},
        )
        made = tree.parent / f"site_{version}.raw"
        format = fstype.rpartition(" ")[2]
        if format == fstype:
            return image(tree, made, fstype)
        (tree.parent / "definitions").mkdir()
        (tree.parent / "definitions/0.conf").write_text(_PARTITION.format(format))
        native.run(tree.parent, ["sh", "-ec", _REPART.format(work=native.WORK)])
        return (tree.parent / "made.raw").rename(made)

    def _tree(self, version: int) -> Path:
        directory = self._work / str(version)
        directory.mkdir()
        return directory

    def drop(self, file: Path, directory: str = DROPS) -> None:
        """Copy a file into the drop directory, in place, as scp does."""
        alone = self._work / "drop"
        alone.mkdir()
        file.rename(alone / file.name)
        self.machine.send(alone, to=directory)
        shutil.rmtree(alone)

    def journal(self) -> Journal:
        """What the journal gets from now on."""
        return Journal(self.machine, self._stack)

    def start(self, name: str = WEB) -> Journal:
        """Start the watcher and the unit, until that is found to have started well."""
        self.machine.run(["systemctl", "start", "confext-watcher"])
        journal = self.journal()
        self.machine.run(["systemctl", "restart", name])
        journal.until(lambda entry: f"{name}: started well" in entry["MESSAGE"])
        return journal


@contextlib.contextmanager
def web(machine: Machine) -> Iterator[Web]:
    """The unit for one test."""
    with contextlib.ExitStack() as stack:
        yield Web(machine, stack)
