# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks systemd again: `make oracle`, or `python -m oracle --root DIRECTORY` with a root that has systemd 262."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
from oracle import cases

WANTED = 12_000
VERSION = "262"
OLD = "257"


def ask(root: Path, questions: Sequence[Any]) -> tuple[str, list[Any]]:
    """The answers from inside `root`, which is not written to: its /tmp is another for the while.

    Returns:
        What the tools call themselves ("systemd 262 (262-1)"), and the answers in order.
    """
    script = 'mount -t tmpfs tmpfs "$0/tmp" && exec chroot "$0" python3 -c "$1"'
    inside = (oracle.HERE / "inside.py").read_text()
    command = ["unshare", "--mount", "--propagation=private", "sh", "-c", script, str(root), inside]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        feeder = threading.Thread(target=_feed, args=(process.stdin, questions))
        feeder.start()
        called, *answers = map(json.loads, process.stdout)
        feeder.join()
    if process.returncode or len(answers) != len(questions):
        raise SystemExit(f"oracle: {len(answers)} answers to {len(questions)} questions in {root}")
    return called, answers


def _feed(pipe: Any, questions: Sequence[Any]) -> None:
    with pipe:
        for question in questions:
            pipe.write(json.dumps(question) + "\n")


def _root(version: str) -> Path:
    from beds import roots

    return roots.build(roots.SUITES[version])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help=f"a root file system with systemd {VERSION} and python3")
    parser.add_argument("--old-root", type=Path, help=f"the same with systemd {OLD}")
    parser.add_argument("names", nargs="*", help="versions, vpick, policies (none: all)")
    options = parser.parse_args()
    asked = {
        "versions": (VERSION, options.root, cases.version_pairs()),
        "vpick": (VERSION, options.root, cases.picks()),
        "policies": (VERSION, options.root, cases.policies()),
        "policies-257": (OLD, options.old_root, cases.policies()),
    }
    for name, (version, root, strategy) in asked.items():
        if options.names and name.partition("-")[0] not in options.names:
            continue
        called, answers = ask(root or _root(version), cases.generate(strategy, WANTED))
        if not called.startswith(f"systemd {version} "):
            raise SystemExit(f"oracle: systemd {version} is asked for, {root} has {called}")
        oracle.save(name, {"tool": called, "architecture": "x86-64", "cases": len(answers)}, answers)
        print(
            f"{oracle.path(name)}: {len(answers)} answers of {called}, {oracle.path(name).stat().st_size} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
