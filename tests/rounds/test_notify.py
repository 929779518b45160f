# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Notify=`: which outcomes are told to whom, and that it is never in the way. Runs real commands by managers/aside.py.

On systemd: tests/beds/test_systemd_notify.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from watcher.managers.aside import run_as_child
from watcher.managers.base import Ended, Service
from watcher.model import Declared, Event, Outcome
from watcher.rounds.notify import Notifier
from watcher.settings.config import ServiceSettings, Settings

Told = list[tuple[str, str]]


def event(outcome: Outcome = Outcome.REFUSED, service: str = "web.service", **fields: str) -> Event:
    return Event(service, outcome, fields.pop("message", "what happened"), when=1, **fields)


async def told(settings: Settings, own: ServiceSettings, *events: Event) -> Told:
    """The commands that are run, and the outcome of each, sorted."""
    found: Told = []

    async def run(one: Event, command: str, text: bytes, timeout_sec: float) -> Ended:
        assert json.loads(text)["outcome"] == one.outcome.value
        found.append((command, one.outcome.value))
        return Ended("", "")

    service = Service("web.service", Declared(), own)
    notifier = Notifier(lambda: {"web.service": service}, lambda: settings, run)
    for one in events:
        notifier.tell(one)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return sorted(found)


async def test_what_went_wrong_is_told_and_what_went_well_only_where_it_is_asked_for() -> None:
    everything = [event(outcome) for outcome in Outcome]
    asked = Settings(notify=("/alert",))
    assert await told(asked, ServiceSettings(), *everything) == [
        ("/alert", "failed"),
        ("/alert", "refused"),
        ("/alert", "rolled-back"),
    ]
    more = ServiceSettings(notify_on=("applied",))
    assert await told(asked, more, *everything) == [("/alert", "applied")]
    assert await told(Settings(), ServiceSettings(), *everything) == []


async def test_a_services_own_takes_the_place_of_the_watchers() -> None:
    asked = Settings(notify=("/alert",))
    own = ServiceSettings(notify=("/own", "/other"))
    both = [event(), event(service="gone.service")]
    assert await told(asked, own, *both) == [
        ("/alert", "refused"),
        ("/other", "refused"),
        ("/own", "refused"),
    ]


async def test_commands_that_hang_are_in_nobodys_way() -> None:
    asked = Settings(notify=("/alert",))
    free, running = trio.Event(), 0

    async def run(one: Event, command: str, text: bytes, timeout_sec: float) -> Ended:
        nonlocal running
        running += 1
        await free.wait()
        return Ended("", "")

    notifier = Notifier(dict, lambda: asked, run)
    with capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(1000):
                notifier.tell(event())
            await trio.testing.wait_all_tasks_blocked()
            assert running == 4
            free.set()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    (line,) = lines
    left_out = int(line["event"].split()[6])
    assert "too many outcomes at once" in line["event"] and running == 1000 - left_out <= 104


async def ran(command: str, one: Event | None = None, timeout_sec: float = 60) -> Ended:
    one = one or event()
    return await run_as_child(one, command, b"the text\n", timeout_sec)


async def test_a_command_reads_the_outcome_and_is_told_whose_it_is(tmp_path: Path) -> None:
    script = 'cat; echo "$CONFEXT_SERVICE $CONFEXT_OUTCOME"; pwd; env | grep -c NOTIFY_SOCKET'
    ended = await ran(f"/bin/sh -c {shlex.quote(script)}")
    assert ended.output.splitlines() == ["the text", "web.service refused", "/", "0"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("/bin/sh -c 'echo no such host; exit 3'", "failed with exit status 3"),
        ("/bin/sh -c 'kill -TERM $$'", "was ended by SIGTERM"),
        ("/nowhere/alert", "cannot be started: No such file or directory"),
        ("alert@.service", "cannot be started: there is no systemd"),
        ("true", ""),  # it did not read a byte
    ],
)
async def test_how_a_command_ended_is_said(command: str, reason: str) -> None:
    assert (await ran(command)).reason == reason


async def test_a_command_that_takes_too_long_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"sleep 1000 & echo $! >{pid}; wait"
    ended = await ran(f"/bin/sh -c {shlex.quote(script)}", timeout_sec=1)
    assert ended.reason == "was killed: it took longer than 1 s"
    with trio.fail_after(60):
        while Path(f"/proc/{pid.read_text().strip()}").exists():
            await trio.sleep(0.01)


async def test_of_what_a_command_prints_without_end_little_is_kept() -> None:
    ended = await ran("/bin/sh -c 'head -c 10000000 /dev/zero'")
    assert (ended.reason, len(ended.output)) == ("", 64 * 1024)


async def test_that_nobody_was_told_is_a_line() -> None:
    notifier = Notifier(dict, lambda: Settings(notify=("/bin/false",)), run_as_child)
    notifier.tell(event())
    with capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run)
            with trio.fail_after(60):
                while not lines:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    said = "web.service: nobody was told that it was refused: Notify=/bin/false failed with exit status 1"
    assert [line["event"] for line in lines] == [said]
