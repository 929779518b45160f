# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make vm`: a shell in the virtual machine, with the checkout's program; it is gone when the shell ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from beds.roots import BuildFailed
from support import needs
from vm.machine import BootFailed, Machine
from vm.program import install


def main() -> int:
    reason = needs.lacking(needs.vm.mark)
    if reason:
        print(f"make vm: {reason}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as scratch, Machine() as machine:
            install(machine, Path(scratch))
            print(machine.run(["uname", "--kernel-release"]).stdout.strip(), flush=True)
            argv = machine.command(["bash", "--login"], {"TERM": os.environ.get("TERM", "dumb")})
            if sys.stdin.isatty():
                argv[argv.index("-T")] = "-t"
            subprocess.run(argv, check=False)
    except (BuildFailed, BootFailed) as error:
        print(f"make vm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
