# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's own language: commands, options, and what `--help` says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from watcher import __version__

_ALIASES = {"log": "history"}
_SOURCES = ("--extension-image", "--extension-directory")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of one command, whose name is `command`. Exits where they are wrong, see argparse."""
    options = _parser().parse_args(_joined(arguments))
    options.command = _ALIASES.get(options.command, options.command)
    return options


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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    commands.add_parser("run", help="the daemon, in the foreground")
    _add_exec(commands.add_parser("exec", help="start a program on its stack, without systemd"))
    _add_asking(commands)
    _add_setup(commands)
    enable = commands.add_parser("enable", help="have a unit of systemd take part, and say when that is so")
    enable.add_argument("service", metavar="UNIT", help="`nginx` is nginx.service")
    enable.add_argument(
        "entry",
        nargs="?",
        default="",
        metavar="ENTRY",
        help="directory of versions to make, such as web.raw.v",
    )
    check = commands.add_parser("check", help="would this image be admitted here?")
    check.add_argument("images", nargs="+", metavar="IMAGE", help="image file (*.raw) or directory tree")
    _add_build(commands.add_parser("build", help="make an image from a directory, or from files"))
    commands.add_parser("doctor", help="is this host fit, and what to do where it is not")
    origin = commands.add_parser("origin", help="which image the files of a service's /etc come from")
    origin.add_argument("service", metavar="SERVICE")
    origin.add_argument(
        "paths",
        nargs="*",
        default=[],
        metavar="PATH",
        help="below /etc: what each layer has there, and what covers what; without: all that the host does not have so",
    )
    _add_diff(commands.add_parser("diff", help="what would change in a service's /etc, or did"))
    for name, command in commands.choices.items():
        if name not in ("run", "exec", *_ALIASES):
            command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a directory with an etc/ in it; a file or directory whose path begins with etc/ or /etc/; or PLACE=PATH,"
        " such as etc/nginx=./conf",
    )

    def add(*option: str, metavar: str, text: str) -> None:
        parser.add_argument(*option, default="", metavar=metavar, help=text)

    add("--output", "-o", metavar="FILE", text="NAME_VERSION.raw, or a directory, such as web.raw.v/")
    add("--name", metavar="NAME", text="its name, where FILE has none")
    add("--version", metavar="VERSION", text="its version, where FILE has none")
    add("--for", metavar="SYSTEM", text="any (as without), host: systems as this one; or ID:VERSION_ID")
    add("--scope", metavar="SCOPE", text="CONFEXT_SCOPE=, of system, initrd, portable; with commas between")
    parser.add_argument(
        "--format",
        default="",
        choices=("squashfs", "erofs", "ddi"),
        help="squashfs; erofs; ddi: a disk image with verity data, made by systemd-repart",
    )
    add("--sign", metavar="KEY", text="sign it with this private key (PEM); it is a ddi then")
    add("--certificate", metavar="CERTIFICATE", text="of that key (PEM)")


def _add_asking(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser(
        "status", help="services, their stacks and versions, since when, last outcome"
    )
    status.add_argument(
        "services",
        nargs="*",
        metavar="SERVICE",
        help="these alone, in depth; `nginx` is nginx.service, and patterns as of the shell may be used",
    )
    status.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="stay, and keep it up to date until Ctrl-C; where that is no terminal, a line for each change",
    )

    plan = commands.add_parser("plan", help="what a look now would change, without doing it")
    plan.add_argument("service", nargs="?", metavar="SERVICE")
    plan.add_argument(
        "--debug",
        action="store_true",
        help="of one SERVICE, with a report for the bug tracker: what the look has found, and the next step; it holds"
        " paths, and what the service's commands have printed",
    )

    plan.add_argument(
        "--check",
        action="store_true",
        help="also what its Check= says of that, where the service cannot see it; exit status 1 if it fails",
    )
    plan.add_argument(
        "--stat", action="store_true", help="also the files that would change, as of `diff --stat`"
    )

    _add_history(
        commands.add_parser(
            "history", aliases=[*_ALIASES], help="what was applied, refused, rolled back, when and why"
        )
    )
    wait = commands.add_parser(
        "wait", help="block until an image is applied or refused; the exit status says which"
    )
    wait.add_argument("service", metavar="SERVICE")
    wait.add_argument("image", metavar="IMAGE", help="its path or file name")
    wait.add_argument(
        "--timeout",
        type=float,
        default=None,
        metavar="SECONDS",
        help="give up after so long; for so long a daemon that is restarted is waited for, too",
    )

    rollback = commands.add_parser("rollback", help="back to the stack before, and stay there")
    rollback.add_argument("service", metavar="SERVICE")
    which = rollback.add_mutually_exclusive_group()
    which.add_argument("--to", metavar="STACK", help="to this stack (see `history`), or what it begins with")
    which.add_argument(
        "--forget", action="store_true", help="undo: let it have what is newest, and all that was kept out"
    )


def _add_history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("service", nargs="?", metavar="SERVICE")
    parser.add_argument(
        "--verbose",
        "-v",
        action="store_true",
        help="also what a service that took its stack well has printed, and logged as errors; exact times",
    )
    parser.add_argument("--lines", "-n", type=int, default=20, metavar="N", help="the newest N (20)")
    parser.add_argument(
        "--outcome",
        action="append",
        default=[],
        metavar="OUTCOME,...",
        help="these alone, such as refused,failed,rolled-back",
    )
    parser.add_argument(
        "--since",
        default="",
        metavar="TIME",
        help="from then on: 2h, today, yesterday, 2026-11-30, `2026-11-30 12:00`",
    )
    parser.add_argument(
        "--image", default="", metavar="IMAGE", help="of an image: web, web_1.4.raw, or how its digest begins"
    )


def _add_setup(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    init = commands.add_parser(
        "init",
        help="have a unit of systemd take part, with a first version of what it has now, and its check",
    )
    init.add_argument("service", metavar="UNIT", help="`nginx` is nginx.service")
    init.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="PATH",
        help="of the host's /etc, for the first version; may be given several times; without: as its recipe says",
    )
    init.add_argument("--name", default="", metavar="NAME", help="of the image; without: the unit's")
    init.add_argument(
        "--recipe",
        default="",
        metavar="NAME|FILE",
        help="this recipe; `none`: without; without: the one for the unit",
    )
    init.add_argument("--user", default="", metavar="USER", help="who may deploy, besides root")
    remove = commands.add_parser("remove", help="undo `init`: the service has the host's own /etc again")
    remove.add_argument("service", metavar="UNIT", help="`nginx` is nginx.service")
    remove.add_argument("--all", action="store_true", help="also what `init` has not made")
    for parser in (init, remove):
        parser.add_argument("--yes", action="store_true", help="do it without asking")
        parser.add_argument("--dry-run", action="store_true", help="only show what would be done")


def _add_diff(parser: argparse.ArgumentParser) -> None:
    # The service first: `--to` takes all that follows it.
    parser.usage = "confext-watcher diff SERVICE [--from STACK] [--to STACK|IMAGE...] [OPTION]..."
    parser.epilog = "Exit status: 0 no difference, 1 there are some, 2 trouble."
    parser.add_argument("service", metavar="SERVICE")
    parser.add_argument(
        "--from",
        dest="before",
        metavar="STACK",
        help="this stack (see `history`), or what it begins with; a number: so many accepted stacks back; `shown`, or"
        " without: what the service sees now; `none`: the host's /etc",
    )
    parser.add_argument(
        "--to",
        dest="after",
        nargs="+",
        default=[],
        metavar="STACK|IMAGE",
        help="this stack, or what it would be if these images or trees were dropped (with a / in it, or ending in"
        " .raw); without: what the service should have now",
    )
    parser.add_argument(
        "--stat", action="store_true", help="one line for each file, and how many lines differ"
    )


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.usage = "confext-watcher exec --name NAME [OPTION]... -- PROGRAM [ARGUMENT]..."
    parser.add_argument("--name", required=True, help="name of the service, such as web.service")

    def add_list(option: str, metavar: str, what: str) -> None:
        parser.add_argument(option, action="append", default=[], metavar=metavar, help=what)

    add_list("--confext-dir", "DIR", "directory that images are dropped into")
    add_list("--extension-image", "PATH", "an image, or a directory PATH.raw.v/")
    add_list("--extension-directory", "PATH", "a tree, or a directory PATH.v/")
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
    add_list(
        "--check",
        "COMMAND",
        "the service's own test of a new /etc, run before it can see that; refused if it fails",
    )
    add_list(
        "--health-check",
        "COMMAND",
        "run after a reload: must succeed for 2 s, within 10 s; if it does not, rolled back",
    )
    add_list("--set", "KEY=VALUE", "any other setting of [X-Confext], such as HealthWatchSec=5s")
    parser.add_argument(
        "program", nargs="+", metavar="PROGRAM", help="the program and its arguments, after --"
    )
