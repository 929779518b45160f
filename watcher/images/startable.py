# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we can mount, and systemd may not: a unit would run on it, and fail at its next start."""

from __future__ import annotations

from collections.abc import Iterable

from watcher.images.formats.image import Image
from watcher.model import Copy, Refused, shown
from watcher.settings import device_mapper
from watcher.settings.image_policy import ROOT, UNIT_KEY, Demand


def require_startable(copy: Copy, policies: Iterable[Demand]) -> None:
    """Raise Refused for a copy, verified as it is, on which systemd could not start a unit.

    Of an image with verity data it sets up dm-verity (262 always, 257 where there is a signature), unless the unit's
    policy does not allow that. Without a device mapper that fails with 226/NAMESPACE. Where a unit has no policy of its
    own, its drop-in says so (`unit_drop_in.py`); to change the policy of a unit is not ours.

    With a device mapper all that lies beside an image lies beside its slot. For systemd it is `signed` then where there
    is a signature, by whomever, and `verity` where there is none; a policy that does not say that word fails the start,
    whatever else it allows.
    """
    if not isinstance(copy.format, Image) or copy.format.brought is None:
        return
    brought, is_there = copy.format.brought, device_mapper.is_there()
    taken_for = "verity" if brought.signature is None else "signed"
    for one in policies:
        setting = one.setting
        if setting.key != UNIT_KEY or one.policy is None:
            continue
        allowed = one.policy.effective(ROOT)
        if is_there and brought.beside and taken_for not in allowed:
            raise Refused(
                f"systemd takes it for {taken_for} by what lies beside it, which {UNIT_KEY}={shown(setting.value)}"
                f" ({shown(setting.source)}) does not allow: remove that, or change the policy"
            )
        if not is_there and allowed & {"verity", "signed"}:
            raise Refused(
                f"it has verity data, which systemd would set up at the start of the unit, as {UNIT_KEY}="
                f"{shown(setting.value)} ({shown(setting.source)}) has it: there is no device mapper here. Say"
                " ImagePolicy= in [X-Confext] instead, which is held against what the watcher has verified"
            )
