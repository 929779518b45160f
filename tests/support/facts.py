# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of a service, in few words: stacks by the names of their layers, records, facts."""

from __future__ import annotations

import hashlib
from typing import Any

from watcher.model import Entry, Kind, Layer, Stack
from watcher.records.state import Accepted, Quarantine, State
from watcher.rounds.facts import Facts

NOW = 1_000_000_000
"""Microseconds since the epoch."""


def layer(name: str, counters: str = "") -> Layer:
    """A layer by its name and version, "web1", with the counters in the name of its file, "+2-1"."""
    stem = name.rstrip("0123456789")
    version = name[len(stem) :]
    path = f"/srv/{stem}.raw.v/{stem}_{version}{counters}.raw"
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Layer(f"{stem}.raw", stem, version, digest, Kind.IMAGE, path)


def stack(*names: str) -> Stack:
    """A stack of layers, bottom to top."""
    return Stack(tuple(layer(name) for name in names))


def entries(one: Stack) -> tuple[Entry, ...]:
    """The entries that the layers of a stack come from."""
    return tuple(Entry(each.slot, f"/srv/{each.slot}.v", each.kind) for each in one.layers)


def record(accepted: Stack, /, **changes: Any) -> State:
    """A record with an accepted stack."""
    return State(**({"accepted": Accepted(accepted, entries(accepted), when=1)} | changes))


def kept_out(one: Stack, **changes: Any) -> Quarantine:
    """Its topmost layer is kept out."""
    return Quarantine(one.layers[-1].digest, "it is bad", 1, one.layers[-1].source, **changes)


def facts(accepted: Stack, /, *, state: dict[str, Any] | None = None, **changes: Any) -> Facts:
    """A service with an accepted stack, which runs on that and is told of it.

    Args:
        state: what its record says beside that.
    """
    usual: dict[str, Any] = {
        "now": NOW,
        "state": record(accepted, **(state or {})),
        "running": True,
        "invocation": "first",
        "wanted": accepted,
        "fallback": accepted,
        "shown": accepted.id,
    }
    merged = usual | changes
    return Facts(**({"entries": entries(merged["wanted"])} | merged))
