# SPDX-License-Identifier: LGPL-2.1-or-later
"""What we can mount, and systemd may not: a unit would run on it, and fail at its next start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from watcher.images.formats.image import Image
from watcher.model import Copy, Protection, Refused, shown
from watcher.settings import device_mapper
from watcher.settings.image_policy import ROOT, UNIT_KEY, Demand


def require_startable(copy: Copy, policies: Iterable[Demand]) -> None:
    """Raise Refused for a copy, verified as it is, on which systemd could not start a unit.

    Of an image with verity data it sets up dm-verity (262 always, 257 where there is a signature), unless the unit's
    policy does not allow that. Without a device mapper that fails with 226/NAMESPACE. Where a unit has no policy of its
    own, its drop-in says so (`unit_drop_in.py`); to change the policy of a unit is not ours.

    With a device mapper all that lies beside an image lies beside its slot. For systemd it is `signed` then where there
    is a signature, by whomever, and `verity` where there is none; a policy that does not say that word fails the start,
    whatever else it allows. A signature that it cannot verify fails the start, too.
    """
    if not isinstance(copy.format, Image) or copy.format.brought is None:
        return
    brought, is_there = copy.format.brought, device_mapper.is_there()
    taken_for = "verity" if brought.signature is None else "signed"
    own = [one for one in policies if one.setting.key == UNIT_KEY and one.policy is not None]
    if is_there and brought.signature is not None and copy.trust.protection is not Protection.SIGNED:
        _require_no_key(copy, own, beside=brought.beside)
    for one in own:
        assert one.policy is not None
        setting, allowed = one.setting, one.policy.effective(ROOT)
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


def _require_no_key(copy: Copy, own: Sequence[Demand], *, beside: bool) -> None:
    """Raise Refused where systemd would look for the key of a signature that is not known.

    257 looks where the policy has the word, as that of a unit that says nothing has, and fails with ENOKEY, whatever
    else the policy allows (do_crypt_activate_verity()).
    """
    if all("signed" in one.policy.effective(ROOT) for one in own if one.policy is not None):
        otherwise = (
            "remove the signature beside it"
            if beside
            else f"have the unit say {UNIT_KEY}=root=verity+unprotected+absent:=unused+absent"
        )
        raise Refused(
            f"{copy.trust.remark}, and systemd would not start the unit on it: put the certificate of its key into"
            f" /etc/verity.d, or {otherwise}"
        )
