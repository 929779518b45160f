# SPDX-License-Identifier: LGPL-2.1-or-later
"""The services that take part: their settings, who may drop for them, whether they start on what was accepted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress

from watcher.control import status
from watcher.doctor.findings import Examination, Finding, error, ok, warning
from watcher.managers.base import trust_of
from watcher.managers.registration import registered, registrations
from watcher.managers.systemd import unit_facts
from watcher.managers.systemd.unit_files import Index
from watcher.model import Busy, Declared, Remark, printable, shown
from watcher.resolve import scan
from watcher.resolve.strict_modes import StrictModes
from watcher.resolve.trust import Trust
from watcher.settings.config import Settings
from watcher.watch.lease import Lease

_GENERATOR = "confext-watcher-generator"
# systemd.generator(7), the first counts.
_GENERATORS = (
    "/run/systemd/system-generators",
    "/etc/systemd/system-generators",
    "/usr/local/lib/systemd/system-generators",
    "/usr/lib/systemd/system-generators",
)


def _generator(settings: Settings) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        return
    helps = "reinstall confext-watcher, and systemctl daemon-reload"
    paths = (f"{directory}/{_GENERATOR}" for directory in _GENERATORS)
    path = next((path for path in paths if os.path.lexists(path)), None)
    if path is None:
        yield error("generator", "is not installed: units do not start on what was accepted", helps)
    elif not os.path.isfile(path) or not os.access(path, os.X_OK):
        yield error("generator", f"{path} is masked, or cannot be executed", helps)
    else:
        yield ok("generator", path)


def _units(settings: Settings) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        return
    index = Index()
    slots = unit_facts.units_with_slots(settings.state_directory)
    facts = unit_facts.all_facts(index, slots)
    complaints: dict[str, list[str]] = {}
    stale = unit_facts.stale(index, facts, settings.state_directory, complaints=complaints)
    for name, one in sorted(facts.items()):
        if not one.settings.enabled:
            continue
        found = [*_remarks(name, one.remarks, "mend that line: it counts as soon as the file is written")]
        if name in stale:
            text = "systemd has not loaded its drop-in: it would not start on what was accepted"
            found.append(error(name, text, "systemctl daemon-reload"))
        found += [warning(name, text, "see confext-watcher.service(8)") for text in complaints.get(name, ())]
        found += _directories(name, one.declared, trust_of(one.settings, "systemd"))
        if not found:
            check = (
                "checked before it is used" if one.settings.check else "no Check= is set, see watcher.conf(5)"
            )
            found.append(ok(name, f"what is dropped is looked at; {check}"))
        yield from found


def _standalone(settings: Settings) -> Iterator[Finding]:
    for name in registrations(settings.runtime_directory):
        with suppress(ValueError):
            one = registered(settings.runtime_directory, name)
            if one is not None:
                found = [*_directories(name, one.declared, trust_of(one.own_settings, "standalone"))]
                yield from found or [ok(name, "what is dropped is looked at")]


def _directories(name: str, declared: Declared, trust: Trust) -> Iterator[Finding]:
    """Whether what lies there would be looked at, and whether the end of an upload can be known."""
    with StrictModes(trust) as modes:
        look = scan.look(declared, modes=modes)
        yield from _remarks(name, (*modes.remarks, *look.remarks), "the line says what")
    for picks in look.picks:
        if picks.unsafe is not None:
            text = f"{shown(picks.entry.path)}: {picks.unsafe}"
            yield warning(name, text, "do that, or trust the user by TrustedUsers= in its [X-Confext]")
    for path in dict.fromkeys(candidate.path for picks in look.picks for candidate in picks.candidates):
        if _without_leases(path):
            where = shown(os.path.dirname(path))
            text = f"{where} is on a file system without leases: that an upload is over, only silence tells"
            yield warning(name, text, "upload by rename, or raise SettleSec= in its [X-Confext]")
            return


def _remarks(name: str, remarks: Sequence[Remark], helps: str) -> Iterator[Finding]:
    for remark in remarks:
        if remark.level == "warning":
            yield warning(name, f"{shown(remark.path)}: {remark.text}", helps)


def _without_leases(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if os.geteuid() != 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        with Lease(fd) as lease:
            return not lease.exact
    except Busy:
        return False  # somebody writes to it, which the kernel could tell
    finally:
        os.close(fd)


def _states(settings: Settings) -> Iterator[Finding]:
    """What each service waits for a person to do."""
    for one in status.without_daemon(settings):
        lets_in = f"confext-watcher rollback --forget {shown(one.service)}"
        for content in one.quarantined:
            what = shown(os.path.basename(content.source)) or content.digest[:12]
            yield warning(one.service, f"{what} is kept out: {printable(content.reason)}", lets_in)
        if one.pinned is not None:
            yield warning(one.service, "stays by hand on the stack that it has, whatever is dropped", lets_in)
        if one.state == "needs-restart":
            text = "was started before it took part, and has none of its images yet"
            yield warning(one.service, text, f"systemctl restart {shown(one.service)}")


EXAMINATIONS: Sequence[tuple[str, Examination]] = (
    ("generator", _generator),
    ("units", _units),
    ("services", _standalone),
    ("services", _states),
)
