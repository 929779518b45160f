# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-in of one unit, by which it starts on its slots: the generator writes it, the daemon expects it.

Standard library only, for the generator; modules that are seldom needed are imported where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from watcher.managers.systemd import drop_ins, held_starts, sandbox_settings, unit_files
from watcher.managers.systemd.unit_files import Index, Unit
from watcher.resolve import sidecars
from watcher.settings import device_mapper, syntax, unit_names, values
from watcher.text import Kind, shown

if TYPE_CHECKING:
    from watcher.model import Entry

WATCHER = "confext-watcher.service"
MOUNT_OPTIONS = "ro,x-systemd.relax-extension-release-check"
"""Of a slot. Its name is not the image's. Without "ro" systemd has the kernel write to an ext4 or btrfs that it mounts
for a unit, read-only as the overlay is: to our copy, which another mount may read."""

EMPTY_SLOT = ".empty"
"""Listed if there is nothing else to list, so that the unit gets a namespace. It never exists: no slot begins with a
dot."""

# The watcher needs these, or starts after them: if one waited for the watcher, that would be a cycle.
_BEFORE_US = frozenset(
    {
        WATCHER,
        "dbus.service",
        "dbus-broker.service",
        "dbus.socket",
        "local-fs-pre.target",
        "local-fs.target",
        "sysinit.target",
        "sockets.target",
        "basic.target",
    }
)

AS_IT_IS = "root=unprotected+absent:usr=unprotected+absent:=unused+absent"
"""What systemd takes for a service's images if nothing is said, without verity, signatures and encryption."""


class Forgotten(Exception):
    """With images the unit would lose some of its sandbox, see sandbox_settings.py: `str()` says what."""


class Listed(NamedTuple):
    """One layer in the drop-in: a slot, or (`slot` "") a sysext of the unit by its candidates, the best one first."""

    kind: Kind
    slot: str = ""
    paths: tuple[str, ...] = ()
    options: str = ""
    optional: bool = True


class Recorded(NamedTuple):
    """What the drop-in needs of a unit's record (`records/state.py`).

    Attributes:
        slots: of the last accepted stack, bottom to top, with or without a layer; None if no stack was ever accepted.
        sysexts: paths that the unit declares, and in which the daemon has found sysexts.
        on_trial: the next start may be on a stack that has to prove itself: it has none yet, or that one.
    """

    slots: list[tuple[str, Kind]] | None = None
    sysexts: frozenset[str] = frozenset()
    on_trial: bool = True


def text(
    index: Index, unit: Unit, state_directory: str, complain: Callable[[str], None] = lambda text: None
) -> str:
    """The drop-in of one unit.

    Raises:
        Forgotten: it must not be given images. (A unit that declares images itself has lost as much by them already;
            with a drop-in it has accepted ones at least.)
    """
    parsed = index.relevant(unit)
    kept = sandbox_settings.repair(parsed.assignments, index.children)
    if kept.lost and not _declares(parsed):
        raise Forgotten(f"systemd would forget {shown(kept.lost[0])}")
    record = read(state_directory, unit.name, complain)
    listed = _listed(index, unit, parsed, record)
    if kept.needed and _is_known_empty(state_directory, unit.name):
        # Its sandbox gives it a namespace anyway, and stays whole until there is a layer to mount.
        listed = [item for item in listed if not item.slot]
    elif not listed:
        listed = [Listed(Kind.IMAGE, EMPTY_SLOT)]
    drop_in = drop_ins.DropIn(f"By {WATCHER}: this unit starts on its last accepted stack.")
    if not _starts_before_us(unit.names, parsed):
        _assign_order(drop_in, state_directory)
    slots = f"{state_directory}/units/{unit.name}"
    left_out = _assign_layers(drop_in, slots, listed)
    if listed:
        left_out += _assign_again(drop_in, kept.again)
    if any(item.slot not in ("", EMPTY_SLOT) for item in listed):
        left_out += _assign_configuration(drop_in, parsed)
    if any(item.kind is Kind.IMAGE for item in listed) and _restricts_devices(parsed):
        for device in ("/dev/loop-control", "block-loop"):
            drop_in.assign("Service", "DeviceAllow", drop_ins.token(device), drop_ins.token("rw"))
    if any(item.kind is Kind.IMAGE for item in listed) and _cannot_verify(parsed) and not has_sidecars(slots):
        drop_in.assign("Service", "ExtensionImagePolicy", drop_ins.own(AS_IT_IS))
    if record.on_trial and _may_hold_starts(unit, parsed):
        drop_in.assign("Service", "ExecStopPost", drop_ins.own(held_starts.COMMAND))
    for what in left_out:
        complain(f"{shown(unit.name)}: left out: {what}")
    return str(drop_in)


def _may_hold_starts(unit: Unit, parsed: syntax.Parsed) -> bool:
    """Whether it has a stack of its own, and the host's shell is there for what waits (`held_starts.py`)."""
    roots = (syntax.last(parsed.assignments, "Service", key) for key in ("RootDirectory", "RootImage"))
    return not unit_names.is_template(unit.name) and not any(root and root.value for root in roots)


def _declares(parsed: syntax.Parsed) -> bool:
    keys = ("ExtensionImages", "ExtensionDirectories")
    return any(syntax.assigned(parsed.assignments, "Service", key) for key in keys)


def _is_known_empty(state_directory: str, unit: str) -> bool:
    """Whether the unit has no stack, and the state directory is there to say so."""
    try:
        return all(name.startswith(".") for name in os.listdir(f"{state_directory}/units/{unit}"))
    except OSError:
        return os.path.isdir(state_directory)


def _assign_order(drop_in: drop_ins.DropIn, state_directory: str) -> None:
    for key in ("Wants", "After"):
        drop_in.assign("Unit", key, drop_ins.token(WATCHER))
    drop_in.assign("Unit", "RequiresMountsFor", drop_ins.path(state_directory))


def _assign_layers(drop_in: drop_ins.DropIn, slots: str, listed: Sequence[Listed]) -> list[str]:
    """Reset what the unit declares and name its layers; returns what had to be left out, with the reasons.

    Args:
        slots: the directory with the unit's slots. It has the unit's name in it, not %n: an instance without slots of
            its own uses those of its template.
    """
    left_out = []
    for kind, key in ((Kind.IMAGE, "ExtensionImages"), (Kind.DIRECTORY, "ExtensionDirectories")):
        drop_in.assign("Service", key)
        for item in listed:
            if item.kind is kind:
                left_out += _assign_layer(drop_in, key, slots, item)
    return left_out


def _assign_layer(drop_in: drop_ins.DropIn, key: str, slots: str, item: Listed) -> list[str]:
    """Name the first of its paths that can be written; returns the first that cannot, if it comes before that."""
    left_out: list[str] = []
    for path in (f"{slots}/{item.slot}",) if item.slot else item.paths:
        try:
            if item.kind is Kind.IMAGE:
                word = drop_ins.image(
                    path, MOUNT_OPTIONS if item.slot else item.options, optional=item.optional
                )
            else:
                word = drop_ins.path(path, optional=item.optional)
            drop_in.assign("Service", key, word)
        except drop_ins.Unwritable as error:
            left_out = left_out or [f"{shown(path)}: {error}"]
        else:
            break
    return left_out


def _assign_again(drop_in: drop_ins.DropIn, again: Iterable[sandbox_settings.Again]) -> list[str]:
    """Say again what systemd would forget of the unit's sandbox; returns what had to be left out, with the reasons."""
    left_out = []
    for key, paths, options in again:
        try:
            drop_in.assign("Service", key, drop_ins.path(*paths, options=options, optional=True))
        except drop_ins.Unwritable as error:
            left_out.append(f"{key}= for {shown(paths[-1])}: {error}")
    return left_out


def _assign_configuration(drop_in: drop_ins.DropIn, parsed: syntax.Parsed) -> list[str]:
    """Keep `ConfigurationDirectory=` from hiding what an image brings; returns what is left out, with the reason.

    In a mount namespace systemd mounts the host's own directory there, on the overlay (257). The host's is in the
    overlay anyway. What is lost is that systemd makes it where it is missing, and gives it the unit's mode.
    """
    assigned = syntax.assigned(parsed.assignments, "Service", "ConfigurationDirectory")
    names = [name for assignment in assigned for name in assignment.value.split()]
    if not names:
        return []
    try:
        variable = drop_ins.variable("CONFIGURATION_DIRECTORY", [f"/etc/{name}" for name in names])
    except drop_ins.Unwritable as error:
        return [f"what images have in ConfigurationDirectory= stays hidden: {error}"]
    drop_in.assign("Service", "ConfigurationDirectory")
    drop_in.assign("Service", "Environment", variable)
    return []


def _listed(
    index: Index,
    unit: Unit,
    parsed: syntax.Parsed,
    record: Recorded,
) -> list[Listed]:
    """The slots of the last accepted stack, and the sysexts that the unit declares."""
    slots = record.slots
    known = record.sysexts if _declares(parsed) else frozenset()
    trees = (path for path, _ in index.sources(unit).directories)
    if slots is not None and not known and not any(map(_is_sysext_tree, trees)):
        return [Listed(kind, slot) for slot, kind in slots]
    declared, _remarks = unit_files.declared(unit, parsed, index.search_path)
    passed = [
        listed
        for entry in (*declared.images, *declared.directories)
        if _is_sysext(entry, known) and (listed := _list_sysext(entry))
    ]
    if slots is None:
        from watcher.model import Declared
        from watcher.resolve import scan

        there = Declared(declared.images, declared.directories, index.confext_dirs(unit))
        slots = [
            (entry.slot, entry.kind)
            for entry in scan.entries(there)
            if not (entry.declared and _is_sysext(entry, known))
        ]
    return [*(Listed(kind, slot) for slot, kind in slots), *passed]


def read(state_directory: str, unit: str, complain: Callable[[str], None] = lambda text: None) -> Recorded:
    """A unit's record. To import what knows all of it would take longer than all here."""
    path = f"{state_directory}/units/{unit}/.state.json"
    try:
        content = syntax.read(path)
    except FileNotFoundError:
        return Recorded()
    except OSError as error:
        complain(f"{path}: cannot be read, what lies in the directories is listed: {error.strerror}")
        return Recorded()
    import json

    try:
        record = json.loads(content)
        accepted, trial = record["accepted"], record.get("trial")
        slots = [(entry["slot"], Kind(entry["kind"])) for entry in accepted["entries"]]
        return Recorded(
            slots if accepted["when"] else None,
            frozenset(record["sysexts"]),
            not accepted["stack"]["layers"] or (trial is not None and trial.get("verdict") is None),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        complain(f"{path}: not a record of a service, what lies in the directories is listed: {error!r}")
        return Recorded()


def only_holds_a_record(state_directory: str, unit: str) -> bool:
    """Whether a unit never had a stack: what is below `units/` holds nothing but its record."""
    try:
        return os.readlink(f"{state_directory}/units/{unit}").endswith("-empty") and (
            read(state_directory, unit).slots is None
        )
    except OSError:
        return False


def _is_sysext_tree(path: str) -> bool:
    """Whether a directory says itself that it is no confext. The daemon looks into those in `.v/` form."""
    return not os.path.isdir(f"{path}/etc/extension-release.d") and os.path.isdir(
        f"{path}/usr/lib/extension-release.d"
    )


def _is_sysext(entry: Entry, known: frozenset[str]) -> bool:
    return entry.path in known or (entry.kind is Kind.DIRECTORY and _is_sysext_tree(entry.path))


def _list_sysext(entry: Entry) -> Listed | None:
    """A sysext by its candidates at this moment, never in `.v/` form: else systemd's refresh would run."""
    from watcher.model import Declared
    from watcher.resolve import scan

    images, directories = ((entry,), ()) if entry.kind is Kind.IMAGE else ((), (entry,))
    (pick,) = scan.look(Declared(images, directories)).picks
    paths = tuple(candidate.path for candidate in pick.candidates)
    return Listed(entry.kind, "", paths, entry.options, entry.optional) if paths else None


def _starts_before_us(names: Iterable[str], parsed: syntax.Parsed) -> bool:
    if any(name in _BEFORE_US or name.startswith("systemd-") for name in names):
        return True
    if not values.flag(syntax.last(parsed.assignments, "Unit", "DefaultDependencies"), default=True):
        return True
    before = syntax.assigned(parsed.assignments, "Unit", "Before")
    return any(word in _BEFORE_US for assignment in before for word in assignment.value.split())


def _cannot_verify(parsed: syntax.Parsed) -> bool:
    """Whether systemd would fail to set up verity at the unit's start, which it need not: its slots are verified.

    Without a device mapper that fails with 226/NAMESPACE. A policy that the unit has itself stays: see startable.py.
    """
    own = syntax.last(parsed.assignments, "Service", "ExtensionImagePolicy")
    return (own is None or not own.value) and not device_mapper.is_there()


def has_sidecars(slots: str) -> bool:
    """Whether something lies beside a slot by which systemd verifies it: it must, and refuses the slot if it may not.

    The daemon has put it there, so there was a device mapper. At boot that may come after the generator has run.
    """
    try:
        return any(map(sidecars.suffix, os.listdir(slots)))
    except OSError:
        return False


def _restricts_devices(parsed: syntax.Parsed) -> bool:
    """Whether the unit keeps its processes from devices, and by that systemd from the loop devices of its images.

    systemd makes an exception for `RootImage=` but not for `ExtensionImages=` (257 and 262): with `PrivateDevices=` and
    an image no process of the unit can be started (226/NAMESPACE). If the unit restricts nothing, `DeviceAllow=` must
    not be set: it would be the first restriction.
    """
    private = syntax.last(parsed.assignments, "Service", "PrivateDevices")
    policy = syntax.last(parsed.assignments, "Service", "DevicePolicy")
    return (
        values.flag(private, default=False)
        or (policy is not None and policy.value in ("closed", "strict"))
        or bool(syntax.assigned(parsed.assignments, "Service", "DeviceAllow"))
    )
