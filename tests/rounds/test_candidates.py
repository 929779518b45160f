# SPDX-License-Identifier: LGPL-2.1-or-later
"""Of what was passed over: why, until when, and what helps. All that lies there is seen in tests/scenarios/."""

from __future__ import annotations

import pytest

from watcher.managers.base import Service
from watcher.model import (
    Busy,
    Candidate,
    Declared,
    Incomplete,
    KeptOut,
    Kind,
    Refused,
    Sysext,
    Verdict,
)
from watcher.records.state import INNOCENT, Quarantine, State
from watcher.rounds import candidates, retry
from watcher.rounds.choose import Passed
from watcher.settings.config import ServiceSettings

WEB = Candidate("/srv/web_2.raw", "web_2.raw", "web", "2", Kind.IMAGE, tries_left=3, tries_done=1)
LET_IN = "confext-watcher rollback --forget web.service"
OWN = ServiceSettings(check=("true",), health_check=("true",))


def told(
    reason: Refused | Busy, *kept: Quarantine, name: str = "web.service", manager: str = "systemd"
) -> object:
    service = Service(name, Declared(), OWN, manager=manager)
    found = candidates.newer(service, State(quarantine=kept), [Passed("web.raw", WEB, reason)])
    return [(one.kind, one.reason, one.command) for one in found]


def test_why_it_is_not_used() -> None:
    assert told(Incomplete("incomplete: 5 of 9 bytes are here")) == [
        ("incomplete", "5 of 9 bytes are here", "")
    ]
    assert told(Refused("made for ID=other")) == [("refused", "made for ID=other", "")]
    assert told(Busy("it is being written")) == [("waiting", "it is being written", "")]
    assert told(Sysext("a sysext")) == []


def test_what_helps_where_it_is_kept_out() -> None:
    reason = KeptOut("kept out: no", "a" * 64)
    bad, held = Quarantine("a" * 64, "no", 5), Quarantine("a" * 64, "no", 5, for_now=True)
    assert told(reason, bad) == [("kept-out", "no", LET_IN)]
    assert told(reason, held) == [("kept-out-for-now", "no", "systemctl restart web.service")]
    assert told(reason, held, manager="standalone") == [("kept-out-for-now", "no", LET_IN)]
    (_, _, command) = told(reason, held, name="web@.service")[0]  # type: ignore[index]
    assert command == "confext-watcher rollback --forget web@.service"
    assert told(reason) == [("kept-out", "no", "")]  # of another service, with Rollout=rolling


def test_tries_are_told() -> None:
    (found,) = candidates.newer(
        Service("web.service", Declared(), OWN), State(), [Passed("web.raw", WEB, Busy(""))]
    )
    assert (found.path, found.version, found.tries_left, found.tries_done) == ("/srv/web_2.raw", "2", 3, 1)


@pytest.mark.parametrize(
    ("judge", "for_now", "said"),
    [
        (
            retry.judge(OWN, Verdict.CHECK_FAILED),
            False,
            "a change of the file, of Check= or of the host's /etc",
        ),
        (retry.judge(OWN, Verdict.CHECK_FAILED, at_start=True), False, "the service runs"),
        (retry.judge(OWN, Verdict.HEALTH_CHECK_FAILED), False, "a change of HealthCheck="),
        (retry.judge(OWN, Verdict.WENT_DOWN), False, "it is let in by hand"),
        ("", True, "the next start of the service"),
        (INNOCENT, True, "the next start of the service, or a change of the file"),
    ],
)
def test_until_when(judge: str, for_now: bool, said: str) -> None:
    assert candidates.until(Quarantine("a", "no", 5, judge=judge, for_now=for_now)) == said
