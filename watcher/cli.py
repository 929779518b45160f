# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: parses, calls, prints. Modules are imported by the command that needs them, to start fast."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from watcher import __version__
from watcher.model import Busy, Outcome, Refused, Remark, Unsupported, printable, problem, shown
from watcher.records.schema import CallError, Quarantined, ServiceStatus, to_dict
from watcher.settings import config, signals
from watcher.settings.config import Settings

DONE, FAILED, USAGE, NOT_RUNNING, TIMED_OUT, UNSUPPORTED = range(6)

_KERNEL = (6, 8)
_CAP_SYS_ADMIN = 21
_SOURCES = ("--extension-image", "--extension-directory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, see `--help`."""
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        settings, remarks = config.load(root=_as_root(options))
        if options.command in (_run, _exec):
            _require_kernel()
            _require_mounting()
            _begin_log(settings, remarks)
        return int(options.command(settings, options))
    except CallError as error:
        return _fail(str(error), error.exit_code)
    except Unsupported as error:
        return _fail(str(error), UNSUPPORTED)
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _fail(problem(error), FAILED)
    except KeyboardInterrupt:
        return 130


def _as_root(options: argparse.Namespace) -> bool:
    """Whether the system's daemon is meant: by root, and by a user who only asks and has no daemon of his own."""
    if config.is_root():
        return True
    own = config.directories(os.environ, root=False)
    system = config.directories(os.environ, root=True)
    asks = options.command not in (_run, _exec)
    return asks and not os.path.isdir(own["runtime_directory"]) and os.path.isdir(system["runtime_directory"])


def _joined(arguments: Sequence[str]) -> list[str]:
    """With `--extension-image -PATH` written as one word: argparse would take the `-` for an option's."""
    words: list[str] = []
    for word in arguments:
        if word.startswith("-") and word != "--" and words and words[-1] in _SOURCES and "--" not in words:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="confext-watcher",
        description="Changing a service's configuration is copying one file: drops of confext images are put on the"
        " /etc of the running service, atomically, and it is asked to reload.",
        epilog="Exit status: 0 done, 1 refused or failed, 2 usage, 3 the daemon is not running, 4 timed out,"
        " 5 this kernel or systemd is too old, 6 too many calls of this user wait already.",
    )
    parser.add_argument("--version", action="version", version=f"confext-watcher {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="the daemon, in the foreground")
    run.set_defaults(command=_run)

    _add_exec(commands.add_parser("exec", help="start a program on its stack, without systemd"))

    status = commands.add_parser(
        "status", help="services, their stacks and versions, since when, last outcome"
    )
    status.add_argument("service", nargs="?", metavar="SERVICE")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.set_defaults(command=_status)

    plan = commands.add_parser("plan", help="what a look now would change, without doing it")
    plan.add_argument("service", nargs="?", metavar="SERVICE")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(command=_plan)

    history = commands.add_parser("history", help="what was applied, refused, rolled back, when and why")
    history.add_argument("service", nargs="?", metavar="SERVICE")
    history.add_argument("--lines", "-n", type=int, default=20, metavar="N", help="the newest N (20)")
    history.add_argument("--json", action="store_true", help="print one JSON object")
    history.set_defaults(command=_history)

    wait = commands.add_parser(
        "wait", help="block until an image is applied or refused; the exit status says which"
    )
    wait.add_argument("service", metavar="SERVICE")
    wait.add_argument("image", metavar="IMAGE", help="its path or file name")
    wait.add_argument("--timeout", type=float, default=None, metavar="SECONDS", help="give up after so long")
    wait.add_argument("--json", action="store_true", help="print one JSON object")
    wait.set_defaults(command=_wait)

    rollback = commands.add_parser("rollback", help="back to the stack before, and stay there")
    rollback.add_argument("service", metavar="SERVICE")
    which = rollback.add_mutually_exclusive_group()
    which.add_argument("--to", metavar="STACK", help="to this stack (see `history`), or what it begins with")
    which.add_argument(
        "--forget", action="store_true", help="undo: let it have what is newest, and all that was kept out"
    )
    rollback.add_argument("--json", action="store_true", help="print one JSON object")
    rollback.set_defaults(command=_rollback)

    check = commands.add_parser("check", help="would this image be admitted here?")
    check.add_argument("images", nargs="+", metavar="IMAGE", help="image file (*.raw) or directory tree")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(command=_check)
    return parser


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.usage = "confext-watcher exec --name NAME [OPTION]... -- PROGRAM [ARGUMENT]..."
    parser.add_argument("--name", required=True, help="name of the service, such as web.service")
    parser.add_argument(
        "--confext-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="directory that images are dropped into",
    )
    parser.add_argument(
        "--extension-image",
        action="append",
        default=[],
        metavar="PATH",
        help="an image, or a directory PATH.raw.v/",
    )
    parser.add_argument(
        "--extension-directory",
        action="append",
        default=[],
        metavar="PATH",
        help="a tree, or a directory PATH.v/",
    )
    reload = parser.add_mutually_exclusive_group()
    reload.add_argument(
        "--reload-signal", default="", metavar="SIGNAL", help="sent after a swap, such as SIGHUP"
    )
    reload.add_argument(
        "--reload-command",
        default="",
        metavar="COMMAND",
        help="run after a swap in the service's namespace, as its user, without a shell; $MAINPID is set",
    )
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="COMMAND",
        help="the service's own test of a new /etc, run before it can see that; refused if it fails",
    )
    parser.add_argument(
        "--health-check",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run after a reload, repeated for up to 10 s; rolled back if it goes on failing",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of [X-Confext], such as HealthWatchSec=5s",
    )
    parser.add_argument(
        "program", nargs="+", metavar="PROGRAM", help="the program and its arguments, after --"
    )
    parser.set_defaults(command=_exec)


def _run(settings: Settings, options: argparse.Namespace) -> int:
    from watcher import daemon
    from watcher.managers.systemd.dbus import BusLost

    stopped: Exception | None = None
    try:
        daemon.main(settings)
    except* (daemon.AlreadyRunning, Unsupported, BusLost, OSError) as group:
        stopped = _first(group)
    if stopped is None:
        return DONE
    return _fail(problem(stopped), UNSUPPORTED if isinstance(stopped, Unsupported) else FAILED)


def _first(error: BaseException) -> Exception:
    """What a group of exceptions is about: the first one that came."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _exec(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.managers.standalone import service_settings, valid_name
    from watcher.rounds.exec_service import CannotStart, ExecOptions, launch

    if not valid_name(options.name):
        refused = f"{shown(options.name)!r} cannot be the name of a service: use one like web.service"
        return _fail(f"--name: {refused}", USAGE)
    try:
        command = tuple(shlex.split(options.reload_command))
    except ValueError as error:
        return _fail(f"--reload-command: {error}", USAGE)
    try:
        signals.signal_number(options.reload_signal or "HUP")
    except ValueError as error:
        return _fail(f"--reload-signal: {error}", USAGE)
    _, wrong = service_settings(options.set, options.check, options.health_check)
    if wrong:
        return _fail(f"{wrong[0].text}", USAGE)
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
        return _fail(str(error), FAILED)
    raise AssertionError("launch() does not return")


def _status(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.control import status
    from watcher.control.client import Client, NotRunning
    from watcher.records.ledger import LedgerError

    try:
        try:
            with Client(settings.runtime_directory, timeout=30) as client:
                services = client.status(options.service)
                redacted = client.redacted
        except NotRunning:
            redacted = False
            services = status.without_daemon(settings, options.service)
            print("confext-watcher: the daemon is not running", file=sys.stderr)
    except LedgerError as error:
        return _fail(str(error), FAILED)
    if options.json:
        _print_json({"services": to_dict(services), "redacted": redacted})
        return DONE
    if services:
        _print_services(services)
    else:
        print("no service takes part")
    _say_redacted(redacted)
    return DONE


def _plan(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.control.client import Client
    from watcher.model import Stack
    from watcher.rounds.choose import describe

    with Client(settings.runtime_directory, timeout=600) as client:
        changes = client.plan(options.service)
        redacted = client.redacted
    if options.json:
        _print_json({"changes": to_dict(changes), "redacted": redacted})
        return DONE
    for change in changes:
        what = describe(Stack(change.layers), Stack(change.wanted_layers)) if change.changes else "no change"
        print(f"{shown(change.service)}: {what}")
        for remark in change.remarks:
            print(f"  {shown(remark.path)}: {printable(remark.text)}")
    if not changes:
        print("no service takes part")
    _say_redacted(redacted)
    return DONE


def _history(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.control.client import Client, NotRunning
    from watcher.records.ledger import LedgerError, Reader

    if options.lines < 1:
        return _fail("--lines: at least 1", USAGE)
    try:
        try:
            # It may read what this user may not, and knows who may be told what.
            with Client(settings.runtime_directory, timeout=30) as client:
                events = client.history(options.service, options.lines)
                redacted = client.redacted
        except NotRunning:
            redacted = False
            events = Reader(settings.state_directory).history(options.service, options.lines)
    except LedgerError as error:
        return _fail(str(error), FAILED)
    if options.json:
        _print_json({"events": to_dict(events), "redacted": redacted})
        return DONE
    for event in reversed(events):
        stack = shown(event.stack) or "-"
        print(f"{_when(event.when)}  {event.outcome.value:<13}  {stack:<16}  {printable(event.message)}")
        for line in event.output.splitlines():
            print(f"    {shown(line)}")
    if not events:
        print("nothing has happened yet")
    _say_redacted(redacted)
    return DONE


def _wait(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.control.client import Client
    from watcher.records.schema import Failed

    image = os.path.abspath(options.image) if "/" in options.image else options.image
    last = None
    with Client(settings.runtime_directory, timeout=options.timeout) as client:
        for last in client.wait(options.service, image):
            if not options.json:
                print(printable(last.message))
        redacted = client.redacted
    if last is None:
        raise Failed("the daemon ended before there was an outcome")
    if options.json:
        _print_json({**to_dict(last), "redacted": redacted})
    else:
        _say_redacted(redacted)
    return DONE if last.outcome is Outcome.APPLIED else FAILED


def _rollback(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.control.client import Client

    with Client(settings.runtime_directory, timeout=600) as client:
        if options.forget:
            forgotten = client.forget(options.service)
            if options.json:
                _print_json({"forgotten": to_dict(forgotten)})
            else:
                _print_forgotten(options.service, forgotten)
            return DONE
        event = client.rollback(options.service, options.to)
    if options.json:
        _print_json(to_dict(event))
    else:
        print(printable(event.message))
        print(f"It stays there until `confext-watcher rollback --forget {shown(options.service)}`.")
    return FAILED if event.outcome in (Outcome.FAILED, Outcome.NEEDS_RESTART) else DONE


def _print_forgotten(service: str, forgotten: Sequence[Quarantined]) -> None:
    print(f"{shown(service)}: free to have what is newest")
    for content in forgotten:
        what = content.source or content.digest
        print(f"  {shown(what)} is let in again; it was kept out because: {printable(content.reason)}")


def _check(settings: Settings, options: argparse.Namespace) -> int:
    from watcher.images.admission import host
    from watcher.images.image_check import examine

    made_for = host()
    results: list[dict[str, object]] = []
    for path in options.images:
        result: dict[str, object] = {"image": path, "admitted": False, "reason": ""}
        try:
            candidate, copy = examine(path, made_for, settings.image_max)
        except (Refused, Busy) as error:
            result["reason"] = str(error)
        except OSError as error:
            result["reason"] = error.strerror or str(error)
        else:
            result |= {
                "admitted": True,
                "name": candidate.name,
                "version": candidate.version,
                "format": copy.format.name if copy.format else "directory",
                "size": copy.size,
                "digest": copy.digest,
            }
        results.append(result)
    if options.json:
        _print_json({"images": to_dict(results)})
    else:
        for result in results:
            print(_check_line(result))
    return DONE if all(result["admitted"] for result in results) else FAILED


def _check_line(result: dict[str, object]) -> str:
    image = shown(str(result["image"]))
    if not result["admitted"]:
        return f"{image}: would be refused: {printable(str(result['reason']))}"
    label = shown(f"{result['name']} {result['version']}".rstrip())
    return f"{image}: good: {label}, {result['format']}, {result['size']} bytes, sha256 {result['digest']}"


def _print_services(services: Sequence[ServiceStatus]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SERVICE", "PID", "STACK", "SINCE", "LAST OUTCOME"):
        table.add_column(column, overflow="fold")
    for service in services:
        layers = [f"{layer.label} ({layer.digest[:12]})" for layer in service.layers]
        last = service.last
        row = (
            shown(service.service),
            str(service.pid or "-"),
            "\n".join(reversed(layers)) or ("its own /etc" if service.pid else service.state),
            _when(service.since),
            f"{last.outcome.value}, {_when(last.when)}: {printable(last.message)}" if last else "-",
        )
        table.add_row(*(Text(cell) for cell in row))
    # Only a terminal has a width that lines must fit; elsewhere a line stays one line.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=10_000)
    console.print(table)
    for service in services:
        for note in _notes(service):
            print(f"{shown(service.service)}: {note}")


def _notes(service: ServiceStatus) -> Iterator[str]:
    """What is out of the ordinary about a service."""
    if service.state == "needs-restart":
        yield "is not in a mount namespace that was made for it; restart it once to have its stack"
    if service.pinned is not None:
        yield "stays on this stack, by hand, until `confext-watcher rollback --forget`"
    for content in service.quarantined:
        reason = f": {printable(content.reason)}" if content.reason else ""
        yield f"kept out: {shown(content.source or content.digest)}{reason}"


def _say_redacted(redacted: bool) -> None:
    """Who is told less than there is to tell hears that, and what to do about it."""
    if redacted:
        hidden = "you see outcomes only: to see reasons, paths and outputs join the group confext-watcher"
        print(f"confext-watcher: {hidden}", file=sys.stderr)


def _when(usec: int | None) -> str:
    from datetime import datetime

    try:
        return datetime.fromtimestamp(usec / 1_000_000).strftime("%Y-%m-%d %H:%M:%S") if usec else "-"
    except (ValueError, OverflowError, OSError):
        return str(usec)  # beyond what the calendar has


def _print_json(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    # JSON leaves alone what a terminal may obey, such as U+009B: names of files are their owners' choice.
    print(re.sub(r"[^\n -~]", lambda found: _escaped(found[0]), text))


def _escaped(char: str) -> str:
    return char if char.isprintable() else json.dumps(char)[1:-1]


def _begin_log(settings: Settings, remarks: Sequence[Remark]) -> None:
    from watcher.records import journal

    journal.configure(level=settings.log_level)
    for remark in remarks:
        journal.say(remark)


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


def _fail(text: str, code: int) -> int:
    print(f"confext-watcher: {printable(text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
