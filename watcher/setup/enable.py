# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have a unit take part: make its drop directory, and have systemd know of it before anything else is done.

A restart that overtakes systemd's next look at its unit files starts the service as before: without a mount namespace
of its own, so that it has to be restarted once more. Whoever waits for this command does not meet that.

It is done by who calls it, root, and not by the daemon: so it works while that is down, and gives nobody a right.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from watcher.managers.systemd import sandbox_settings
from watcher.managers.systemd.unit_facts import settings_of, stale
from watcher.managers.systemd.unit_files import SUFFIX, Index, Unit, is_portable, is_service
from watcher.model import shown
from watcher.mounts.process import shares_host
from watcher.records.schema import Failed
from watcher.settings import unit_names
from watcher.settings.unit_names import UNIT_PATHS, is_template
from watcher.text import nearest

PLACE = "/etc/systemd/system"
"""Where what this room makes for a unit lies: the administrator's directory of unit files."""


@dataclass(frozen=True, slots=True)
class Enabled:
    """A unit that takes part.

    Attributes:
        service: its own name.
        directory: where to drop things.
        needs_restart: it was started before, and gets its stack only after a restart.
        watched: the daemon runs.
    """

    service: str
    directory: str
    needs_restart: bool
    watched: bool


def enable(name: str, entry: str, state_directory: str, place: str = PLACE) -> Enabled:
    """Make the drop directory of a unit and one for an entry's versions; the drop-in is in force when it returns.

    Args:
        name: of the unit, with or without ".service".
        entry: name of a directory to make in it, such as "web.raw.v"; "": none.
        place: the directory of the unit search path to make it in.

    Raises:
        Failed: it cannot take part: the reason, and what to do.
        OSError: a directory cannot be made.
    """
    require_root("have a unit take part")
    unit = unit_of(Index(UNIT_PATHS), name)
    if entry and (entry != os.path.basename(entry) or not entry.endswith(".v") or entry.startswith(".")):
        raise Failed(
            f"{shown(entry)}: no directory of versions: they are called NAME.raw.v, or NAME.v for trees"
        )
    top = f"{place}/{unit.name}{SUFFIX}"
    directory = f"{top}/{entry}" if entry else top
    for path in dict.fromkeys((top, directory)):
        make_directory(path)
    bring_into_force(unit, state_directory)
    return taking_part(unit, directory)


def require_root(what: str) -> None:
    """Raise Failed where a command cannot do what it is for: by whom it is run, or because systemd is not here."""
    require_systemd()
    if os.geteuid() != 0:
        raise Failed(f"only root may {what}: use sudo")


def require_systemd() -> None:
    """Raise Failed where there are no units, also for a look at what would be done."""
    if not os.path.isdir("/run/systemd/system"):
        what = "a program that `confext-watcher exec` starts takes part as long as it runs"
        raise Failed(f"systemd does not run here, and has no units: {what}")


def full_name(name: str) -> str:
    """ "nginx.service" for "nginx". Raises Failed: it is no name of a service unit."""
    known = is_service(name) or unit_names.is_unit(name)  # "php8.4-fpm" has a dot, too
    name = name if known else f"{name}.service"
    if not is_service(name):
        raise Failed(f"{shown(name)} is no service unit")
    return name


def unit_of(index: Index, name: str) -> Unit:
    """The unit of that name, which may take part. Raises Failed."""
    name = full_name(name)
    unit = index.unit(name)
    if unit is None:
        meant = nearest(name, known(index))
        hint = f"; did you mean {shown(meant)}?" if meant not in ("", name) else ""
        raise Failed(f"{shown(name)}: there is no such unit, or it is masked{hint}")
    if is_portable(unit.fragment):
        raise Failed(f"{shown(name)} is a portable service: portablectl says what is on its /etc")
    settings, _ = settings_of(index, unit)
    if not settings.enabled:
        raise Failed(f"{shown(name)}: Enabled=no in its [X-Confext] keeps it from taking part: remove that")
    kept = sandbox_settings.repair(index.relevant(unit).assignments, index.children)
    if kept.lost:
        what = f"with images on its /etc systemd would forget {shown(kept.lost[0])} at its start"
        raise Failed(f"{shown(name)}: {what}: drop images, they are put there once it runs")
    return unit


def known(index: Index) -> Iterator[str]:
    """The names of all services that have a file."""
    for directory in index.search_path:
        with contextlib.suppress(OSError):
            yield from (name for name in os.listdir(directory) if is_service(name))


def bring_into_force(unit: Unit, state_directory: str, *, reload: bool = False) -> None:
    """Have systemd know of what was made for a unit.

    Args:
        reload: also if the drop-in of the generator is as it should be: a file beside it has changed.

    Raises:
        Failed: systemd does not, or cannot load the unit any more.
    """
    index = Index(UNIT_PATHS)
    if not reload and not stale(index, [unit.name], state_directory):
        return
    systemctl("daemon-reload")
    state = "" if is_template(unit.name) else systemctl("show", "--property=LoadState", "--value", unit.name)
    if state in ("bad-setting", "error"):
        raise Failed(
            f"{shown(unit.name)} cannot be loaded any more: systemctl status {shown(unit.name)} says why"
        )
    if stale(index, [unit.name], state_directory):
        raise Failed(
            f"{shown(unit.name)}: daemon-reload did not give it its drop-in: is confext-watcher-generator installed?"
        )


def taking_part(unit: Unit, directory: str) -> Enabled:
    """What is still to be done for a unit that takes part. Raises Failed: systemd does not answer."""
    restart = not is_template(unit.name) and in_hosts_namespace(unit.name)
    return Enabled(unit.name, directory, restart, is_watched())


def is_watched() -> bool:
    """Whether the daemon runs."""
    return systemctl("is-active", "confext-watcher.service", check=False) in ("active", "reloading")


def make_directory(path: str) -> bool:
    """Make a directory that everybody may read, unless it is there; whether it was made. Raises Failed, OSError."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise Failed(f"{shown(path)} is there, and no directory: remove it") from None
        return False
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        what = "make there what `confext-watcher init --dry-run` shows, in what /etc comes from"
        raise Failed(f"{shown(path)} cannot be made, its file system is read-only: {what}") from error
    os.chmod(path, 0o755)  # whatever the umask is
    return True


def in_hosts_namespace(name: str) -> bool:
    """Whether a unit runs in the host's mount namespace, where nothing can be put on its /etc alone."""
    pid = systemctl("show", "--property=MainPID", "--value", "--", name)
    try:
        return pid not in ("", "0") and shares_host(pid)
    except FileNotFoundError:
        return False  # it has just ended: its next start has its drop-in


def systemctl(*words: str, check: bool = True) -> str:
    """What systemctl prints. Raises Failed: it failed, and `check` is set."""
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise Failed(f"systemctl {words[0]}: {shown(done.stderr.strip() or 'failed')}")
    return done.stdout.strip()
