# SPDX-License-Identifier: LGPL-2.1-or-later
"""The systemd generator, systemd.generator(7): a drop-in for each unit that takes part, by which it starts on its
slots.

Without it systemd would pick images itself for each process that it starts, also half an upload, or one that was
refused. The drop-in resets what the unit declares, and names links that only ever lead to the last accepted stack.

It lists the entries of the last accepted stack, in their order. For a unit without one it lists the entries that are
there now. Their slots do not exist yet, and systemd ignores them; but the service gets a mount namespace of its own, so
that the first stack can be put into it without a restart.

It runs at boot and at every daemon-reload, while systemd waits, and perhaps before `/var` is mounted: standard library
only. An error with one unit does not keep another from its drop-in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from watcher.managers.systemd import drop_ins, unit_drop_in, unit_files
from watcher.managers.systemd.unit_files import DROPIN, Index, Unit
from watcher.settings import syntax, values
from watcher.text import shown

STATE_DIRECTORY = "/var/lib/confext-watcher"


def main(argv: Sequence[str] = tuple(sys.argv), environ: Mapping[str, str] = os.environ) -> int:
    """`generator NORMAL [EARLY LATE]`, as systemd calls it; then the result is 0: an error here must not fail the
    boot."""
    if len(argv) < 2:
        print("usage: confext-watcher-generator DIRECTORY [EARLY LATE]", file=sys.stderr)
        return 2
    state = environ.get("STATE_DIRECTORY") or STATE_DIRECTORY
    index = Index(unit_files.generators_search_path())
    generate(argv[1], index, state, lambda text: print(f"confext-watcher: {text}", file=sys.stderr))
    return 0


def generate(output: str, index: Index, state_directory: str, complain: Callable[[str], None]) -> list[str]:
    """Write the drop-ins of all services that take part below `output`; returns the names of their units.

    A unit without a file gets one, too: another generator may be writing that file at this moment. If none does, the
    drop-in does nothing.

    Args:
        complain: is told what went wrong, one line each.
    """
    done: dict[str, None] = {}
    os.makedirs(output, exist_ok=True)
    for name in index.candidates(_seen(state_directory)):
        try:
            unit = index.unit(name, unwritten=True)
            if unit and unit.name not in done and index.takes_part(unit) and _is_enabled(index, unit):
                _write(f"{output}/{unit.name}.d", unit_drop_in.text(index, unit, state_directory, complain))
                done[unit.name] = None
        except unit_drop_in.Forgotten as error:
            complain(f"{shown(name)}: no drop-in, it starts without a stack and gets it then: {error}")
        except Exception as error:  # noqa: BLE001 -- the others still get theirs, and the host boots
            what = str(error) if isinstance(error, OSError | drop_ins.Unwritable) else repr(error)
            complain(f"{shown(name)}: no drop-in, it starts on what it picks itself: {what}")
    return list(done)


def _is_enabled(index: Index, unit: Unit) -> bool:
    """`Enabled=no` in its `[X-Confext]` leaves the unit to systemd."""
    enabled = syntax.last(index.relevant(unit).assignments, "X-Confext", "Enabled")
    return values.flag(enabled, default=True)  # the watcher says what is wrong with a bad value


def _seen(state_directory: str) -> list[str]:
    """Instances with slots of their own, which no file need name. Others start on those of their template."""
    try:
        names = os.listdir(f"{state_directory}/units")
    except OSError:
        return []  # nothing is accepted yet, or /var is not mounted yet
    return [
        name
        for name in names
        if "@" in name
        and unit_files.is_service(name)
        and not unit_drop_in.only_holds_a_record(state_directory, name)
    ]


def _write(directory: str, content: str) -> None:
    try:
        os.mkdir(directory, 0o755)
    except FileExistsError:
        pass  # another generator has made it
    with open(f"{directory}/{DROPIN}", "wb", buffering=0) as file:
        file.write(content.encode())


if __name__ == "__main__":
    sys.exit(main())
