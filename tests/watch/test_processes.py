# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of processes that are there, of threads of the kernel, and of those that are gone."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

from support.needs import root
from watcher.watch import processes


def test_a_process_its_name_and_its_ancestors() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        pid = child.pid
        assert processes.introduced(pid).endswith(f"(pid {pid}, user root)") or os.geteuid()
        assert os.getpid() in processes.ancestors(pid) and pid not in processes.ancestors(pid)
        assert pid in processes.others(time.monotonic() + 10)
        child.kill()
    assert not processes.introduced(pid) and not processes.ancestors(pid)
    assert processes.name(pid) == ""


def test_others_are_looked_at_no_longer_than_that() -> None:
    assert not [*processes.others(time.monotonic() - 1)]


@root
def test_a_thread_of_the_kernel_has_no_name() -> None:
    (found,) = {processes.name(pid) for pid in (2, *_threads()[:3])} or {None}
    assert found is None


def _threads() -> list[int]:
    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    return [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid < 100 and parent(pid) == 2
    ]


def test_who_has_a_file_open_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "web.raw"
    with path.open("wb") as file:
        found = os.fstat(file.fileno())
        assert processes.is_writing(os.getpid(), "/web.raw", found)
        assert not processes.is_writing(os.getpid(), "/another.raw", found)
        assert not processes.is_writing(os.getpid(), "/web.raw", os.stat("/"))
    with path.open("rb"):
        assert not processes.is_writing(os.getpid(), "/web.raw", found)


def test_a_file_that_is_open_is_found_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "web_1.raw"
    with path.open("w"):
        assert processes.has_open(os.getpid(), path.name)
        assert not processes.has_open(os.getpid(), "eb_1.raw")
    assert not processes.has_open(os.getpid(), path.name)
    assert not processes.has_open(2**22, path.name)


def test_who_has_no_descriptor_left_learns_nothing_and_goes_on() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        known = processes.name(1), processes.ancestors(os.getpid()), processes.introduced(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert known == ("", frozenset(), "")
