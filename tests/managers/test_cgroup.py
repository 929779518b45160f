# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which processes are a unit's, by files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watcher.managers import cgroup


@pytest.mark.parametrize(
    ("text", "unit", "group"),
    [
        ("0::/system.slice/nginx.service\n", "nginx.service", "/system.slice/nginx.service"),
        ("0::/system.slice/nginx.service/main\n", "nginx.service", "/system.slice/nginx.service"),
        ("12:pids:/x\n1:name=systemd:/system.slice/a.service\n", "a.service", "/system.slice/a.service"),
        ("0::/system.slice/_cgroup.service\n", "cgroup.service", "/system.slice/_cgroup.service"),
        ("0::/user.slice/session.scope\n", "nginx.service", ""),
        ("0::/a.slice/odd:name.service\n", "odd:name.service", "/a.slice/odd:name.service"),
        ("", "nginx.service", ""),
    ],
)
def test_the_group_of_a_unit_is_found_from_its_main_process(text: str, unit: str, group: str) -> None:
    assert cgroup.unit_group(text, unit) == group


def test_the_unified_hierarchy_is_preferred_and_a_bound_file_of_it_is_not_it() -> None:
    text = (
        "29 24 0:27 /x.service/memory.pressure /sys/fs/cgroup/x.service/memory.pressure rw - cgroup2 cgroup2 rw\n"
        "30 24 0:26 / /sys/fs/cgroup/systemd rw shared:9 - cgroup cgroup rw,xattr,name=systemd\n"
        "31 24 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n"
    )
    assert cgroup.mount_point(text) == "/sys/fs/cgroup/unified"
    assert cgroup.mount_point(text.splitlines()[1]) == "/sys/fs/cgroup/systemd"
    assert cgroup.mount_point("") == ""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc with one process, 10, of web.service."""
    proc = tmp_path / "proc"
    for name in ("self", "10"):
        (proc / name).mkdir(parents=True)
    (proc / "self/mountinfo").write_text(f"31 24 0:27 / {tmp_path}/cg rw - cgroup2 cgroup2 rw\n")
    (proc / "10/cgroup").write_text("0::/web.service/main\n")
    for directory, pids in {"": "11", "main": "10", "workers": "12 13", "workers/deep": "14"}.items():
        group = tmp_path / "cg/web.service" / directory
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.procs").write_text(pids.replace(" ", "\n") + "\n")
    return proc


def test_all_of_the_group_and_what_is_below_it_belongs_to_the_unit(proc: Path) -> None:
    assert sorted(cgroup.processes(10, "web.service", str(proc))) == [10, 11, 12, 13, 14]


def test_the_mount_table_is_read_until_it_has_the_hierarchy(proc: Path) -> None:
    table = (proc / "self/mountinfo").read_text()
    (proc / "self/mountinfo").write_text("")
    assert cgroup.processes(10, "web.service", str(proc)) == [10]
    (proc / "self/mountinfo").write_text(table)
    assert len(cgroup.processes(10, "web.service", str(proc))) == 5
    (proc / "self/mountinfo").unlink()
    assert len(cgroup.processes(10, "web.service", str(proc))) == 5


def test_a_delegated_subtree_is_not_the_units(proc: Path, tmp_path: Path) -> None:
    os.setxattr(tmp_path / "cg/web.service/workers", "user.delegate", b"1")
    assert sorted(cgroup.processes(10, "web.service", str(proc))) == [10, 11]


def test_of_a_delegated_unit_only_its_own_group_counts(proc: Path, tmp_path: Path) -> None:
    os.setxattr(tmp_path / "cg/web.service", "user.delegate", b"1")
    assert sorted(cgroup.processes(10, "web.service", str(proc))) == [10, 11]


def test_a_process_that_is_gone_is_all_there_is(proc: Path) -> None:
    assert cgroup.processes(99, "web.service", str(proc)) == [99]
