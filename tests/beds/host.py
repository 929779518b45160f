# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bed as an administrator's host: units made for one test, confexts dropped, what services see and what is said."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from beds.bed import Bed
from beds.systemd import Systemd
from support.images import confext, image

UNITS = "/etc/systemd/system"
SLEEP = "[Service]\nExecStart=/bin/sleep infinity\n"
SECONDS = 60
"""How long something that is going to happen may take."""

Entry = dict[str, Any]


@functools.cache
def install(bed: Bed) -> None:
    """The program with its generator and units, as the package would."""
    installer = Path(__file__).parents[2] / "contrib/packaging/install.py"
    destination = ["--destdir", str(bed.path("/")), "--prefix", "/usr", "--no-compile"]
    subprocess.run([sys.executable, str(installer), *destination], check=True)
    bed.run(["python3", "-m", "compileall", "-q", "/usr/lib/confext-watcher"])
    bed.run(["journalctl", "--update-catalog"])
    bed.run(["systemd-tmpfiles", "--create", "confext-watcher.conf"])
    bed.run(["systemctl", "daemon-reload"])


class Host:
    """A bed with units made for a test, removed at its end."""

    def __init__(self, bed: Bed, stack: contextlib.ExitStack) -> None:
        self.bed = bed
        self.stack = stack

    # --- units ---

    def unit(self, name: str, text: str = SLEEP, *, takes_part: bool = True) -> None:
        """Make a unit (and its `.confext.d/`); it is gone after the test, with all that belongs to it."""
        self.units({name: text}, takes_part=takes_part)

    def units(self, texts: Mapping[str, str], *, takes_part: bool = True) -> None:
        """Several units at once: a daemon-reload takes its time."""
        for name, text in texts.items():
            self.bed.path(f"{UNITS}/{name}").write_text(text)
            self.stack.callback(self._remove, name)
            if takes_part:
                self.confext_dir(name).mkdir()
        self.systemctl("daemon-reload")

    def take_part(self, name: str) -> None:
        """Give a unit that is there anyway (of a package) a `.confext.d/`, for the length of the test."""
        self.stack.callback(self._remove, name)
        self.confext_dir(name).mkdir()

    def clean(self, name: str) -> None:
        """Take away after the test what it makes of a unit that is there anyway."""
        self.stack.callback(self._remove, name)

    def confext_dir(self, name: str) -> Path:
        return self.bed.path(f"{UNITS}/{name}.confext.d")

    def _remove(self, name: str) -> None:
        # Without a daemon-reload: the next test makes one, and nothing of this unit is there any more.
        pattern = name.replace("@.", "@*.")
        state = "/var/lib/confext-watcher"
        remove = (
            f"systemctl stop '{pattern}'; systemctl reset-failed '{pattern}';"
            f"rm -rf {UNITS}/{pattern}* {state}/units/{pattern} {state}/stacks/{pattern}"
        )
        self.bed.run(["sh", "-c", remove])

    def systemctl(self, *arguments: str) -> None:
        self.bed.run(["systemctl", *arguments])

    def main_pid(self, name: str) -> int:
        return int(self.bed.property(name, "MainPID"))

    # --- the watcher ---

    def watch(self) -> None:
        """Start the watcher, which has then looked at all that is there; after the test it is stopped, and what it kept
        is gone.
        """
        self.stack.callback(self.bed.run, ["sh", "-c", "rm -rf /var/lib/confext-watcher/*"])
        self.stack.callback(self.systemctl, "stop", "confext-watcher")
        # A unit that a test before has left behind may have started it.
        self.systemctl("restart", "confext-watcher")

    def no_watcher(self) -> None:
        """Stop it, so that nothing starts it either: the drop-ins of its units want it. Until the end of the test."""
        self.systemctl("mask", "--runtime", "--now", "confext-watcher")
        self.stack.callback(self.systemctl, "unmask", "--runtime", "confext-watcher")
        self.assert_no_watcher()

    def assert_no_watcher(self) -> None:
        assert self.bed.property("confext-watcher", "ActiveState") == "inactive"

    # --- confexts ---

    def image(
        self,
        name: str,
        files: dict[str, str],
        *,
        mode: dict[str, tuple[int, int]] | None = None,
        release: str = "ID=_any\n",
    ) -> Path:
        """An image outside of the bed, `NAME.raw`, with `files` below /etc.

        Args:
            mode: (user, permissions) of some of the files.
            release: what its extension-release says.
        """
        tree = self.tree(name, files, release=release)
        for path, (user, permissions) in (mode or {}).items():
            os.chown(tree / "etc" / path, user, user)
            (tree / "etc" / path).chmod(permissions)
        return image(tree, tree.parent / f"{name}.raw")

    def tree(self, name: str, files: dict[str, str], *, release: str = "ID=_any\n") -> Path:
        """A directory outside of the bed, `NAME`, with what an image would have in it."""
        scratch = Path(tempfile.mkdtemp(dir=self.bed.root.parent))
        self.stack.callback(shutil.rmtree, scratch)
        below_etc = {f"etc/{path}": text.encode() for path, text in files.items()}
        return confext(scratch / name, name.partition("_")[0], below_etc, release)

    def drop(self, source: Path, unit: str, name: str = "") -> Path:
        """Copy a file into a unit's `.confext.d/` as scp would: in place, under its own name (or `name`)."""
        target = self.confext_dir(unit) / (name or source.name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        return target

    def drop_tree(self, source: Path, target: str) -> None:
        """Put a directory tree to a path in the bed, in one step."""
        coming = self.bed.path(os.path.join(os.path.dirname(target), ".coming"))
        shutil.copytree(source, coming)
        coming.rename(self.bed.path(target))

    # --- what is to be seen ---

    def see(self, unit: str, path: str) -> str:
        """A file as the main process of a unit sees it; "" if it does not."""
        pid = str(self.started(unit))
        inside = ["nsenter", "--target", pid, "--mount", "--root", "--", "cat", path]
        return self.bed.run(inside, check=False).stdout.strip()

    def started(self, unit: str) -> int:
        """The main process of a unit, once systemd's executor has become it; systemd does not wait for that."""
        pid = self.main_pid(unit)
        look = f"while readlink /proc/{pid}/exe | grep -q systemd-executor; do sleep 0.01; done"
        self.bed.run(["sh", "-c", look], timeout=SECONDS)
        return pid

    def mounts(self, unit: str) -> list[list[str]]:
        """The mount table of a unit's main process: fields of each row."""
        text = self.bed.run(["cat", f"/proc/{self.started(unit)}/mountinfo"]).stdout
        return [line.split(" ") for line in text.splitlines()]

    def own_mounts(self) -> str:
        """The bed's own mount table."""
        return self.bed.run(["cat", "/proc/1/mountinfo"]).stdout

    def journal(self) -> Journal:
        """What the journal gets from now on."""
        return Journal(self.bed, self.stack)


class Journal:
    """New entries of the journal, read as they come."""

    def __init__(self, bed: Systemd, stack: contextlib.ExitStack) -> None:
        # From a known place on, so that nothing is missed until it follows.
        last = bed.run(["journalctl", "--lines=1", "--output=json", "--output-fields=MESSAGE"]).stdout
        cursor = json.loads(last)["__CURSOR"]
        follow = f"journalctl --follow --no-tail --output=json --all --after-cursor='{cursor}'"
        # Neither nsenter nor ssh passes signals on: it ends when its standard input does.
        self._process = bed.popen(
            ["sh", "-c", f"{follow} SYSLOG_IDENTIFIER=confext-watcher & cat; kill $!"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._patience = bed.patience
        self._entries: queue.Queue[Entry] = queue.Queue()
        self.seen: list[Entry] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        stack.callback(self._close)

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._entries.put(json.loads(line))

    def _close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=self._patience)
        self._reader.join()
        self._process.stdout.close()

    def until(self, condition: Callable[[Entry], object]) -> Entry:
        """The next entry for which the condition holds."""
        while True:
            try:
                entry = self._entries.get(timeout=self._patience)
            except queue.Empty:
                said = "\n".join(entry["MESSAGE"] for entry in self.seen[-10:])
                raise AssertionError(f"the journal has nothing more; before:\n{said}") from None
            self.seen.append(entry)
            if condition(entry):
                return entry

    def outcome(self, unit: str, outcome: str) -> Entry:
        """The next entry of this outcome for a unit; one of another is a failure.

        That something was accepted while the unit was being started does not count: its application follows.
        """
        entry = self.until(
            lambda entry: (
                entry.get("CONFEXT_SERVICE") == unit
                and "CONFEXT_OUTCOME" in entry
                and "being started" not in entry["MESSAGE"]
            )
        )
        assert entry["CONFEXT_OUTCOME"] == outcome, entry["MESSAGE"]
        return entry

    def applied(self, unit: str) -> Entry:
        return self.outcome(unit, "applied")

    def all_applied(self, units: Iterable[str], words: str = "") -> None:
        """The next outcome of each of these units, in whatever order, is that, and says this."""
        left = set(units)
        while left:
            entry = self.until(lambda entry: "CONFEXT_OUTCOME" in entry and entry["CONFEXT_SERVICE"] in left)
            if "being started" not in entry["MESSAGE"]:
                assert entry["CONFEXT_OUTCOME"] == "applied" and words in entry["MESSAGE"], entry["MESSAGE"]
                left.remove(entry["CONFEXT_SERVICE"])

    def said(self) -> list[Entry]:
        """All that has come by now."""
        while not self._entries.empty():
            self.seen.append(self._entries.get())
        return self.seen
