# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a check may say something else of the same content (rounds/retry.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from watcher.model import Candidate, KeptOut, Kind, Scope, Verdict
from watcher.records.state import Quarantine, State
from watcher.rounds import retry
from watcher.rounds.choose import Passed
from watcher.settings.config import ServiceSettings


class Host:
    """An image that a check has refused a moment ago, on a host of its own."""

    def __init__(self, base: Path) -> None:
        self.etc, self.image, self.script = base / "etc", base / "web_4.raw", base / "check"
        (self.etc / "web").mkdir(parents=True)
        (self.etc / "x.confext.d").mkdir()
        for path in (self.image, self.script, self.etc / "web/old"):
            path.write_text("old")
        self.settings = ServiceSettings(check=(f"/bin/sh {self.script}",), health_check=("/bin/true",))
        time.sleep(0.02)  # the kernel counts ticks
        self.since = time.time_ns() // 1000
        time.sleep(0.02)

    def again(self, verdict: Verdict = Verdict.CHECK_FAILED, settings: ServiceSettings | None = None) -> bool:
        judge = retry.judge(self.settings, verdict)
        bad = Quarantine("d", "no", 1, str(self.image), judge=judge, since=self.since)
        state = State(quarantine=(bad, Quarantine("other", "no", 1, str(self.image))))
        found = retry.again(state, settings or self.settings, str(self.etc))
        assert found in ((), ("d",))
        return bool(found)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


REASONS: dict[str, Callable[[Host], object]] = {
    "the image was touched": lambda host: os.utime(host.image),
    "the image is gone": lambda host: host.image.unlink(),
    "the script was written": lambda host: host.script.write_text("new"),
    "a file of the host was written": lambda host: (host.etc / "web/old").write_text("new"),
    "one came": lambda host: (host.etc / "web/new").touch(),
    "one went": lambda host: (host.etc / "web/old").unlink(),
    "one came by rename": lambda host: host.script.rename(host.etc / "web/other"),
}
NONE: dict[str, Callable[[Host], object]] = {
    "nothing": lambda host: None,
    "something was dropped": lambda host: (host.etc / "x.confext.d/web.raw").touch(),
    "it was read": lambda host: (host.etc / "web/old").read_text(),
}


@pytest.mark.parametrize("reason", REASONS.values(), ids=REASONS)
def test_there_is_a_reason(host: Host, reason: Callable[[Host], object]) -> None:
    assert not host.again()
    reason(host)
    assert host.again()
    assert not host.again(Verdict.HEALTH_CHECK_FAILED)
    assert not host.again(Verdict.RELOAD_FAILED)


@pytest.mark.parametrize("reason", NONE.values(), ids=NONE)
def test_there_is_none(host: Host, reason: Callable[[Host], object]) -> None:
    reason(host)
    assert not host.again()


def test_another_check_is_another_judge(host: Host) -> None:
    for changed in ({"check": ()}, {"check": ("/bin/true",)}, {"check_usec": 1}):
        assert host.again(settings=replace(host.settings, **changed))
    healthy = replace(host.settings, health_check=())
    assert not host.again(settings=healthy)
    assert host.again(Verdict.HEALTH_CHECK_FAILED, healthy)


def test_what_a_wrong_clock_has_left_behind_is_no_change(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    (host.etc / "web/new").touch()
    now = time.time_ns()
    host.since = (now - 3600 * 10**9) // 1000
    monkeypatch.setattr(time, "time_ns", lambda: now - 1800 * 10**9)
    assert not host.again()


def test_the_hosts_files_are_watched_only_while_something_was_refused(host: Host) -> None:
    judge = retry.judge(host.settings, Verdict.CHECK_FAILED)
    refused = State(quarantine=(Quarantine("d", "no", 1, judge=judge),))
    found = retry.interests(refused, host.settings, str(host.etc))
    assert [one.path for one in found if one.scope is Scope.TREE] == [str(host.etc)]
    assert [one.path for one in found if one.pattern == "check"] == [str(host.script.parent)]
    assert retry.interests(State(), host.settings, str(host.etc)) == ()


def test_a_copy_under_another_name_is_a_reason_and_one_that_was_there_is_not(host: Host) -> None:
    """The same content, as a look finds it beside the file that was refused."""
    state = State(
        quarantine=(
            Quarantine(
                "d",
                "no",
                1,
                str(host.image),
                judge=retry.judge(host.settings, Verdict.CHECK_FAILED),
                since=host.since,
            ),
        )
    )

    def again(path: Path, digest: str) -> bool:
        candidate = Candidate(str(path), path.name, "web", "5", Kind.IMAGE)
        passed = [Passed("web", candidate, KeptOut("kept out", digest))]
        return bool(retry.again(state, host.settings, str(host.etc), passed))

    assert not again(host.script, "d")
    copied = host.image.with_name("web_5.raw")
    copied.touch()
    assert again(copied, "d")
    assert not again(copied, "other")
    assert not again(host.image.with_name("gone"), "d")
