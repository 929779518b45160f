# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image and the files beside it are one drop: while the rest of it is awaited, the image does not get in.

Nothing tells of an image alone that more is to come. Two things do: the version before it has such files, as a tree
before it that had the marker (images/complete.py); and a policy that does not let the image in without them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from watcher.images.bundles import STEM
from watcher.images.sidecars import awaited
from watcher.model import Candidate, Copy, Incomplete, Layer, Look, Protection, Refused, Stack, Trust, shown
from watcher.resolve import sidecars
from watcher.rounds.image_policies import require_allowed
from watcher.settings.image_policy import Demand


class WholeDrop:
    """Of one look at a service.

    Args:
        accepted: what it has.
        store: directory of the copies.
        policies: which images may get in.
    """

    def __init__(self, look: Look, accepted: Stack, store: str, policies: Iterable[Demand]) -> None:
        paths = {candidate.path: pick.entry.slot for pick in look.picks for candidate in pick.candidates}
        there = [layer for layer in accepted.layers if layer.source in paths]
        self._slots = paths
        self._before = {layer.slot: layer for layer in there}
        self._store = store
        self._policies = tuple(policies)

    def require(self, candidate: Candidate, copy: Copy) -> None:
        """Let an image in.

        Raises:
            Incomplete: files beside it are awaited.
            Refused: a policy does not allow it.
        """
        unsigned = self._would_allow(replace(copy, trust=Trust(Protection.VERITY)))
        before = self._before.get(self._slots.get(candidate.path, ""))
        if before is not None and not candidate.sidecars and self._had(before, candidate, sidecars.VERITY):
            signature = not unsigned or self._had(before, candidate, sidecars.SIGNATURE)
            if missing := awaited(candidate, copy, signature=signature):
                named = shown(os.path.basename(before.source))
                raise Incomplete(
                    f"incomplete: {missing} beside it awaited, since {named} before it has such files: remove that"
                    " one if there are to be none any more"
                )
        try:
            require_allowed(self._policies, copy)
        except Refused as refused:
            missing = awaited(candidate, copy, signature=not unsigned)
            if missing and self._would_allow(replace(copy, trust=Trust(Protection.SIGNED))):
                raise Incomplete(f"incomplete: {missing} beside it awaited: {refused}") from refused
            raise

    def _would_allow(self, copy: Copy) -> bool:
        try:
            require_allowed(self._policies, copy)
        except Refused:
            return False
        return True

    def _had(self, before: Layer, candidate: Candidate, suffix: str) -> bool:
        """Whether such a file lies beside the version before a candidate."""
        copy = f"{self._store}/{before.digest}/{STEM}{suffix}"
        return before.source != candidate.path and os.path.lexists(copy)
