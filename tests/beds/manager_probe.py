# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs systemd's manager alone, inside a bed: commands on standard input, JSON lines on standard output.

{"changed": "web.service", "service": {...} or null}
reload web.service -> {"reloaded": {...}}; processes web.service -> {"processes": [...]}; learn web.service
"""

from __future__ import annotations

import json
import sys
from typing import Any

import trio

from watcher.managers.base import Service
from watcher.managers.systemd.manager import Systemd, check
from watcher.model import Unsupported
from watcher.records import journal
from watcher.settings.config import Settings


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def shown(service: Service | None) -> dict[str, Any] | None:
    if service is None:
        return None
    return {
        "pid": service.main.pid if service.main else 0,
        "comm": service.main.read("comm").strip() if service.main else "",
        "invocation": service.invocation,
        "starting": service.starting,
        "failed": service.failed,
        "root": service.root,
        "aliases": service.aliases,
        "images": [entry.path for entry in service.declared.images],
        "directories": [entry.path for entry in service.declared.directories],
        "confext_dirs": service.declared.confext_dirs,
        "reload": service.settings.reload,
    }


async def serve(manager: Systemd) -> None:
    async with trio.open_nursery() as nursery:
        async for line in trio.wrap_file(sys.stdin):
            verb, name = line.split()
            nursery.start_soon(obey, manager, verb, manager.services[name])


async def obey(manager: Systemd, verb: str, service: Service) -> None:
    if verb == "reload":
        reloaded = await manager.reload(service)
        fields = ("ok", "told", "reason", "output", *(("interrupted",) if reloaded.interrupted else ()))
        say(reloaded={field: getattr(reloaded, field) for field in fields})
    elif verb == "processes":
        say(processes=manager.processes(service))
    elif verb == "learn":
        await manager.learn(service)
        say(learned=service.name)


async def main() -> None:
    journal.configure("logfmt", "debug")
    try:
        await check()
    except Unsupported as error:
        say(unsupported=str(error))
        return
    manager = Systemd(Settings())

    def changed(name: str) -> None:
        say(changed=name, service=shown(manager.services.get(name)))

    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run, changed)
        say(started=sorted(manager.services))
        await serve(manager)
        nursery.cancel_scope.cancel()
    manager.close()


trio.run(main)
