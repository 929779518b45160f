# SPDX-License-Identifier: LGPL-2.1-or-later
"""One race: a daemon, a service that reads, attackers; and what came of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from race import reader
from race.contents import FILES, LETTERS, SECRET, content
from scenarios.place import Place, Service
from support import images
from support.nobody import NOBODY

ATTACKERS = 2


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        tried: what the attackers did, and how often.
        applied: stacks that the daemon put in place.
        looks: how often the service has read its `/etc`.
        seen: how often it came to see something else, by directory and letter.
        violations: what it must not have seen, and how often.
    """

    tried: dict[str, int]
    applied: int
    refused: int
    looks: int
    seen: dict[str, int]
    violations: dict[str, int]

    def __str__(self) -> str:
        tries, count = sum(self.tried.values()), sum(self.violations.values())
        lines = [
            f"{tries} tries of {len(self.tried)} kinds, {self.applied} stacks applied, {self.refused} refused,",
            f"{self.looks} looks at /etc, {sum(self.seen.values())} changes seen: {count} violations",
        ]
        return "\n".join([*lines, *(f"  {number} times: {said}" for said, number in self.violations.items())])


def race(path: Path, seconds: float, *, kinds: Sequence[str] = (), broken: str = "", seed: int = 0) -> Result:
    """
    Args:
        path: a directory of its own, that everybody can reach.
        kinds: of what the attackers do; all where none is given.
        broken: Python that is executed in the daemon before it starts.
    """
    home = prepare(path)
    with Place(path / "place") as place:
        place.configure("SettleSec=2ms", "SettleMaxSec=100ms", "HistoryMax=100000")
        place.environment["PYTHONFAULTHANDLER"] = "1"
        if broken:
            sabotage = path / "sabotage"
            sabotage.mkdir()
            (sabotage / "sitecustomize.py").write_text(broken)
        place.start_daemon(*(("env", f"PYTHONPATH={sabotage}") if broken else ()))
        service = place.start(
            *("--confext-dir", str(home / "drops"), "--set", f"TrustedUsers={NOBODY}"),
            *("--reload-signal", "SIGHUP"),
            name="race.service",
            program=(sys.executable, "-B", str(reader.__file__)),
            declared=False,
        )
        tried = attack(place, home, seconds, kinds, seed)
        events = history(place)
        said = end(service)
    outcomes = [event["outcome"] for event in events]
    violations = dict(said["violations"])
    known = {images.digest(path / f"images/{letter}.raw") for letter in LETTERS}
    for event in events:
        for layer in event["layers"]:
            if layer["kind"] == "image" and layer["digest"] not in known:
                violations[f"applied: {layer['digest']}"] = violations.get(layer["digest"], 0) + 1
    return Result(
        tried,
        outcomes.count("applied"),
        outcomes.count("refused") + outcomes.count("incomplete"),
        said["looks"],
        said["changes"],
        violations,
    )


def attack(place: Place, home: Path, seconds: float, kinds: Sequence[str], seed: int) -> dict[str, int]:
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "race.attacker", str(home), str(seed + number), str(seconds), *kinds],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
        )
        for number in range(ATTACKERS)
    ]
    assert place.daemon is not None
    while any(process.poll() is None for process in running):
        place.daemon.log.read()  # or the pipe would be full, and it would wait for us
        time.sleep(0.02)
    tried: dict[str, int] = {}
    for process in running:
        answer, _ = process.communicate()
        assert process.returncode == 0, process.returncode
        for kind, count in json.loads(answer).items():
            tried[kind] = tried.get(kind, 0) + count
    return tried


def history(place: Place) -> list[dict[str, Any]]:
    try:
        answer = place.run("history", "--json", "--lines", "100000")
    except subprocess.TimeoutExpired:
        # Where it hangs: every thread's traceback, by faulthandler.
        assert place.daemon is not None
        place.daemon.send(signal.SIGABRT)
        raise AssertionError("\n".join(place.daemon.log.wait_for_end()[-200:])) from None
    events: list[dict[str, Any]] = json.loads(answer.stdout)["events"]
    return events


def end(service: Service) -> dict[str, Any]:
    """What the service has to say in the end."""
    service.send(signal.SIGTERM)
    said: dict[str, Any] = json.loads(service.said.wait_for("^end ").removeprefix("end "))
    return said


def prepare(path: Path) -> Path:
    """Contents that are whole, broken ones, root's own; the attackers' home, which is theirs."""
    made, pristine, home, secret = (path / name for name in ("images", "pristine", "home", "secret"))
    for directory in (path / "place", made, pristine, path / "trees", secret / "web.raw.v", home / "drops"):
        directory.mkdir(parents=True)
    (home / "aside").mkdir()
    for private in (secret, made, path / "trees"):
        private.chmod(0o700)
    for letter in (*LETTERS, SECRET):
        tree = images.confext(path / "trees" / letter, "www", _files("race-tree", letter))
        source = images.confext(path / "trees" / f"{letter}.image", "web", _files("race-image", letter))
        # Uncompressed, with the same times: all of the same size and layout, so that any piece of one fits another.
        image = images.image(source, made / f"{letter}.raw", "squashfs", *_PLAIN)
        for target in (secret, secret / "web.raw.v") if letter == SECRET else (pristine, home / "aside"):
            name = "web_9.raw" if target.name == "web.raw.v" else image.name
            shutil.copyfile(image, target / name)
            os.chmod(target / name, 0o600 if letter == SECRET else 0o644)
        for target in (secret,) if letter == SECRET else (pristine, home / "aside"):
            shutil.copytree(tree, target / letter)
    sizes = {image.stat().st_size for image in made.iterdir()}
    assert len(sizes) == 1, sizes
    _break((made / "A.raw").read_bytes(), home / "aside")
    for name in ("other.v", "another.v"):
        (home / "aside" / name).mkdir()
    for name in ("web.raw.v", "www.v"):
        (home / "drops" / name).mkdir()
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", home], check=True)
    return home


_PLAIN = (
    *("-noI", "-noD", "-noF", "-noX", "-no-fragments", "-no-duplicates"),
    *("-all-time", "0", "-mkfs-time", "0", "-all-root"),
)


def _files(directory: str, letter: str) -> dict[str, bytes]:
    return {f"etc/{directory}/{file}": content(letter, file) for file in FILES}


def _break(whole: bytes, aside: Path) -> None:
    for name, data in {
        "half": whole[: len(whole) // 2],
        "cut": whole[:-5000],
        "empty": b"",
        "zeros": bytes(len(whole)),
        "superblock": whole[:40] + b"\xff" * 8 + whole[48:],
        "text": b"ID=_any\n",
    }.items():
        (aside / f"broken-{name}.raw").write_bytes(data)
