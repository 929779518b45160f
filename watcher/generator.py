# SPDX-License-Identifier: LGPL-2.1-or-later
"""The systemd generator, systemd.generator(7): a drop-in for each unit that takes part, so that it starts on its slots.

Without it systemd would pick by itself, for each process that it starts: images that are half uploaded, or that were
refused. The drop-in resets what the unit declares and names links that only ever lead to the last accepted stack.

What it lists is what was accepted last, in the order in which it was; for a unit of which nothing ever was, what lies
there: the slots are not there yet and will be ignored, but the service gets a mount namespace of its own for them, so
that the first stack can be put into it without a restart.

Runs at boot and at every daemon-reload, while systemd waits, perhaps before `/var` is mounted: standard library only,
and nothing that is wrong with one unit keeps another from its drop-in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import dropin, hierarchies, unitfile, units
from .basics import Kind, shown
from .units import DROPIN, Index, Unit

if TYPE_CHECKING:
    from .model import Entry

STATE_DIRECTORY = "/var/lib/confext-watcher"
WATCHER = "confext-watcher.service"
RELAX = "x-systemd.relax-extension-release-check"

EMPTY_SLOT = ".empty"
"""Listed where there is nothing to list, never there: for the sake of the namespace. No slot begins with a dot."""

# What the watcher itself needs or is ordered after: to wait for it would be a cycle.
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


class Forgotten(Exception):
    """With images a unit would lose some of its sandbox for good, see `watcher.hierarchies`: `str()` says what."""


class Listed(NamedTuple):
    """One layer in the drop-in: a slot, or a sysext passed through (`slot` ""), its best candidate first."""

    kind: Kind
    slot: str = ""
    paths: tuple[str, ...] = ()
    options: str = ""
    optional: bool = True


def main(argv: Sequence[str] = tuple(sys.argv), environ: Mapping[str, str] = os.environ) -> int:
    """`generator NORMAL [EARLY LATE]`, as systemd calls it. Always 0: an error here must not be one of the boot."""
    if len(argv) < 2:
        print("usage: confext-watcher-generator DIRECTORY [EARLY LATE]", file=sys.stderr)
        return 2
    state = environ.get("STATE_DIRECTORY") or STATE_DIRECTORY
    index = Index(units.generators_search_path())
    generate(argv[1], index, state, lambda text: print(f"confext-watcher: {text}", file=sys.stderr))
    return 0


def generate(output: str, index: Index, state_directory: str, complain: Callable[[str], None]) -> list[str]:
    """Write the drop-ins of all services that take part below `output`; the names of the units that got one.

    A unit without a file gets one, too: another generator may be writing it at this moment. If nobody does, systemd
    has no use for the drop-in.

    Args:
        complain: is told what went wrong, one line each.
    """
    done: dict[str, None] = {}
    os.makedirs(output, exist_ok=True)
    for name in index.candidates(_seen(state_directory)):
        try:
            unit = index.unit(name, unwritten=True)
            if unit and unit.name not in done and index.takes_part(unit) and _enabled(index, unit):
                _write(f"{output}/{unit.name}.d", text(index, unit, state_directory, complain))
                done[unit.name] = None
        except Forgotten as error:
            complain(f"{shown(name)}: no drop-in, it starts without a stack and gets it then: {error}")
        except Exception as error:  # noqa: BLE001 -- whatever it is, the others get theirs, and the host boots
            what = str(error) if isinstance(error, OSError | dropin.Unwritable) else repr(error)
            complain(f"{shown(name)}: no drop-in, it starts on what it picks itself: {what}")
    return list(done)


def text(
    index: Index, unit: Unit, state_directory: str, complain: Callable[[str], None] = lambda text: None
) -> str:
    """The drop-in of one unit.

    Raises:
        Forgotten: it must not be given images. (One that declares images has lost as much by them already; with a
            drop-in they are at least accepted ones.)
    """
    parsed = index.relevant(unit)
    kept = hierarchies.repair(parsed.assignments, index.children)
    if kept.lost and not _declares(parsed):
        raise Forgotten(f"systemd would forget {shown(kept.lost[0])}")
    listed = _listed(index, unit, parsed, state_directory, complain)
    if kept.needed and _is_known_empty(state_directory, unit.name):
        # It has a namespace without us, and keeps all of its sandbox until there is something to mount.
        listed = [item for item in listed if not item.slot]
    elif not listed:
        listed = [Listed(Kind.IMAGE, EMPTY_SLOT)]
    drop_in = dropin.DropIn(f"By {WATCHER}: this unit starts on its last accepted stack.")
    if not _starts_before_us(unit.names, parsed):
        _assign_order(drop_in, state_directory)
    left_out = _assign_layers(drop_in, f"{state_directory}/units/{unit.name}", listed)
    if listed:
        left_out += _assign_again(drop_in, kept.again)
    if any(item.kind is Kind.IMAGE for item in listed) and _restricts_devices(parsed):
        for device in ("/dev/loop-control", "block-loop"):
            drop_in.assign("Service", "DeviceAllow", dropin.token(device), dropin.token("rw"))
    for what in left_out:
        complain(f"{shown(unit.name)}: left out: {what}")
    return str(drop_in)


def _declares(parsed: unitfile.Parsed) -> bool:
    keys = ("ExtensionImages", "ExtensionDirectories")
    return any(unitfile.values(parsed.assignments, "Service", key) for key in keys)


def _is_known_empty(state_directory: str, unit: str) -> bool:
    """Whether it is known (the state directory is there) that the unit has no stack."""
    try:
        return all(name.startswith(".") for name in os.listdir(f"{state_directory}/units/{unit}"))
    except OSError:
        return os.path.isdir(state_directory)


def _assign_order(drop_in: dropin.DropIn, state_directory: str) -> None:
    for key in ("Wants", "After"):
        drop_in.assign("Unit", key, dropin.token(WATCHER))
    drop_in.assign("Unit", "RequiresMountsFor", dropin.path(state_directory))


def _assign_layers(drop_in: dropin.DropIn, slots: str, listed: Sequence[Listed]) -> list[str]:
    """Reset what the unit declares and name its layers; what had to be left out, with the reasons.

    Args:
        slots: the directory with the unit's slots. By its name rather than with %n: an instance of a template that
            was never seen has the slots of the template.
    """
    left_out = []
    for kind, key in ((Kind.IMAGE, "ExtensionImages"), (Kind.DIRECTORY, "ExtensionDirectories")):
        drop_in.assign("Service", key)
        for item in listed:
            if item.kind is kind:
                left_out += _assign_layer(drop_in, key, slots, item)
    return left_out


def _assign_layer(drop_in: dropin.DropIn, key: str, slots: str, item: Listed) -> list[str]:
    """The first of its paths that can be written; the first that cannot, if that comes before."""
    left_out: list[str] = []
    for path in (f"{slots}/{item.slot}",) if item.slot else item.paths:
        try:
            if item.kind is Kind.IMAGE:
                word = dropin.image(path, RELAX if item.slot else item.options, optional=item.optional)
            else:
                word = dropin.path(path, optional=item.optional)
            drop_in.assign("Service", key, word)
        except dropin.Unwritable as error:
            left_out = left_out or [f"{shown(path)}: {error}"]
        else:
            break
    return left_out


def _assign_again(drop_in: dropin.DropIn, again: Iterable[hierarchies.Again]) -> list[str]:
    """Keep of the unit's sandbox what systemd would forget; what had to be left out, with the reasons."""
    left_out = []
    for key, paths, options in again:
        try:
            drop_in.assign("Service", key, dropin.path(*paths, options=options, optional=True))
        except dropin.Unwritable as error:
            left_out.append(f"{key}= for {shown(paths[-1])}: {error}")
    return left_out


def _listed(
    index: Index,
    unit: Unit,
    parsed: unitfile.Parsed,
    state_directory: str,
    complain: Callable[[str], None],
) -> list[Listed]:
    """What was accepted last, and the sysexts among what is declared."""
    slots = read_slots(state_directory, unit.name, complain)
    passed = read_passed(state_directory, unit.name) if _declares(parsed) else frozenset()
    trees = (path for path, _ in index.sources(unit).directories)
    if slots is not None and not passed and not any(map(_is_sysext_tree, trees)):
        return [Listed(kind, slot) for slot, kind in slots]
    declared, _remarks = units.declared(unit, parsed, index.search_path)
    sysexts = [
        listed
        for entry in (*declared.images, *declared.directories)
        if _is_sysext(entry, passed) and (listed := _passed_through(entry))
    ]
    if slots is None:
        from . import scan  # here and below: mostly not needed, and milliseconds count
        from .model import Declared

        there = Declared(declared.images, declared.directories, index.confext_dirs(unit))
        slots = [
            (entry.slot, entry.kind)
            for entry in scan.entries(there)
            if not (entry.declared and _is_sysext(entry, passed))
        ]
    return [*(Listed(kind, slot) for slot, kind in slots), *sysexts]


def read_slots(
    state_directory: str, unit: str, complain: Callable[[str], None] = lambda text: None
) -> list[tuple[str, Kind]] | None:
    """Slots of the stack that was accepted last, bottom to top, with or without a layer; None if nothing ever was.

    Reads the record that `watcher.stacks` writes; that module itself costs more to import than all the rest here.
    """
    path = f"{state_directory}/units/{unit}/.stack.json"
    try:
        content = unitfile.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        complain(f"{path}: cannot be read, what lies in the directories is listed: {error.strerror}")
        return None
    import json

    try:
        return [(entry["slot"], Kind(entry["kind"])) for entry in json.loads(content)["entries"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        complain(f"{path}: not a record of a stack, what lies in the directories is listed: {error!r}")
        return None


def passed_path(state_directory: str, unit: str) -> str:
    return f"{state_directory}/sysexts/{unit}"


def read_passed(state_directory: str, unit: str) -> frozenset[str]:
    """Declared paths of a unit that turned out to be sysexts when they were looked into; one on a line, escaped."""
    try:
        with open(passed_path(state_directory, unit), encoding="ascii") as file:
            return frozenset(
                os.fsdecode(line.encode("ascii").decode("unicode_escape").encode("latin-1"))
                for line in file.read().splitlines()
            )
    except (FileNotFoundError, UnicodeError):
        return frozenset()


def write_passed(state_directory: str, unit: str, paths: Iterable[str]) -> None:
    """Remember which declared paths are sysexts, for the generator.

    Raises:
        OSError
    """
    from . import owntree  # only the daemon writes

    target = passed_path(state_directory, unit)
    lines = [os.fsencode(path).decode("latin-1").encode("unicode_escape") + b"\n" for path in sorted(paths)]
    if not lines:
        if os.path.exists(target):
            os.unlink(target)
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    with open(f"{target}.tmp", "wb") as file:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{target}.tmp", target)
    owntree.bring(os.path.dirname(target), state_directory)


def _is_sysext_tree(path: str) -> bool:
    """A directory that says by itself that it is no confext; one in `.v/` form was looked into by the watcher."""
    return not os.path.isdir(f"{path}/etc/extension-release.d") and os.path.isdir(
        f"{path}/usr/lib/extension-release.d"
    )


def _is_sysext(entry: Entry, passed: frozenset[str]) -> bool:
    return entry.path in passed or (entry.kind is Kind.DIRECTORY and _is_sysext_tree(entry.path))


def _passed_through(entry: Entry) -> Listed | None:
    """A sysext as it is picked at this moment, never in `.v/` form: else systemd's refresh would run."""
    from . import scan
    from .model import Declared

    images, directories = ((entry,), ()) if entry.kind is Kind.IMAGE else ((), (entry,))
    (pick,) = scan.look(Declared(images, directories)).picks
    paths = tuple(candidate.path for candidate in pick.candidates)
    return Listed(entry.kind, "", paths, entry.options, entry.optional) if paths else None


def _starts_before_us(names: Iterable[str], parsed: unitfile.Parsed) -> bool:
    if any(name in _BEFORE_US or name.startswith("systemd-") for name in names):
        return True
    default = unitfile.last(parsed.assignments, "Unit", "DefaultDependencies")
    if default and default.value.lower() in ("no", "false", "off", "0", "n", "f"):
        return True
    before = unitfile.values(parsed.assignments, "Unit", "Before")
    return any(word in _BEFORE_US for assignment in before for word in assignment.value.split())


def _restricts_devices(parsed: unitfile.Parsed) -> bool:
    """Whether the unit keeps its processes from devices, and so systemd from the loop devices of its own images.

    systemd lets itself through for `RootImage=` but not for `ExtensionImages=` (257 and 262): with `PrivateDevices=`
    and an image no process of the unit can be started (226/NAMESPACE). Where nothing is restricted, `DeviceAllow=`
    must not be set: it would be the first restriction.
    """
    private = unitfile.last(parsed.assignments, "Service", "PrivateDevices")
    policy = unitfile.last(parsed.assignments, "Service", "DevicePolicy")
    return (
        (private is not None and _is_true(private.value))
        or (policy is not None and policy.value in ("closed", "strict"))
        or bool(unitfile.values(parsed.assignments, "Service", "DeviceAllow"))
    )


def _is_true(text: str) -> bool:
    try:
        return unitfile.boolean(text)
    except ValueError:
        return False


def _enabled(index: Index, unit: Unit) -> bool:
    """Unless `Enabled=no` in its `[X-Confext]` leaves it to systemd."""
    enabled = unitfile.last(index.relevant(unit).assignments, "X-Confext", "Enabled")
    try:
        return enabled is None or unitfile.boolean(enabled.value)
    except ValueError:
        return True  # the watcher says what is wrong with it


def _seen(state_directory: str) -> list[str]:
    """Units with a stack of their own: instances, that is, which no file may name."""
    try:
        names = os.listdir(f"{state_directory}/units")
    except OSError:
        return []  # nothing accepted yet, or /var is not there yet
    return [name for name in names if "@" in name and units.is_service(name)]


def _write(directory: str, content: str) -> None:
    try:
        os.mkdir(directory, 0o755)
    except FileExistsError:
        pass  # another generator's
    with open(f"{directory}/{DROPIN}", "wb", buffering=0) as file:
        file.write(content.encode())


if __name__ == "__main__":
    sys.exit(main())
