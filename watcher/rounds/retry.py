# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a check has refused is tried again once there is a reason to think that it says something else now.

- The check is another: `Check=`, `CheckSec=`, or a script that it names.
- Somebody has acted on the file: written it again, touched it, moved or removed it, or copied it under another name.
- The host's `/etc` has changed, which the check reads beside the image.
- The check ran before a start of the service, which runs now (`Facts.retry`): what else it needs may be there now.

The kernel has the time of the last change of each file (ctime), which no program can set: all that is younger than the
round in which the check ran was not judged by it. So nothing but that time has to be recorded.

What failed its `HealthCheck=` has been on the service: that is tried again only if `HealthCheck=` is another. What the
service failed with, and without it, too, is not to blame: it is tried again at the next start of the service, and when
somebody acts on its file.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator

from watcher.model import Interest, KeptOut, Scope, Verdict
from watcher.records.state import BEFORE_START, INNOCENT, Quarantine, State
from watcher.rounds.choose import Passed
from watcher.settings import values
from watcher.settings.config import ServiceSettings

# What is dropped somewhere in /etc for services is not what the host itself is configured by.
_DROPPED = ".confext.d"
_CHECK = "Check"


def judge(settings: ServiceSettings, verdict: Verdict, *, at_start: bool = False) -> str:
    """What comes to such a verdict: a check, with its time limit; "" if no check does.

    Args:
        at_start: it ran before a start of the service.
    """
    if verdict is Verdict.CHECK_FAILED and at_start:
        return judge(settings, verdict) + BEFORE_START
    if verdict is Verdict.CHECK_FAILED:
        return "\n".join((f"{_CHECK} {settings.check_usec}", *settings.check))
    if verdict is Verdict.HEALTH_CHECK_FAILED:
        return "\n".join((f"HealthCheck {settings.health_check_usec}", *settings.health_check))
    return ""


def again(
    state: State, settings: ServiceSettings, etc: str, passed: Iterable[Passed] = ()
) -> tuple[str, ...]:
    """Digests of what may be tried again. Blocks, for a walk through `etc` if a check has refused anything.

    Args:
        passed: what a look has passed over, that which is kept out among it.
        etc: the `/etc` beneath its stack; "" if that is not known now.
    """
    if state.undoing is not None:
        return ()
    judged = [one for one in state.quarantine if one.judge]
    judges = [INNOCENT, *(judge(settings, one, at_start=early) for one in Verdict for early in (False, True))]
    newest = _newest(passed)
    found = [
        one.digest for one in judged if one.judge not in judges or _acted_on(one, newest.get(one.digest, 0))
    ]
    left = [one for one in judged if _by_check(one) and one.digest not in found]
    if left:
        changed = max((*map(_changed, _programs(settings)), *_changes(etc)), default=0)
        found += [one.digest for one in left if changed > one.since]
    return tuple(found)


def interests(state: State, settings: ServiceSettings, etc: str) -> tuple[Interest, ...]:
    """Where a change is a reason to look again: the host's `/etc`, and the programs that the check names."""
    if not any(map(_by_check, state.quarantine)):
        return ()
    found = [
        Interest(os.path.dirname(path), pattern=re.escape(os.path.basename(path)))
        for path in _programs(settings)
    ]
    return (*found, Interest(etc, scope=Scope.TREE)) if etc else tuple(found)


def touched(path: str) -> int | None:
    """When a file was last changed in any way, microseconds since the epoch; None: it is not there. Blocks."""
    try:
        return _usec(os.lstat(path))
    except OSError:
        return None


def _by_check(one: Quarantine) -> bool:
    return one.judge.startswith(f"{_CHECK} ")


def _acted_on(one: Quarantine, newest: int) -> bool:
    """Whether the file was changed or removed since the check, or copied; `newest` is when the newest copy was."""
    if not (_by_check(one) or one.judge == INNOCENT) or not one.source:
        return False
    when = touched(one.source)
    return when is None or max(when, newest) > one.since


def _newest(passed: Iterable[Passed]) -> dict[str, int]:
    """When the newest file of each content that is kept out was changed, by digest."""
    found: dict[str, int] = {}
    for one in passed:
        if isinstance(one.reason, KeptOut):
            when = touched(one.candidate.path) or 0
            found[one.reason.digest] = max(when, found.get(one.reason.digest, 0))
    return found


def _programs(settings: ServiceSettings) -> list[str]:
    """The files that `Check=` names by their paths."""
    words = (word for command in settings.check for word in values.split(command))
    return sorted({word for word in words if word.startswith("/") and os.path.isfile(word)})


def _changed(path: str) -> int:
    try:
        return _usec(os.stat(path))
    except OSError:
        return 0


def _changes(etc: str) -> Iterator[int]:
    """When each file in the host's `/etc` was changed; not beyond its file system, which may not answer."""
    try:
        device = os.stat(etc).st_dev if etc else 0
    except OSError:
        return
    todo = [etc] if etc else []
    while todo:
        directory = todo.pop()
        yield _changed(directory)
        try:
            with os.scandir(directory) as entries:
                found = [(entry.path, entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue  # it has gone meanwhile, which its own directory tells
        for path, name, status in found:
            if not stat.S_ISDIR(status.st_mode):
                yield _usec(status)
            elif status.st_dev == device and not name.endswith(_DROPPED):
                todo.append(path)


def _usec(status: os.stat_result) -> int:
    """The time of the last change; 0 if that is still to come, which a clock that was wrong leaves behind."""
    return status.st_ctime_ns // 1000 if status.st_ctime_ns <= time.time_ns() else 0
