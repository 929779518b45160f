# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watcher's own settings, and those of a service in the `[X-Confext]` section of its unit.

Nothing in a configuration file is fatal: an unknown key or a bad value is one warning with file and line, and the
default counts. Values are written as in systemd's files (`5s`, `64M`, `yes`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from watcher.model import Outcome, Remark, Setting, shown
from watcher.settings import image_policy, syntax, unit_names
from watcher.settings.signals import signal_name, signal_number
from watcher.settings.syntax import Assignment
from watcher.settings.values import boolean, number, size, split, time_span

SERVICE_SECTION = "X-Confext"
WATCHER_SECTION = "Watcher"
KERNEL_OLDEST = (6, 8)
"""Linux: the first with lowerdir+ of overlayfs."""
SYSTEMD_OLDEST = 255
"""The first with confexts for services."""
_NAME = "confext-watcher"
_VENDOR_DIRECTORIES = (f"/run/{_NAME}", f"/usr/local/lib/{_NAME}", f"/usr/lib/{_NAME}")

# Names that systemd accepts with a warning (USER_NAMES, "relaxed mode").
_USER = re.compile(r"(?!\.{1,2}\Z|-)[^\s:/,\x00-\x1f\x7f]{1,256}")

_GiB = 1024**3


@dataclass(frozen=True, slots=True)
class Settings:
    """`watcher.conf`, section `[Watcher]`; *_usec are microseconds.

    Attributes:
        settle_usec: `SettleSec=`, quiet time that ends a burst of changes; 0: every change ends it.
        settle_max_usec: `SettleMaxSec=`, time after its first change at which a burst ends in any case.
        settle_tree_usec: `SettleTreeSec=`, time without a change after which a directory tree is complete.
        settle_tree_max_usec: `SettleTreeMaxSec=`, after which a tree that changes all the time is taken as it is.
        remove_usec: `RemoveSec=`, for which the last version of an entry stays after its file was removed.
        scrub_usec: `ScrubSec=`, after which each copy in the store is read again; 0 or infinity: never.
        store_max: `StoreMax=`, bytes that all copies together may take.
        image_max: `ImageMax=`, bytes of one image or tree.
        keep_stacks: `KeepStacks=`, accepted stacks kept for each service.
        history_max: `HistoryMax=`, entries.
        reload_limit_burst: `ReloadLimitBurst=`, daemon-reloads within `reload_limit_interval_usec`; 0: no limit.
        reload_limit_interval_usec: `ReloadLimitIntervalSec=`.
        log_level: `LogLevel=`, "debug", "info", "warning" or "error".
        image_policy: `ImagePolicy=` of all services, as written, see `image_policy.py`; "" when not set.
        notify: `Notify=`, command lines, or names of template units ("alert@.service").
        notify_on: `NotifyOn=`, values of `model.Outcome`.
        state_directory: $STATE_DIRECTORY, runtime_directory and configuration_directory likewise; absolute.
        written: as in `ServiceSettings`.
    """

    settle_usec: int = 100_000
    settle_max_usec: int = 5_000_000
    settle_tree_usec: int = 2_000_000
    settle_tree_max_usec: int = 600_000_000
    remove_usec: int = 5_000_000
    scrub_usec: int = 604_800_000_000
    store_max: int = 4 * _GiB
    image_max: int = 1 * _GiB
    keep_stacks: int = 3
    history_max: int = 10_000
    reload_limit_burst: int = 5
    reload_limit_interval_usec: int = 10_000_000
    log_level: str = "info"
    image_policy: str = ""
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = (Outcome.REFUSED.value, Outcome.FAILED.value, Outcome.ROLLED_BACK.value)
    runtime_directory: str = f"/run/{_NAME}"
    state_directory: str = f"/var/lib/{_NAME}"
    configuration_directory: str = f"/etc/{_NAME}"
    written: tuple[Setting, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`[X-Confext]` of a unit; *_usec are microseconds.

    Attributes:
        reload: `Reload=`, "auto", "unit", "restart", "reload-or-restart", "none" or "signal:SIGHUP".
        reload_usec: `ReloadSec=`, within which a reload must end.
        reload_errors: `ReloadErrors=`, "show", or "fail": what the service logs as an error then is a failure.
        check: `Check=`, command lines for `values.split()`, all of which must succeed, in order.
        check_usec: `CheckSec=`, for each of them.
        health_check: `HealthCheck=`, command lines.
        health_check_usec: `HealthCheckSec=`, within which they must have held, counted from the reload.
        health_stable_usec: `HealthStableSec=`, how long they must hold without a failure; at most half of that counts.
        health_watch_usec: `HealthWatchSec=`, how long they must then go on holding, and the service stay up.
        base_changed: `BaseChanged=`, "refresh", "reload" or "ignore".
        rollback: `Rollback=`.
        rollout: `Rollout=`, "parallel" or "rolling".
        rollout_parallel: `RolloutParallel=`, services at a time, after the first.
        settle_usec: `SettleSec=`; None: as the watcher's.
        settle_tree_usec: `SettleTreeSec=`, likewise.
        remove_usec: `RemoveSec=`, likewise.
        trusted_users: `TrustedUsers=`, names or numbers.
        trusted_groups: `TrustedGroups=`.
        image_policy: `ImagePolicy=`, as written, see `image_policy.py`; "" when not set.
        notify: `Notify=`; (): as the watcher's.
        notify_on: `NotifyOn=`, likewise.
        enabled: `Enabled=`.
        written: those that do not have their defaults, as they are written.
    """

    reload: str = "auto"
    reload_usec: int = 90_000_000
    reload_errors: str = "show"
    check: tuple[str, ...] = ()
    check_usec: int = 30_000_000
    health_check: tuple[str, ...] = ()
    health_check_usec: int = 10_000_000
    health_stable_usec: int = 2_000_000
    health_watch_usec: int = 0
    base_changed: str = "refresh"
    rollback: bool = True
    rollout: str = "parallel"
    rollout_parallel: int = 1
    settle_usec: int | None = None
    settle_tree_usec: int | None = None
    remove_usec: int | None = None
    trusted_users: tuple[str, ...] = ()
    trusted_groups: tuple[str, ...] = ()
    image_policy: str = ""
    notify: tuple[str, ...] = ()
    notify_on: tuple[str, ...] = ()
    enabled: bool = True
    written: tuple[Setting, ...] = field(default=(), compare=False)


_Keys = Mapping[str, tuple[str, Callable[[str], Any]]]
"""Setting to the attribute that it sets, and how its value is read (ValueError: it is bad); what is a tuple adds up."""


def directories(environment: Mapping[str, str], *, root: bool) -> dict[str, str]:
    """`runtime_directory`, `state_directory` and `configuration_directory` for `Settings`.

    Args:
        environment: as systemd sets it for `RuntimeDirectory=` and its kin, and XDG's for people.
        root: where systemd's are not set, take the system's directories rather than a user's.
    """
    home = environment.get("HOME") or "/"
    state = f"{environment.get('XDG_STATE_HOME') or f'{home}/.local/state'}/{_NAME}"
    runtime = environment.get("XDG_RUNTIME_DIR")
    own = {
        # Not in /tmp, where any user may be first. What is in a runtime directory does no harm after a reboot.
        "runtime_directory": f"{runtime}/{_NAME}" if runtime else f"{state}/run",
        "state_directory": state,
        "configuration_directory": f"{environment.get('XDG_CONFIG_HOME') or f'{home}/.config'}/{_NAME}",
    }
    system = {field.name: field.default for field in fields(Settings) if field.name in own}
    found = {}
    for attribute, default in own.items():
        given = environment.get(attribute.upper(), "").split(":")[0]
        found[attribute] = os.path.abspath(given or (str(system[attribute]) if root else default))
    return found


def is_root() -> bool:
    """Whether the system's directories are ours: we are root, also of a container. A user who is root only in a user
    namespace of his own cannot write to /run."""
    return os.geteuid() == 0 and os.access("/run", os.W_OK)


def load(
    environment: Mapping[str, str] = os.environ, *, root: bool | None = None
) -> tuple[Settings, tuple[Remark, ...]]:
    """`watcher.conf` from the first place that has one, then the drop-ins of all places.

    Places are the configuration directory (/etc), /run, /usr/local/lib, /usr/lib. Of drop-ins with the same name that
    of the earliest place counts. Drop-ins are read in the order of their names, and later ones win.

    Args:
        root: take the system's directories; None: if they are ours.

    Raises:
        OSError: a file is there and cannot be read.
    """
    paths = directories(environment, root=is_root() if root is None else root)
    places = (paths["configuration_directory"], *_VENDOR_DIRECTORIES)
    main = next((path for place in places if os.path.exists(path := f"{place}/watcher.conf")), None)
    drop_ins = unit_names.config_files(f"{place}/watcher.conf.d" for place in places)
    parsed = syntax.load([main, *drop_ins] if main else drop_ins)
    settings, remarks = watcher_settings(parsed.assignments, paths)
    return settings, parsed.remarks + remarks


def watcher_settings(
    assignments: Iterable[Assignment], paths: Mapping[str, str] | None = None
) -> tuple[Settings, tuple[Remark, ...]]:
    """`[Watcher]`, and a warning for each line in another section, but for those of systemd's `X-` kind.

    Args:
        paths: the three directories, see `directories()`.
    """
    assignments = tuple(assignments)
    values, remarks, written = _read(assignments, WATCHER_SECTION, _WATCHER_KEYS)
    remarks += [
        assignment.remark(f"ignored: the section [{shown(assignment.section)}] is not known")
        for assignment in assignments
        if assignment.section != WATCHER_SECTION and not assignment.section.startswith("X-")
    ]
    values.update(paths or {})
    return Settings(**values, written=written), tuple(remarks)


def service_settings(
    assignments: Iterable[Assignment], expand: Callable[[str], str] = lambda text: text
) -> tuple[ServiceSettings, tuple[Remark, ...]]:
    """`[X-Confext]` of a unit and its drop-ins.

    Args:
        expand: replaces the specifiers of systemd.unit(5); may raise ValueError.
    """
    values, remarks, written = _read(assignments, SERVICE_SECTION, _SERVICE_KEYS, expand)
    return ServiceSettings(**values, written=written), tuple(remarks)


def reload_kind(text: str) -> str:
    """`Reload=`: checked, with the signal's full name ("signal:hup" is "signal:SIGHUP").

    Raises:
        ValueError: none of auto, unit, restart, reload-or-restart, none, signal:NAME.
    """
    if text in ("auto", "unit", "restart", "reload-or-restart", "none"):
        return text
    kind, _, name = text.partition(":")
    if kind == "signal" and name:
        return f"signal:{signal_name(signal_number(name))}"
    raise ValueError(f"not auto, unit, signal:SIGNAL, restart, reload-or-restart or none: {shown(text)}")


def _read(
    assignments: Iterable[Assignment],
    section: str,
    keys: _Keys,
    expand: Callable[[str], str] = lambda text: text,
) -> tuple[dict[str, Any], list[Remark], tuple[Setting, ...]]:
    """Values by attribute, and where they are written; without what was set badly, or reset by an empty value."""
    values: dict[str, Any] = {}
    written: dict[str, list[Setting]] = {}
    remarks: list[Remark] = []
    for assignment in assignments:
        if assignment.section != section:
            continue
        attribute, read = keys.get(assignment.key, ("", str))
        if not attribute:
            if not assignment.key.startswith("X-"):
                remarks.append(
                    assignment.remark(f"ignored: {shown(assignment.key)}= is not known in [{section}]")
                )
        elif not assignment.value:
            values.pop(attribute, None)
            written.pop(attribute, None)
        else:
            try:
                value = read(assignment.value if read is _policy else expand(assignment.value))
            except ValueError as error:
                remarks.append(assignment.remark(f"ignored: {assignment.key}= is {error}"))
            else:
                remarks += policy_remarks(assignment if read is _policy else None)
                adds_up = isinstance(value, tuple)
                values[attribute] = values.get(attribute, ()) + value if adds_up else value
                before = written.get(attribute, []) if adds_up else []
                written[attribute] = [*before, as_written(assignment)]
    return values, remarks, tuple(setting for each in written.values() for setting in each)


def as_written(assignment: Assignment) -> Setting:
    """A setting, and where it is written."""
    is_file = assignment.path.startswith("/")
    source = f"{assignment.path}:{assignment.line}" if is_file else assignment.path
    return Setting(assignment.key, assignment.value, source)


def policy_remarks(assignment: Assignment | None) -> tuple[Remark, ...]:
    """What is wrong with a policy: it counts all the same."""
    problem = image_policy.demand(as_written(assignment)).problem if assignment is not None else ""
    if assignment is None or not problem:
        return ()
    return (assignment.remark(f"nothing new gets in: {assignment.key}= is {problem}"),)


def _choice(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"not {', '.join(words[:-1])} or {words[-1]}: {shown(text)}")
        return text

    return read


def _at_least(least: int) -> Callable[[str], int]:
    return lambda text: number(text, least)


def _some_time(text: str) -> int:
    found = time_span(text)
    if not found:
        raise ValueError(f"no time at all: {shown(text)}")
    return found


def _names(text: str) -> tuple[str, ...]:
    """Users or groups, by name or number. No name has a "," or ":" in it (USER_NAMES)."""
    names = tuple(text.split())
    for name in names:
        if not _USER.fullmatch(name):
            raise ValueError(f"not the name of a user or group: {shown(name)}")
    return names


def _policy(text: str) -> str:
    """A policy, as written: one that is none is no reason to let everything in."""
    return text


def _command(text: str) -> tuple[str]:
    """A command line, if it is one."""
    if not split(text):
        raise ValueError(f"not a command: {shown(text)}")
    return (text,)


def _notify(text: str) -> tuple[str]:
    """A command line, or the name of a template unit."""
    command = _command(text)
    if text.endswith(".service") and "/" not in text and not unit_names.is_template(text):
        raise ValueError(f"not a command, nor a template unit such as alert@.service: {shown(text)}")
    return command


def _outcomes(text: str) -> tuple[str, ...]:
    known = [outcome.value for outcome in Outcome]
    return tuple(_choice(*known)(word) for word in text.split())


_WATCHER_KEYS: _Keys = {
    "SettleSec": ("settle_usec", time_span),
    "SettleMaxSec": ("settle_max_usec", time_span),
    "SettleTreeSec": ("settle_tree_usec", time_span),
    "SettleTreeMaxSec": ("settle_tree_max_usec", time_span),
    "RemoveSec": ("remove_usec", time_span),
    "ScrubSec": ("scrub_usec", time_span),
    "StoreMax": ("store_max", size),
    "ImageMax": ("image_max", size),
    "KeepStacks": ("keep_stacks", _at_least(1)),
    "HistoryMax": ("history_max", _at_least(1)),
    "ReloadLimitBurst": ("reload_limit_burst", _at_least(0)),
    "ReloadLimitIntervalSec": ("reload_limit_interval_usec", time_span),
    "LogLevel": ("log_level", _choice("debug", "info", "warning", "error")),
    image_policy.KEY: ("image_policy", _policy),
    "Notify": ("notify", _notify),
    "NotifyOn": ("notify_on", _outcomes),
}
_SERVICE_KEYS: _Keys = {
    "Reload": ("reload", reload_kind),
    "ReloadSec": ("reload_usec", _some_time),
    "ReloadErrors": ("reload_errors", _choice("show", "fail")),
    "Check": ("check", _command),
    "CheckSec": ("check_usec", time_span),
    "HealthCheck": ("health_check", _command),
    "HealthCheckSec": ("health_check_usec", time_span),
    "HealthStableSec": ("health_stable_usec", time_span),
    "HealthWatchSec": ("health_watch_usec", time_span),
    "BaseChanged": ("base_changed", _choice("refresh", "reload", "ignore")),
    "Rollback": ("rollback", boolean),
    "Rollout": ("rollout", _choice("parallel", "rolling")),
    "RolloutParallel": ("rollout_parallel", _at_least(1)),
    "SettleSec": ("settle_usec", time_span),
    "SettleTreeSec": ("settle_tree_usec", time_span),
    "RemoveSec": ("remove_usec", time_span),
    "TrustedUsers": ("trusted_users", _names),
    "TrustedGroups": ("trusted_groups", _names),
    image_policy.KEY: ("image_policy", _policy),
    "Notify": ("notify", _notify),
    "NotifyOn": ("notify_on", _outcomes),
    "Enabled": ("enabled", boolean),
}
