# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a root file system with systemd: takes cases from standard input, prints what the tools say.

One JSON value a line, each way. Standard library only, and nothing of this project.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

TYPES = {"image": ["--suffix=.raw", "--type=reg", "--type=blk"], "directory": ["--type=dir"]}
PARTITIONS = ("root", "usr", "home", "root-verity", "root-verity-sig", "default")
LINKS = {"link-file": "../REG", "link-directory": "../DIR", "link-fifo": "../FIFO", "dangling": "../nothing"}


def run(*command: str) -> subprocess.CompletedProcess[bytes]:
    encoded = [os.fsencode(word) for word in command]
    return subprocess.run(encoded, stdin=subprocess.DEVNULL, capture_output=True, check=False)


def compare(case: list[str]) -> list[Any]:
    done = run("systemd-analyze", "compare-versions", "--", *case)
    return [*case, {0: 0, 11: 1, 12: -1}[done.returncode]]


def policy(text: str) -> list[Any]:
    """The text, and what holds for some partitions, each as the tool's table has it; None: it is no policy."""
    done = run("systemd-analyze", "image-policy", "--", text)
    if done.returncode:
        return [text, None]
    table = done.stdout.decode().rpartition("\n\n")[2].splitlines()[1:]
    return [text, {name: cells for name, *cells in map(str.split, table) if name in PARTITIONS}]


def make(directory: str, name: str, kind: str) -> None:
    path = f"{directory}/{name}"
    if kind in LINKS:
        os.symlink(LINKS[kind], path)
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "block":
        os.mknod(path, 0o60600, os.makedev(7, 0))
    else:
        open(path, "x").close()


def vpick(options: list[str], path: str) -> Any:
    """[name, version, architecture, left, done], None if nothing fits, or the error as text."""
    done = run("systemd-vpick", *options, "--print=filename", path)
    if done.returncode:
        text = done.stderr.decode(errors="replace")
        return None if text.startswith("No matching version") else text.rpartition(": ")[2].strip()
    name = os.fsdecode(done.stdout.removesuffix(b"\n"))
    version = printed(options, path, "version")
    architecture = printed(options, path, "arch")
    counters = re.fullmatch(r"\+(\d+)-(\d+)", printed(options, path, "tries") or "")
    return [name, version, architecture, *(counters.groups() if counters else (None, None))]


def printed(options: list[str], path: str, what: str) -> str | None:
    """One by one: all at once as a table fails where the path is not UTF-8."""
    done = run("systemd-vpick", *options, f"--print={what}", path)
    return None if done.returncode else done.stdout.decode("ascii").strip()


def pick(case: dict[str, Any]) -> dict[str, Any]:
    """The answer, and where dangling links made it fail, that without them."""
    top = tempfile.mkdtemp()
    open(f"{top}/REG", "x").close()
    os.mkdir(f"{top}/DIR")
    os.mkfifo(f"{top}/FIFO")
    path = f"{top}/{case['path']}"
    directory = path if path.endswith(".v") else os.path.dirname(path.rstrip("/"))
    os.mkdir(directory)
    for name, kind in case["entries"]:
        make(directory, name, kind)
    answer = vpick(TYPES[case["kind"]], path)
    result = {**case, "answer": answer}
    if isinstance(answer, str):
        for name, kind in case["entries"]:
            if kind == "dangling":
                os.unlink(f"{directory}/{name}")
        result["without"] = vpick(TYPES[case["kind"]], path)
    shutil.rmtree(top)
    return result


def main() -> None:
    print(json.dumps(run("systemd-vpick", "--version").stdout.decode().splitlines()[0]), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        ask = policy if isinstance(case, str) else pick if isinstance(case, dict) else compare
        print(json.dumps(ask(case)), flush=True)


if __name__ == "__main__":
    main()
