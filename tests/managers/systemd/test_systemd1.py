# SPDX-License-Identifier: LGPL-2.1-or-later
"""Object paths of units, and jobs that are waited for."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from watcher.managers.systemd import systemd1
from watcher.managers.systemd.systemd1 import JobResults


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("nginx.service", "nginx_2eservice"),
        ("foo-bar@x.service", "foo_2dbar_40x_2eservice"),
        ("9p.service", "_39p_2eservice"),
        ("a_b.service", "a_5fb_2eservice"),
    ],
)
def test_a_unit_has_the_object_path_that_systemd_gives_it(name: str, path: str) -> None:
    assert systemd1.unit_path(name) == f"/org/freedesktop/systemd1/unit/{path}"


async def test_a_job_that_ends_before_its_name_is_known_is_not_missed() -> None:
    jobs = JobResults()
    with jobs.listening() as listener:
        jobs.ended("/job/1", "done")
        jobs.ended("/job/2", "failed")
        assert await listener.result("/job/2") == "failed"


async def test_a_job_is_waited_for_until_it_ends(autojump_clock: trio.testing.MockClock) -> None:
    jobs = JobResults()

    async def end() -> None:
        await trio.sleep(5)
        jobs.ended("/job/1", "done")
        await trio.sleep(5)
        jobs.ended("/job/2", "timeout")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        with jobs.listening() as listener:
            assert await listener.result("/job/2") == "timeout"


async def test_who_waits_for_a_job_is_woken_by_the_end_of_no_other() -> None:
    jobs = JobResults()
    with jobs.listening() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.result, "/job/2")
            await trio.testing.wait_all_tasks_blocked()
            asleep = listener._news
            jobs.ended("/job/1", "done")
            assert listener._news is asleep
            jobs.ended("/job/2", "done")


async def test_a_lost_connection_ends_the_waiting() -> None:
    jobs = JobResults()
    with jobs.listening() as listener:
        jobs.lost()
        assert await listener.result("/job/1") == ""
