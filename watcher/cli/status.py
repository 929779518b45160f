# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher status`: what services run on."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Sequence

from watcher.cli import follow, show_status
from watcher.cli.answers import answer, fail, read
from watcher.control.client import Client
from watcher.model import Event
from watcher.records.schema import ExitStatus, ServiceNotFound, ServiceStatus
from watcher.settings.config import Settings
from watcher.settings.kernel_command_line import why_nothing_new

_OUTCOMES = 5
"""So many of the last outcomes are shown of one service."""


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    if options.follow:
        return _follow(settings, options)
    unknown: list[ServiceNotFound] = []
    history: dict[str, list[Event]] = {}

    def ask(client: Client) -> list[ServiceStatus]:
        def status(name: str | None) -> list[ServiceStatus]:
            return client.status(name, deep=name is not None)

        services = _chosen(options.services, status, unknown)
        for one in services if options.services and not options.json else ():
            history[one.service] = client.history(one.service, _OUTCOMES)
        return services

    def without_daemon() -> list[ServiceStatus]:
        from watcher.control import status
        from watcher.records import journal
        from watcher.records.ledger import Reader

        journal.configure()  # what cannot be read is said on standard error, beside the answer
        services = _chosen(options.services, functools.partial(status.without_daemon, settings), unknown)
        reader = Reader(settings.state_directory)
        history.update((one.service, reader.history(one.service, _OUTCOMES)) for one in services)
        print("confext-watcher: the daemon is not running: nothing that is dropped is used", file=sys.stderr)
        if os.path.isdir("/run/systemd/system"):
            print("    systemctl start confext-watcher.service", file=sys.stderr)
        return services

    services, redacted = read(settings, ask, without_daemon)
    if services or not options.services:
        nothing_new = why_nothing_new()
        parts = [show_status.glance(services)]
        if options.services:
            parts = [
                show_status.in_depth(one, history.get(one.service, ()), settings=not redacted)
                for one in services
            ]
        text = "\n\n".join("\n".join(lines) for lines in parts)
        text += f"\nservices get nothing new: {nothing_new}" if nothing_new else ""
        results = {"services": services, "redacted": redacted, "nothing_new": nothing_new}
        answer(options, results, [text])  # laid out already
    for error in unknown:
        fail(str(error), ExitStatus.FAILED)
    return ExitStatus.FAILED if unknown else ExitStatus.DONE


def _follow(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    """Until Ctrl-C. A daemon that is restarted is waited for."""
    unknown: list[ServiceNotFound] = []

    def look() -> list[ServiceStatus]:
        unknown.clear()
        with Client(settings.runtime_directory, timeout=30) as client:
            return _chosen(options.services, client.status, unknown)

    services = look()
    if unknown:
        raise unknown[0]
    follow.status(services, look, as_json=options.json)
    return ExitStatus.DONE


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
                named = [
                    one.service
                    for one in every
                    if any(fnmatch.fnmatchcase(one.service, each) for each in patterns)
                ]
                chosen = [one for each in named for one in status(each)]
                if not chosen:
                    raise ServiceNotFound.among(name, (one.service for one in every))
            else:
                chosen = status(name)
        except ServiceNotFound as error:
            unknown.append(error)
        else:
            found |= {one.service: one for one in chosen}
    return list(found.values())
