# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes `tests/images/version_1.tar.gz`: the state and runtime directories of the last version that had no records.

    git worktree add /tmp/old 474653c
    PYTHONPATH=/tmp/old python tests/support/version_1.py tests/images/version_1.tar.gz

Its modules are that version's, so none is imported by name here.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ODD = os.fsdecode(b"caf\xe9.raw")
INVOCATION = "0123456789abcdef0123456789abcdef"


def made(path: str) -> Any:
    return importlib.import_module(path)


class Old:
    """Both directories, and what the version's own code writes into them."""

    def __init__(self, base: Path) -> None:
        self.model = made("watcher.model")
        self.state, self.runtime = str(base / "state"), str(base / "run")
        os.mkdir(self.runtime)
        self.store = made("watcher.images.store").Store(self.state, 1 << 30, 1 << 30, 3)
        self.ledger = made("watcher.records.ledger").Ledger(self.state)
        notes = made("watcher.rounds.state")
        self.trial = notes.Trial
        self.trials = notes.Trials(self.state)
        self.counted = notes.CountedTries(self.state)
        self.pending = notes.Pending(self.runtime)

    def layer(self, content: str, slot: str = "web.raw", source: str = "") -> Any:
        digest = hashlib.sha256(content.encode()).hexdigest()
        path = Path(self.state, "store", digest)
        if not path.exists():
            path.write_text(content)
            path.chmod(0o400)
        name = slot.removesuffix(".raw")
        where = source or f"/srv/{slot}.v/{name}_{content}.raw"
        return self.model.Layer(slot, name, content, digest, self.model.Kind.IMAGE, where)

    def accept(self, unit: str, *layers: Any) -> Any:
        stack = self.model.Stack(layers)
        entries = [
            self.model.Entry(layer.slot, os.path.dirname(layer.source), layer.kind, True) for layer in layers
        ]
        self.store.accept(unit, stack, entries)
        return stack

    def quarantine(self, service: str, digest: str, source: str = "") -> None:
        quarantined = made("watcher.records.schema").Quarantined
        self.ledger.append(quarantine=[quarantined(service, digest, f"bad for {service}", 5, source)])

    def register(self, name: str) -> None:
        registration = made("watcher.managers.registration")
        one = registration.Registration(name=name, pid=1, started=1, namespace=(1, 1))
        registration.services_directory(self.runtime)
        registration.register(self.runtime, one)

    def applied(self, service: str, stack: Any) -> None:
        event = self.model.Event(
            service,
            self.model.Outcome.APPLIED,
            f"{service}: applied",
            3,
            stack.id,
            swap_usec=1,
            layers=stack.layers,
        )
        self.ledger.append(event)


def fill(old: Old) -> None:
    layer, accept = old.layer, old.accept

    # A unit with several stacks, on trial, owed a reload, with sysexts.
    base = layer("base", ODD)
    for version in ("1", "2", "3"):
        stack = accept("web.service", base, layer(version))
        old.applied("web.service", stack)
    old.trials.begin("web.service", old.trial(stack.id))
    old.pending.owe("web.service", INVOCATION)
    old.quarantine("web.service", "b" * 64, "/srv/web.raw.v/web_4.raw")
    old.quarantine("web.service", "stack:0123456789abcdef")
    drop_in = made("watcher.managers.systemd.unit_drop_in")
    drop_in.write_sysexts(old.state, "web.service", ["/srv/tools.v", f"/srv/{ODD}"])

    # It had failed before; a try was counted for a stack that is not accepted yet.
    stack = accept("down.service", layer("1"))
    old.trials.begin("down.service", old.trial(stack.id, was_down=True))
    old.counted._note("down.service", {layer("5").digest: 2, "c" * 64: 1})

    # Bad, and it stays.
    stack = accept("rolling.service", layer("1"))
    old.trials.begin("rolling.service", old.trial(stack.id, bad=True))

    # The empty stack is on trial.
    accept("empty.service", layer("1"))
    stack = accept("empty.service")
    old.trials.begin("empty.service", old.trial(stack.id))

    # A bad stack is being taken out: the good one is accepted already, its outcome is not recorded yet.
    good, bad = accept("back.service", layer("1")), accept("back.service", layer("2"))
    old.trials.begin("back.service", old.trial(bad.id))
    old.quarantine("back.service", bad.layers[0].digest, bad.layers[0].source)
    accept("back.service", *good.layers)
    old.pending.owe("back.service", INVOCATION)

    # A standalone service, pinned.
    first = accept("job.exec", layer("1", ODD))
    accept("job.exec", layer("2", ODD))
    old.register("job")
    old.ledger.pin("job", first.id)
    old.quarantine("job", "d" * 64)
    old.pending.owe("job", "7-1234")
    old.counted._note("job", {first.layers[0].digest: 1})

    # Two of one name; the name of another ends as the slots of a standalone one do.
    accept("twin.service", layer("1"))
    accept("twin.service.exec", layer("2"))
    old.quarantine("twin.service", "e" * 64)
    accept("odd.exec.exec", layer("1"))
    old.trials.begin("odd.exec", old.trial(layer("1").digest))

    # Without slots.
    old.register("new")
    old.quarantine("new", "f" * 64)
    old.quarantine("later.service", "f" * 64)
    old.ledger.pin("later.service", "")
    drop_in.write_sysexts(old.state, "tools.service", ["/srv/tools"])


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        old = Old(Path(base))
        fill(old)
        old.ledger.close()
        old.store.close()
        with tarfile.open(target, "w:gz") as tar:
            for name in ("state", "run"):
                tar.add(f"{base}/{name}", name)


if __name__ == "__main__":
    main(sys.argv[1])
