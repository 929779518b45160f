# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon does not load what it does not use."""

from __future__ import annotations

import subprocess
import sys


def test_tables_and_their_like_are_not_loaded_by_the_daemon_and_can_be_by_others() -> None:
    program = (
        "import sys, watcher.cli, watcher.daemon, watcher.rounds.exec_service; assert 'rich' not in sys.modules;"
        " import rich.table; print(rich.table.Table.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "Table\n"
