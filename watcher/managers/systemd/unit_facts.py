# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the files of units that take part say, and whether systemd has loaded the drop-ins that they should have.

Every function here blocks: call it in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from watcher.managers.base import NoShadow, Service
from watcher.managers.systemd import drop_ins, sandbox_settings, unit_drop_in, unit_files, unit_watch
from watcher.managers.systemd.unit_files import DROPIN, Index, Unit
from watcher.model import Declared, Kind, Remark, Setting, shown
from watcher.mounts.process import Process
from watcher.records.state import Damaged, decoded
from watcher.settings import config, image_policy, syntax, unit_names
from watcher.settings.config import ServiceSettings

GENERATED = "/run/systemd/generator"
_HINT = "say it in a drop-in below /etc/systemd/system"


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """A unit as its files say.

    Attributes:
        unit: its files.
        state: what they were when they were read, see `unit_watch.state()`.
        root: `RootDirectory=`, "/" without one.
        root_image: its root is an image (`RootImage=`), which only its own processes have mounted.
        policy: `ExtensionImagePolicy=`, None without one.
    """

    unit: Unit
    state: unit_watch.State
    declared: Declared
    settings: ServiceSettings
    root: str = "/"
    root_image: bool = False
    policy: Setting | None = None
    remarks: tuple[Remark, ...] = ()

    @property
    def name(self) -> str:
        return self.unit.name

    def is_outdated(self, index: Index, state_directory: str) -> bool:
        """Whether its files are others than those that were read; or nothing is left of what it took part for.

        Args:
            index: all files as they were read last.
        """
        if unit_watch.state(index.search_path, self.unit) != self.state:
            return True
        return not index.takes_part(self.unit) and not _has_stake(f"{state_directory}/units/{self.name}")

    def fields(self, main: Process | None) -> dict[str, Any]:
        """What a `Service` has from here.

        Args:
            main: its main process.
        """
        root: str | None = self.root
        if self.root_image:
            root = f"/proc/{main.pid}/root" if main else None
        aliases = self.unit.names[1:]
        of_files = {"declared": self.declared, "settings": self.settings, "unit_policy": self.policy}
        return {**of_files, "root": root, "aliases": aliases}


def units_with_slots(state_directory: str) -> dict[str, bool]:
    """Names of the units that have slots, and whether a slot leads to a layer, or there is still to be said that none
    does any more: from its acceptance on, the empty stack is put in place, and the service is told."""
    try:
        names = os.listdir(f"{state_directory}/units")
    except FileNotFoundError:
        return {}
    return {
        name: _has_stake(f"{state_directory}/units/{name}") for name in names if unit_files.is_service(name)
    }


def _has_stake(path: str) -> bool:
    return _has_layers(path) or _is_unsaid(path)


def _has_layers(path: str) -> bool:
    try:
        return any(not name.startswith(".") for name in os.listdir(path))
    except FileNotFoundError:
        return False


def _is_unsaid(path: str) -> bool:
    """Whether no outcome says yet what became of the accepted stack."""
    try:
        with open(f"{path}/.state.json", "rb") as file:
            state = decoded(file.read(), path)
    except (OSError, Damaged):
        return False  # the next round of it says so
    return state.replaced is not None or state.undoing is not None


def all_facts(index: Index, known: Mapping[str, bool]) -> dict[str, UnitFacts]:
    """All units that take part, also those with `Enabled=no`.

    Args:
        known: see `units_with_slots()`. A unit with layers takes part even if no file says so any more, until its
            running process has its own `/etc` back.
    """
    found = index.services(known)
    for name, has_layers in known.items():
        unit = index.unit(name) if has_layers and name not in found else None
        if unit is not None and unit.name == name and not unit_files.is_portable(unit.fragment):
            found[name] = unit
    return {name: _facts_of(index, unit) for name, unit in found.items()}


def _facts_of(index: Index, unit: Unit) -> UnitFacts:
    state = unit_watch.state(index.search_path, unit)
    parsed = index.parse(unit)
    declared, remarks = unit_files.declared(unit, parsed, index.search_path)
    expand = unit_names.Specifiers(unit.name, unit.fragment).expand
    settings, more = settings_of(index, unit)
    image = syntax.last(parsed.assignments, "Service", "RootImage")
    return UnitFacts(
        unit=unit,
        state=state,
        declared=declared,
        settings=settings,
        root=_root(parsed.assignments, expand),
        root_image=image is not None,
        policy=policy_of(index, unit),
        remarks=(*remarks, *more, *_unknown_in_time(index, unit), *_policy_remarks(parsed)),
    )


def settings_of(index: Index, unit: Unit) -> tuple[ServiceSettings, tuple[Remark, ...]]:
    """`[X-Confext]` of a unit, and what is wrong with it."""
    expand = unit_names.Specifiers(unit.name, unit.fragment).expand
    return config.service_settings(index.parse(unit).assignments, expand)


def policy_of(index: Index, unit: Unit) -> Setting | None:
    """`ExtensionImagePolicy=` of a unit, None without one."""
    found = syntax.last(index.parse(unit).assignments, "Service", image_policy.UNIT_KEY)
    return config.as_written(found) if found is not None else None


def _policy_remarks(parsed: syntax.Parsed) -> tuple[Remark, ...]:
    return config.policy_remarks(syntax.last(parsed.assignments, "Service", image_policy.UNIT_KEY))


def _unknown_in_time(index: Index, unit: Unit) -> Iterator[Remark]:
    """What our generator cannot know of a unit that another generator makes, see `unit_files.as_generators_see()`."""
    known = unit_files.as_generators_see(unit)
    if index.sources(unit) != index.sources(known):
        yield Remark("warning", unit.fragment, f"a generator's: images are declared too late here, {_HINT}")
    sandboxes = (
        sandbox_settings.repair(index.relevant(each).assignments, index.children) for each in (unit, known)
    )
    if len(set(sandboxes)) > 1:
        what = "with a stack systemd forgets what it says here of /usr, /opt and /etc"
        yield Remark("warning", unit.fragment, f"a generator's: {what}, {_HINT}")


def _root(assignments: Sequence[syntax.Assignment], expand: Callable[[str], str]) -> str:
    directory = syntax.last(assignments, "Service", "RootDirectory")
    if directory is None:
        return "/"
    try:
        path = expand(directory.value.removeprefix("-"))
    except ValueError:
        return "/"  # systemd refuses to load such a unit
    return os.path.normpath(path) if path.startswith("/") else "/"


def stale(
    index: Index,
    names: Iterable[str],
    state_directory: str,
    generated: str = GENERATED,
    complaints: dict[str, list[str]] | None = None,
) -> dict[str, str]:
    """Units that would start on something else than their slots, with the drop-in that each should have.

    What the generator wrote, which systemd has loaded, is compared with what it would write now. systemd ignores a slot
    that is listed and missing, and so does this: the first version of an entry makes no unit stale.

    Args:
        complaints: gets, for each unit, what its drop-in cannot say. The generator prints this too, but systemd does
            not keep what a generator prints.
    """
    found = {}
    said = {} if complaints is None else complaints
    for name in names:
        loaded_unit = index.unit(name)
        unit = unit_files.as_generators_see(loaded_unit) if loaded_unit else None
        if unit is None or not index.takes_part(unit):
            continue
        if unit_names.UnitName(name).instance and not os.path.lexists(f"{state_directory}/units/{name}"):
            continue  # an instance without slots has the drop-in of its template
        try:
            wanted = unit_drop_in.text(index, unit, state_directory, said.setdefault(name, []).append)
        except (unit_drop_in.Forgotten, drop_ins.Unwritable):
            continue  # it has no drop-in
        loaded = _read(f"{generated}/{name}.d/{DROPIN}")
        if loaded is None or not _equivalent(loaded, wanted, state_directory, name):
            found[name] = wanted
    return found


def said_again(index: Index, name: str) -> tuple[sandbox_settings.Again, ...]:
    """What a drop-in with images says again of a unit's sandbox.

    Raises:
        NoShadow: with images it would lose some of that.
    """
    unit = index.unit(name)
    if unit is None:
        raise NoShadow("it has no unit file")
    kept = sandbox_settings.repair(index.relevant(unit).assignments, index.children)
    if kept.lost:
        raise NoShadow(f"with images systemd would forget {shown(kept.lost[0])}")
    return kept.again


def started_as(name: str, services: Iterable[Service]) -> str:
    """Which unit's next start is meant by a unit's name: of a template, that of an instance which runs.

    Raises:
        NoShadow: there is none.
    """
    if not unit_names.is_template(name):
        return name
    for one in services:
        if one.main is not None and unit_names.UnitName(one.name).template == name:
            return one.name
    raise NoShadow("it is a template, and no instance of it runs")


class Listed(NamedTuple):
    """What a unit's drop-in may list beside what its files say: as long as both are the same, so is the drop-in.

    Attributes:
        slots: of its accepted stack, with their kinds; None: it has none, and the drop-in lists what lies in the
            directories.
        there: names of the slots that have a layer.
        sysexts: paths; which file there is the pick is another matter.
    """

    slots: tuple[tuple[str, Kind], ...] | None
    there: frozenset[str]
    sysexts: frozenset[str]

    @property
    def settled(self) -> bool:
        """Whether it says all."""
        return self.slots is not None and not self.sysexts


def listed(state_directory: str, unit: str) -> Listed:
    """What the drop-in of a unit lists now. Quick: two small looks at the state directory."""
    record = unit_drop_in.read(state_directory, unit)
    try:
        there = frozenset(os.listdir(f"{state_directory}/units/{unit}"))
    except OSError:
        there = frozenset()
    return Listed(None if record.slots is None else tuple(record.slots), there, record.sysexts)


def _equivalent(loaded: str, wanted: str, state_directory: str, name: str) -> bool:
    before, after = _layers(loaded), _layers(wanted)
    if before and not after:
        return False  # a missing slot, too, costs the unit some of its sandbox: see sandbox_settings.py
    if unit_drop_in.AS_IT_IS in wanted and unit_drop_in.AS_IT_IS not in loaded:
        return False  # it could not start on an image with verity data
    slots = f"{state_directory}/units/"
    must_not_verify = unit_drop_in.AS_IT_IS in loaded and unit_drop_in.AS_IT_IS not in wanted
    if must_not_verify and unit_drop_in.has_sidecars(f"{slots}{name}"):
        return False  # what lies beside a slot is not passed over

    def there(layer: tuple[str, str, bool]) -> bool:
        return not layer[0].startswith(slots) or os.path.lexists(layer[0])

    return list(filter(there, before)) == list(filter(there, after))


def _layers(text: str) -> list[tuple[str, str, bool]]:
    """What a drop-in of ours lists, images first: (path, options, optional)."""
    assignments = syntax.parse(text, "").assignments
    images, directories = unit_files.sources_in(assignments, lambda path: path.replace("%%", "%"))
    return [*images, *((path, "", optional) for path, optional in directories)]


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except FileNotFoundError:
        return None
