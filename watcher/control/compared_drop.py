# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stack that `confext-watcher diff --to IMAGE` compares with: what it would be if that were dropped.

Apart from compared.py, because to admit an image takes what no other comparison needs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from watcher.control.compared import Choice
from watcher.control.subject import Subject
from watcher.images.image_check import examine
from watcher.images.made_for import host
from watcher.model import Busy, Kind, Layer, Refused, Stack, shown
from watcher.records.schema import Failed
from watcher.resolve.sources import slot_name
from watcher.rounds.choose import distinct
from watcher.settings.config import Settings
from watcher.watch.lease import Lease


@contextlib.contextmanager
def dropped(settings: Settings, one: Subject, images: Sequence[str]) -> Iterator[Choice]:
    """The newest accepted stack with these images or trees in it, for the block.

    The newest accepted one, because that is what a drop would be added to.

    Raises:
        Failed: one would not be admitted, or is being written to.
    """
    stack = one.kept[0].stack if one.kept else Stack()
    declared = {entry.slot for entry in (one.kept[0].entries if one.kept else ()) if entry.declared}
    copies = []
    with contextlib.ExitStack() as held:
        for path in images:
            try:
                if not os.path.isdir(path):
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    held.callback(os.close, fd)
                    # It is mounted by its path, and nobody may write to it meanwhile.
                    held.enter_context(Lease(fd))
                candidate, copy, trust, _ = examine(path, host(), settings.image_max)
            except (Refused, Busy) as error:
                raise Failed(f"{shown(path)}: would be refused: {error}")
            layer = Layer(
                "", candidate.name, candidate.version, copy.digest, candidate.kind, candidate.path, trust
            )
            stack = placed(stack, layer, declared)
            copies.append(copy)
        yield Choice("dropped", stack, tuple(copies))


def placed(stack: Stack, layer: Layer, declared: set[str] | frozenset[str] = frozenset()) -> Stack:
    """A stack with a new layer: in place of the one of its name, else where a drop of this name would come. Pure.

    Images lie beneath trees, declared ones beneath dropped ones, and these by name (`resolve/sources.py`).

    Args:
        declared: slots of entries that the unit declares.
    """

    def order(one: Layer) -> tuple[bool, bool, str]:
        return one.kind is Kind.DIRECTORY, one.slot not in declared, one.slot

    new = replace(layer, slot=slot_name(layer.name, layer.kind))
    layers = list(stack.layers)
    for count, old in enumerate(layers):
        if (old.name, old.kind) == (new.name, new.kind):
            layers[count] = replace(new, slot=old.slot)
            break
    else:
        at = next((count for count, old in enumerate(layers) if order(old) > order(new)), len(layers))
        layers.insert(at, new)
    return Stack(distinct(layers))
