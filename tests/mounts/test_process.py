# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a process that is held: here, whether a signal would end it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from watcher.mounts.process import Gone, Process

WAYS = {
    "catches": "signal.signal(signal.SIGHUP, lambda *_: None); signal.pause()",
    "ignores": "signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.pause()",
    "blocks": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP]); signal.pause()",
    "waits for": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP]); signal.sigwait([signal.SIGHUP])",
    "knows nothing of": "signal.pause()",
}


@pytest.mark.parametrize("way", WAYS)
def test_whether_a_signal_would_end_a_process_that_(way: str) -> None:
    program = f"import signal; print('ready', flush=True); {WAYS[way]}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with Process(child.pid) as process:
            while process.read("wchan") in ("", "0") or "R" in process.read("stat").split(")")[1][:2]:
                pass  # until it sleeps in its last call
            assert process.survives(signal.SIGHUP) == (way != "knows nothing of")
        child.kill()


def test_a_process_that_was_let_go_of_gets_no_signal_and_counts_as_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process(child.pid)
        process.close()
        assert not process.alive()
        for use in (
            lambda: process.signal(0),
            process.hold,
            lambda: process.read("mountinfo"),
            process.namespace,
        ):
            with pytest.raises(Gone):
                use()
        child.kill()


def test_the_mount_table_of_a_process_that_is_ending_is_gone() -> None:
    """Not EINVAL, which was taken for a mistake in the program: it has left its namespaces, and can still be held."""
    with subprocess.Popen(["sleep", "60"]) as child, Process(child.pid) as process:
        assert process.read("mountinfo")
        child.kill()
        while process.alive():
            pass
        with pytest.raises(Gone):
            process.read("mountinfo")
