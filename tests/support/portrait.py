# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that says, on standard output, everything that it finds as it starts; or ends as its argument says."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path


def main() -> int:
    match sys.argv[1:]:
        case ["exit", status]:
            return int(status)
        case ["raise"]:
            raise ValueError("unhappy")
        case ["wait"]:
            print("waiting", flush=True)
            signal.pause()
    print(json.dumps(_portrait()))
    print("on standard error", file=sys.stderr)
    return 0


def _portrait() -> dict[str, object]:
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "arguments": sys.argv[1:],
        "parent": os.getppid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "descriptors": {fd: _what(fd) for fd in os.listdir("/proc/self/fd")},
        "status": {
            key: status[key].strip()
            for key in status
            if key.startswith(("Name", "Umask", "SigB", "SigI", "SigC", "Cap", "Uid", "Gid", "Groups"))
        },
        "threads": threading.active_count(),
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "user", "pid")},
        "streams": [
            (stream.encoding, stream.errors, stream.line_buffering, stream.write_through, stream.fileno())
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "input": sys.stdin.read(),
    }


def _what(fd: str) -> str:
    """Without the number of a pipe."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
    except FileNotFoundError:
        return "the listing itself"


if __name__ == "__main__":
    sys.exit(main())
