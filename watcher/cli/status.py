# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher status`: what services run on."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
from collections.abc import Callable, Sequence

from watcher.cli import show
from watcher.cli.answers import answer, fail, read
from watcher.records.schema import ExitStatus, ServiceNotFound, ServiceStatus
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    unknown: list[ServiceNotFound] = []

    def without_daemon() -> list[ServiceStatus]:
        from watcher.control import status
        from watcher.records import journal

        journal.configure()  # what cannot be read is said on standard error, beside the answer
        services = _chosen(options.services, functools.partial(status.without_daemon, settings), unknown)
        print("confext-watcher: the daemon is not running", file=sys.stderr)
        return services

    services, redacted = read(
        settings, lambda client: _chosen(options.services, client.status, unknown), without_daemon
    )
    if services or not options.services:
        nothing_new = why_nothing_new()
        lines = [*show.services(services, settings=bool(options.services) and not redacted)]
        lines += [f"services get nothing new: {nothing_new}"] if nothing_new else []
        answer(options, {"services": services, "redacted": redacted, "nothing_new": nothing_new}, lines)
    for error in unknown:
        fail(str(error), ExitStatus.FAILED)
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
                every = status(None)
                chosen = [
                    one for one in every if any(fnmatch.fnmatchcase(one.service, each) for each in patterns)
                ]
                if not chosen:
                    raise ServiceNotFound.among(name, (one.service for one in every))
            else:
                chosen = status(name)
        except ServiceNotFound as error:
            unknown.append(error)
        else:
            found |= {one.service: one for one in chosen}
    return list(found.values())
