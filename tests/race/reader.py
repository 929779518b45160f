# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service: reads its `/etc` over and over, and says what it should not have seen. Ends with a line of JSON.

One descriptor of `/etc` is opened for each look, so that all that is read by way of it is of one stack.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from race import contents

DIRECTORIES = ("race-image", "race-tree")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def look() -> dict[str, dict[str, bytes]]:
    etc = os.open("/etc", _DIRECTORY)
    try:
        return {name: _files(etc, name) for name in DIRECTORIES}
    finally:
        os.close(etc)


def _files(etc: int, name: str) -> dict[str, bytes]:
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=etc)
    except FileNotFoundError:
        return {}
    try:
        return {file: _content(directory, file) for file in os.listdir(directory)}
    finally:
        os.close(directory)


def _content(directory: int, file: str) -> bytes:
    with open(os.open(file, os.O_RDONLY, dir_fd=directory), "rb") as opened:
        return opened.read()


def main() -> None:
    ends: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: ends.append(number))
    looks = 0
    changes: collections.Counter[str] = collections.Counter()
    violations: dict[str, int] = {}
    before: dict[str, str] = {}
    print("started", flush=True)
    while not ends:
        looks += 1
        try:
            found = look()
            wrong = [said for name in DIRECTORIES if (said := contents.violation(found[name]))]
            for name in DIRECTORIES:
                letter = next(iter(found[name].values()), b"-")[:1].decode("ascii", "replace")
                if before.get(name) != letter:
                    before[name] = letter
                    changes[f"{name} {letter}"] += 1
        except OSError as error:
            wrong = [f"cannot be read: {error}"]
        for said in wrong:
            violations[said] = violations.get(said, 0) + 1
    print("end", json.dumps({"looks": looks, "changes": changes, "violations": violations}), flush=True)


if __name__ == "__main__":
    main()
