# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: what each command does. A command imports what it alone needs, so that all start fast."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from watcher.control import arguments, show
from watcher.control.client import Client, NotRunning, TimedOut, wait
from watcher.model import Busy, Event, Later, Outcome, Refused, Unsupported, printable, problem, shown
from watcher.records.schema import CallError, ExitStatus, Failed, ServiceNotFound, ServiceStatus, to_dict
from watcher.settings import config, signals
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new

if TYPE_CHECKING:
    from watcher.images.made_for import Host

T = TypeVar("T")

_KERNEL = (6, 8)
_CAP_SYS_ADMIN = 21


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, see `--help`."""
    options = arguments.parse(sys.argv[1:] if words is None else words)
    # As of diff(1): 1 says that something differs.
    trouble = ExitStatus.USAGE if options.command == "diff" else None
    starts = options.command in ("run", "exec")
    try:
        settings, remarks = config.load(root=_as_root(starts))
        if starts:
            _require_kernel()
            _require_mounting()
            from watcher.records import journal

            journal.configure(level=settings.log_level)
            for remark in remarks:
                journal.say(remark)
        return _COMMANDS[options.command](settings, options)
    except CallError as error:
        return _fail(str(error), trouble or error.exit_code)
    except Unsupported as error:
        return _fail(str(error), ExitStatus.UNSUPPORTED)
    except BrokenPipeError:
        # The reader of our output has seen enough. Nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except OSError as error:
        return _fail(problem(error), trouble or ExitStatus.FAILED)
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def _as_root(starts: bool) -> bool:
    """Whether the command is about the system's daemon: root's is, and that of a user who asks and runs no daemon."""
    if config.is_root():
        return True
    own = config.directories(os.environ, root=False)
    system = config.directories(os.environ, root=True)
    has_own = os.path.isdir(own["runtime_directory"])
    return not starts and not has_own and os.path.isdir(system["runtime_directory"])


def _run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher import daemon
    from watcher.managers.systemd.dbus import BusLost

    stopped: Exception | None = None
    try:
        daemon.main(settings)
    except* (daemon.AlreadyRunning, Unsupported, BusLost, Later, OSError) as group:
        stopped = _first(group)
    if stopped is None:
        return ExitStatus.DONE
    too_old = isinstance(stopped, Unsupported)
    return _fail(problem(stopped), ExitStatus.UNSUPPORTED if too_old else ExitStatus.FAILED)


def _first(error: BaseException) -> Exception:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _exec(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher.managers.registration import service_settings, valid_name
    from watcher.rounds.exec_service import CannotStart, ExecOptions, launch

    if not valid_name(options.name):
        refused = f"{shown(options.name)!r} cannot be the name of a service: use one like web.service"
        return _fail(f"--name: {refused}", ExitStatus.USAGE)
    try:
        command = tuple(shlex.split(options.reload_command))
    except ValueError as error:
        return _fail(f"--reload-command: {error}", ExitStatus.USAGE)
    try:
        signals.signal_number(options.reload_signal or "HUP")
    except ValueError as error:
        return _fail(f"--reload-signal: {error}", ExitStatus.USAGE)
    _, wrong = service_settings(options.set, options.check, options.health_check)
    if wrong:
        return _fail(f"{wrong[0].text}", ExitStatus.USAGE)
    asked = ExecOptions(
        name=options.name,
        program=tuple(options.program),
        confext_dirs=tuple(options.confext_dir),
        images=tuple(options.extension_image),
        directories=tuple(options.extension_directory),
        reload_signal=options.reload_signal,
        reload_command=command,
        check=tuple(options.check),
        health_check=tuple(options.health_check),
        settings=tuple(options.set),
    )
    try:
        launch(settings, asked)
    except CannotStart as error:
        return _fail(str(error), ExitStatus.FAILED)
    raise AssertionError("launch() does not return")


def _status(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    unknown: list[ServiceNotFound] = []

    def without_daemon() -> list[ServiceStatus]:
        from watcher.control import status
        from watcher.records import journal

        journal.configure()  # what cannot be read is said on standard error, beside the answer
        services = _chosen(options.services, functools.partial(status.without_daemon, settings), unknown)
        print("confext-watcher: the daemon is not running", file=sys.stderr)
        return services

    services, redacted = _read(
        settings, lambda client: _chosen(options.services, client.status, unknown), without_daemon
    )
    if services or not options.services:
        nothing_new = why_nothing_new()
        lines = [*show.services(services, settings=bool(options.services) and not redacted)]
        lines += [f"services get nothing new: {nothing_new}"] if nothing_new else []
        _answer(options, {"services": services, "redacted": redacted, "nothing_new": nothing_new}, lines)
    for error in unknown:
        _fail(str(error), ExitStatus.FAILED)
    return ExitStatus.FAILED if unknown else ExitStatus.DONE


def _chosen(
    names: Sequence[str],
    status: Callable[[str | None], list[ServiceStatus]],
    unknown: list[ServiceNotFound],
) -> list[ServiceStatus]:
    """The services of these names and shell patterns, each once; all without any.

    Args:
        unknown: gets the names that no service has.
    """
    if not names:
        return status(None)
    found: dict[str, ServiceStatus] = {}
    for name in names:
        try:
            if set(name) & set("*?["):
                patterns = (name, f"{name}.service")
                chosen = [
                    one
                    for one in status(None)
                    if any(fnmatch.fnmatchcase(one.service, each) for each in patterns)
                ]
                if not chosen:
                    raise ServiceNotFound(name)
            else:
                chosen = status(name)
        except ServiceNotFound as error:
            unknown.append(error)
        else:
            found |= {one.service: one for one in chosen}
    return list(found.values())


def _plan(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    if options.debug and options.service is None:
        return _fail("plan --debug: of which SERVICE? It takes exactly one", ExitStatus.USAGE)
    with Client(settings.runtime_directory, timeout=600) as client:
        changes = client.plan(options.service, debug=options.debug)
        redacted = client.redacted
    hint = show.NO_REPORT if options.debug else show.REDACTED
    _answer(options, {"changes": changes, "redacted": redacted}, show.changes(changes), hint)
    without = options.debug and any(change.report is None for change in changes)
    return ExitStatus.FAILED if without else ExitStatus.DONE


def _history(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    def without_daemon() -> list[Event]:
        from watcher.records.ledger import Reader

        reader = Reader(settings.state_directory)
        found = reader.history(options.service, options.lines)
        if not found and options.service and "." not in options.service:
            found = reader.history(f"{options.service}.service", options.lines)
        return found

    if options.lines < 1:
        return _fail("--lines: at least 1", ExitStatus.USAGE)
    events, redacted = _read(
        settings, lambda client: client.history(options.service, options.lines), without_daemon
    )
    _answer(options, {"events": events, "redacted": redacted}, show.events(events, verbose=options.verbose))
    return ExitStatus.DONE


def _read(settings: Settings, ask: Callable[[Client], T], without_daemon: Callable[[], T]) -> tuple[T, bool]:
    """The daemon's answer, and whether it is redacted.

    The daemon may read what this user may not, and knows who may be told what. So it is asked first.
    """
    try:
        with Client(settings.runtime_directory, timeout=30) as client:
            return ask(client), client.redacted
    except NotRunning:
        from watcher.records.ledger import LedgerError

        try:
            return without_daemon(), False
        except LedgerError as error:
            raise Failed(str(error))


def _wait(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    image = options.image
    if "/" in image:  # by the way that its directory's links lead; where its own leads may change
        directory, name = os.path.split(os.path.abspath(image))
        image = os.path.join(os.path.realpath(directory), name)
    last, timed_out, redacted = None, None, [False]
    try:
        for last in wait(
            settings.runtime_directory, options.service, image, options.timeout, redacted.append
        ):
            # Strangers are told no more than the status of an answer, so each in progress is the same to them.
            if not options.json and (last.answer.status != 4 or last.answer.kind not in ("", "looking")):
                print(printable(last.answer.text or last.event.message), flush=True)
    except TimedOut:
        if last is None:
            raise
        timed_out = TimedOut(f"timed out: {last.answer.text or last.event.message}")
    if last is None:
        raise Failed("the daemon ended before there was an answer")
    helps = f"What helps: {last.answer.command}" if last.answer.command else ""
    result = {**to_dict(last.event), "answer": last.answer, "redacted": redacted[-1]}
    _answer(options, result, [helps] if helps else [])
    if timed_out is not None:
        raise timed_out
    return ExitStatus(last.answer.status)


def _rollback(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    with Client(settings.runtime_directory, timeout=600) as client:
        if options.forget:
            contents = client.forget(options.service)
            _answer(options, {"forgotten": contents}, show.forgotten(options.service, contents))
            return ExitStatus.DONE
        for event in client.rollback(options.service, options.to):
            if event.outcome is Outcome.REQUESTED and not options.json:
                print(printable(event.message), flush=True)
    stays = f"It stays there until `confext-watcher rollback --forget {shown(options.service)}`."
    _answer(options, to_dict(event), (printable(event.message), stays))
    failed = event.outcome in (Outcome.FAILED, Outcome.NEEDS_RESTART)
    return ExitStatus.FAILED if failed else ExitStatus.DONE


def _enable(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher.control import enable

    found = enable.enable(options.service, options.entry, settings.state_directory)
    _answer(options, to_dict(found), enable.lines(found))
    return ExitStatus.DONE


def _check(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher.images.made_for import host

    made_for = host()
    results = [_checked(path, made_for, settings.image_max) for path in options.images]
    _answer(options, {"images": results}, show.checked(results))
    return ExitStatus.DONE if all(result["admitted"] for result in results) else ExitStatus.FAILED


def _checked(path: str, made_for: Host, image_max: int) -> dict[str, object]:
    from watcher.images.image_check import examine

    result: dict[str, object] = {"image": path, "admitted": False, "reason": ""}
    try:
        candidate, copy, trust, effects = examine(path, made_for, image_max)
    except (Refused, Busy) as error:
        return result | {"reason": str(error)}
    except OSError as error:
        return result | {"reason": error.strerror or str(error)}
    return result | {
        "admitted": True,
        "name": candidate.name,
        "version": candidate.version,
        "format": copy.format.name if copy.format else "directory",
        "size": copy.size,
        "digest": copy.digest,
        "trust": to_dict(trust),
        "effects": effects,
    }


def _origin(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher.control import tracing

    return tracing.origin(settings, options)


def _diff(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    from watcher.control import tracing

    return tracing.diff(settings, options)


def _answer(
    options: argparse.Namespace, results: dict[str, object], lines: Iterable[str], hint: str = show.REDACTED
) -> None:
    if options.json:
        print(show.as_json(results))
        return
    for line in show.fit(lines):
        print(line)
    if results.get("redacted"):
        print(f"confext-watcher: {hint}", file=sys.stderr)


def _require_kernel() -> None:
    # "6.12.43+deb13-amd64", "6.9rc1", "6.12+"
    release = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    if release < _KERNEL:
        raise Unsupported(
            f"Linux {platform.release()} is too old: 6.8 or newer is needed (overlayfs lowerdir+)"
        )


def _require_mounting() -> None:
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.partition(":")[::2] for line in file)
    if not int(fields["CapEff"], 16) >> _CAP_SYS_ADMIN & 1:
        raise OSError(None, "needs root, or a user namespace: unshare --user --map-root-user --mount")


def _fail(text: str, status: ExitStatus) -> ExitStatus:
    print(f"confext-watcher: {printable(text)}", file=sys.stderr)
    return status


_COMMANDS = {
    "run": _run,
    "exec": _exec,
    "status": _status,
    "plan": _plan,
    "history": _history,
    "wait": _wait,
    "rollback": _rollback,
    "enable": _enable,
    "check": _check,
    "origin": _origin,
    "diff": _diff,
}
