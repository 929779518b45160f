# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Plan`: what a look now would change for a service, and what its own check says of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import trio

from watcher.control.report import report
from watcher.managers.base import Service
from watcher.model import KeptOut, Later, Remark, Stack, shown
from watcher.records.schema import PlannedChange, ServiceStatus
from watcher.rounds.choose import Passed
from watcher.rounds.decide import decide
from watcher.rounds.desired import Desired
from watcher.rounds.round import Rounds
from watcher.watch.offload import Unanswered


async def plan(
    rounds: Rounds, service: Service, now: ServiceStatus, *, debug: bool, check: bool
) -> PlannedChange:
    """What a look would change.

    Args:
        now: what the service runs on.
        debug: with a report.
        check: with what `Check=` says of it.
    """
    before = Stack(now.layers)
    try:
        facts, desired = await rounds.glance(service)
    except Unanswered as error:  # it stays on what it has
        return _planned(service, before, before, [Remark("warning", service.name, str(error))])
    if now.state != "running":
        before = facts.accepted
    remarks = remarks_of(desired)
    if facts.stays:
        new = [layer for layer in facts.wanted.layers if layer.digest not in before.digests]
        remarks += [Remark("info", layer.source, facts.stays) for layer in new]
    remarks += [_not_used(service.name, one) for one in desired.passed]
    if facts.pinned is not None and facts.wanted.id != facts.pinned.id:
        remarks.append(Remark("info", service.name, f"it stays there by hand; {_lets_in(service.name)}"))
    planned = _planned(service, before, facts.target, remarks)
    if check:
        planned = await _checked(rounds, planned, service)
    if debug:
        text = await trio.to_thread.run_sync(report, service.name, facts, decide(facts))
        planned = replace(planned, report=text)
    return planned


def _not_used(service: str, passed: Passed) -> Remark:
    helps = f"; {_lets_in(service)}" if isinstance(passed.reason, KeptOut) else ""
    return Remark("warning", passed.candidate.path, f"{passed.reason}{helps}")


def _lets_in(service: str) -> str:
    return f"`confext-watcher rollback --forget {shown(service)}` lets it have what is newest"


async def _checked(rounds: Rounds, planned: PlannedChange, service: Service) -> PlannedChange:
    if not service.settings.check:
        why = Remark("info", service.name, "it has no Check=, see watcher.conf(5)")
        return replace(planned, remarks=(*planned.remarks, why))
    try:
        return replace(planned, check=await rounds.try_check(service))
    except Later as error:
        why = Remark("warning", service.name, f"its check could not be run: {error}")
        return replace(planned, remarks=(*planned.remarks, why))


def remarks_of(desired: Desired) -> list[Remark]:
    return [remark for remark in desired.look.remarks if remark.level != "debug"]


def _planned(service: Service, before: Stack, after: Stack, remarks: Sequence[Remark]) -> PlannedChange:
    changes = before.id != after.id
    return PlannedChange(
        service=service.name,
        changes=changes,
        stack=before.id,
        wanted=after.id,
        layers=before.layers,
        wanted_layers=after.layers,
        reload=service.settings.reload if changes else "",
        remarks=tuple(remarks),
    )
