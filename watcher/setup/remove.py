# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have a unit take no part any more: its service gets the host's own /etc back, and nothing that was dropped is lost.

What `init` made goes; what people dropped or changed goes to a place of its own below the state directory, and is
named. What was there besides stays, unless all of it is to go. The drop directory disappears in one step, so that no
older version comes back on the way.

The drop-in with the unit's settings goes last: until the service has its own /etc back, its `Reload=` counts. Where the
daemon does not run, a service that runs keeps its stack until its next start; so it does where it does not take the
host's /etc. Each step looks for what is left to do: a second time, and after a kill, the rest is done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from watcher.control.client import Client, NotRunning
from watcher.managers.systemd.unit_facts import GENERATED, stale
from watcher.managers.systemd.unit_files import DROPIN, SUFFIX, Index, with_template
from watcher.model import Event, Outcome, shown
from watcher.mounts.process import shares_host
from watcher.mounts.table import Table
from watcher.records.schema import CallError, Failed, ServiceNotFound, ServiceStatus
from watcher.settings.config import Settings
from watcher.settings.unit_names import UNIT_PATHS
from watcher.setup import drop_in, enable, init
from watcher.setup.drop_in import Written
from watcher.text import nearest

WAIT_SEC = 120.0
"""How long a service may take to have its own /etc back: `RemoveSec=`, a check, a reload that takes its time."""
_TOLD_SEC = 10.0
"""How long a service that shows the host's /etc may take to be told so."""
_TIDY_SEC = 5.0
"""How long the daemon may take to forget its record, once the service takes no part."""
_POLL_SEC = 0.1
_HIDDEN = ".removed"
_NOT_BACK = (Outcome.REFUSED, Outcome.FAILED, Outcome.ROLLED_BACK, Outcome.NEEDS_RESTART)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        unit: its own name.
        top: the drop directory.
        entries: names in it that go.
        stays: names in it that stay.
        drop_in: path of the unit's drop-in.
        there: the drop-in, if it is one that `init` wrote.
        place: below which what was dropped is kept.
        known: its next start would get images, as the daemon's record says.
        still: what else makes it take part: paths of unit files and directories.
        meant: the unit that was probably meant, where there is none of that name.
    """

    unit: str
    top: str
    entries: tuple[str, ...]
    stays: tuple[str, ...]
    drop_in: str
    there: Written | None
    place: str
    known: bool
    still: tuple[str, ...] = ()
    meant: str = ""

    @property
    def nothing(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.entries or self.there or (self.known and self.ends))

    @property
    def ends(self) -> bool:
        """Whether the unit takes no part any more after that."""
        return not (self.stays or self.still)


@dataclass(frozen=True, slots=True)
class Removed:
    """What was done.

    Attributes:
        service: the unit's own name.
        kept: where what was dropped lies now; "": there was nothing.
        runs: on what it runs, "host" for its own /etc, "stack" for what it had, "" if it does not run.
        watched: the daemon runs.
        last: what the daemon said of it.
        ends: it takes no part any more.
    """

    service: str
    kept: str
    runs: str
    watched: bool
    last: Event | None
    ends: bool


def plan(name: str, settings: Settings, *, everything: bool = False, place: str = enable.PLACE) -> Plan:
    """Look at what there is of a unit, which itself may be gone.

    Args:
        everything: also what `init` has not made.

    Raises:
        Failed: no name of a service unit.
        OSError: something cannot be read.
    """
    index = Index(UNIT_PATHS)
    unit = index.own_name(enable.full_name(name))
    top = f"{place}/{unit}{SUFFIX}"
    path = f"{place}/{unit}.d/{drop_in.FILE}"
    there = drop_in.read(path)
    if there is not None and not there.entry:
        there = None  # a person's own
    entry = there.entry if there else f"{init.image_name('', unit)}.raw.v"
    found = init.names(top)
    entries = tuple(one for one in found if everything or one == entry)
    goes = [one for one in found if one not in entries]
    if not found and os.path.isdir(top):
        entries = ("",)  # the empty directory makes it take part, too
    return Plan(
        unit=unit,
        top=top,
        entries=entries,
        stays=tuple(goes),
        drop_in=path,
        there=there,
        place=f"{settings.state_directory}/removed",
        known=bool(init.names(f"{settings.state_directory}/units/{unit}")),
        still=tuple(_still(index, unit, top)),
        meant="" if index.unit(unit) else nearest(unit, enable.known(index)),
    )


def _still(index: Index, name: str, top: str) -> Iterator[str]:
    unit = index.unit(name, unwritten=True)
    if unit is None:
        return
    yield from (path for path in index.confext_dirs(unit) if path != top)
    if any(index.sources(unit)):
        yield unit.fragment


def carry_out(plan: Plan, settings: Settings) -> Removed:
    """Do what is planned, and wait until the service has its own /etc back.

    Raises:
        Failed: it did not work; a second try does the rest.
        OSError: likewise.
    """
    kept = _Kept(plan.place, plan.unit)
    if plan.entries:
        _move_entries(plan, kept)
    last = _given_back(plan, settings) if plan.ends else None
    if plan.there is not None:
        if plan.there.changed:
            kept.take(plan.drop_in)
        else:
            os.unlink(plan.drop_in)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(plan.drop_in))  # unless there is another in it
    if plan.there is not None or _is_loaded(plan, settings):
        enable.systemctl("daemon-reload")
    watched = enable.is_watched()
    deadline = time.monotonic() + _TIDY_SEC
    record = f"{settings.state_directory}/units/{plan.unit}"
    while watched and plan.ends and os.path.lexists(record) and time.monotonic() < deadline:
        time.sleep(_POLL_SEC)
    return Removed(plan.unit, kept.path, _runs_on(plan.unit), watched, last, plan.ends)


class _Kept:
    """Where what people dropped or wrote lies from now on; made when it is needed, for root alone."""

    def __init__(self, place: str, unit: str) -> None:
        self._top = place
        self._unit = unit
        self.path = ""

    def take(self, path: str) -> None:
        if not self.path:
            os.makedirs(self._top, 0o700, exist_ok=True)
            when = time.strftime("%Y-%m-%d_%H:%M:%S")
            self.path = tempfile.mkdtemp(prefix=f"{self._unit}_{when}_", dir=self._top)
        shutil.move(path, f"{self.path}/{os.path.basename(path).lstrip('.').removesuffix(_HIDDEN)}")


def _move_entries(plan: Plan, kept: _Kept) -> None:
    """Each in one step out of sight, and then to its place, which may be on another file system."""
    if not plan.stays:
        hidden = f"{os.path.dirname(plan.top)}/.{os.path.basename(plan.top)}{_HIDDEN}"
        if os.path.lexists(hidden):  # of a time before, which was killed
            kept.take(hidden)
        os.rename(plan.top, hidden)
        if os.path.islink(hidden) or os.listdir(hidden):
            kept.take(hidden)
        else:
            os.rmdir(hidden)
        return
    for name in plan.entries:
        hidden = f"{plan.top}/.{name}{_HIDDEN}"
        os.rename(f"{plan.top}/{name}", hidden)
        kept.take(hidden)


def _given_back(plan: Plan, settings: Settings) -> Event | None:
    """Have the daemon forget what it keeps of the unit, and wait until it does; what it said of it last."""
    patience = WAIT_SEC + settings.remove_usec / 1_000_000
    try:
        with Client(settings.runtime_directory, patience) as client:
            left = _left(client, plan.unit)
            before = {one.service: _newest(client, one.service) for one in left}
            for one in left:
                if one.quarantined or one.pinned is not None:  # that would keep the record
                    with contextlib.suppress(ServiceNotFound):
                        client.forget(one.service)
            seen: dict[str, float] = {}
            while any(not _is_over(client, one, before, seen) for one in _left(client, plan.unit)):
                time.sleep(_POLL_SEC)
            after = {name: _newest(client, name) for name in before}
    except NotRunning:
        return None
    except CallError as error:
        raise Failed(f"{shown(plan.unit)}: its own /etc is not back yet: {error}") from error
    return next((event for name, event in after.items() if event != before[name]), None)


def _left(client: Client, unit: str) -> list[ServiceStatus]:
    """The services that the daemon knows by a unit: itself, and the instances of a template."""
    services = (one for one in client.status() if one.manager == "systemd")
    return [one for one in services if unit in with_template(one.service)]


def _is_over(
    client: Client, status: ServiceStatus, before: Mapping[str, Event | None], seen: dict[str, float]
) -> bool:
    """Whether a service has the host's /etc, and was told; or will not have it by itself.

    The daemon knows the unit until systemd has read its files again, which comes last.

    Args:
        before: what was said of each service before.
        seen: gets since when each shows nothing of its images.
    """
    event = _newest(client, status.service)
    news = event is not None and event != before.get(status.service)
    if status.layers or status.accepted:
        return news and event is not None and event.outcome in _NOT_BACK
    since = seen.setdefault(status.service, time.monotonic())
    with contextlib.suppress(FileNotFoundError):
        # Where nothing had to be done, nothing is said.
        waited = time.monotonic() - since > _TOLD_SEC
        return news or waited or status.pid is None or shares_host(status.pid)
    return True


def _newest(client: Client, unit: str) -> Event | None:
    """What came of a service last."""
    events = client.history(unit, 10)
    return next((event for event in events if event.outcome is not Outcome.REQUESTED), None)


def _is_loaded(plan: Plan, settings: Settings) -> bool:
    """Whether systemd has loaded a drop-in of the generator's that is not to be there any more."""
    if plan.ends:
        return os.path.exists(f"{GENERATED}/{plan.unit}.d/{DROPIN}")
    return bool(stale(Index(UNIT_PATHS), [plan.unit], settings.state_directory))


def _runs_on(unit: str) -> str:
    """What a unit runs on now, see `Removed`."""
    pid = enable.systemctl("show", "--property=MainPID", "--value", "--", unit, check=False)
    if not pid.isdecimal() or pid == "0":
        return ""
    try:
        if shares_host(int(pid)):
            return "host"
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounted = Table(file.read()).mounted()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return ""
    return "stack" if mounted.overlay and mounted.layers != () else "host"
