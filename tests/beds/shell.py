# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bed SYSTEMD=262`: a shell in a bed; it is gone when the shell ends."""

from __future__ import annotations

import os
import subprocess
import sys

from beds.bed import Bed, BootFailed
from beds.roots import SUITES, BuildFailed
from support.needs import bed as bed_needed
from support.needs import lacking


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else "262"
    if version not in SUITES:
        print(f"make bed: SYSTEMD must be one of {', '.join(SUITES)}, not {version}", file=sys.stderr)
        return 2
    reason = lacking(bed_needed.mark)
    if reason:
        print(f"make bed: {reason}", file=sys.stderr)
        return 1
    try:
        with Bed(version) as bed:
            print(
                f"{bed.name}: systemd is {bed.run(['systemctl', 'is-system-running'], check=False).stdout.strip()}",
                flush=True,
            )
            # A terminal of the container's own, so that job control and `tty` work.
            terminal = ["systemd-run", "--pty", "--quiet", "--collect", "--setenv=TERM", "bash", "--login"]
            argv = terminal if sys.stdin.isatty() else ["bash"]
            subprocess.run(bed.command(argv, {"TERM": os.environ.get("TERM", "dumb")}), check=False)
            return 0
    except (BuildFailed, BootFailed) as error:
        print(f"make bed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
