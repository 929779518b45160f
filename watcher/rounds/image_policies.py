# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the policies of a service say of images: `ImagePolicy=` of the watcher and of the service, and the unit's own.

A unit that systemd starts on an image that `ExtensionImagePolicy=` does not allow fails with 226/NAMESPACE. So that one
counts here too, and an image has to pass all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from watcher.images import certificates
from watcher.managers.base import Service
from watcher.model import Copy, Interest, Kind, Layer, Refused, Remark, Setting, Stack, Trust
from watcher.settings.config import ServiceSettings, Settings
from watcher.settings.image_policy import KEY, UNIT_KEY, Demand, demand, unit_refusal


def demands(
    watcher: Settings, service: ServiceSettings, unit_policy: Setting | None = None
) -> tuple[Demand, ...]:
    """All policies that count for a service.

    Args:
        unit_policy: see `Service`.
    """
    own = [one for one in (*service.written, *watcher.written) if one.key == KEY]
    return tuple(demand(one) for one in (*own, *filter(None, [unit_policy])))


def demands_of(watcher: Settings, service: Service) -> tuple[Demand, ...]:
    """All policies that count for a service."""
    return demands(watcher, service.settings, service.unit_policy)


def interests(policies: Iterable[Demand]) -> tuple[Interest, ...]:
    """Where a change is a reason to look again: a certificate may have come, and what was refused gets in."""
    if all(one.policy is not None and one.policy.allows(Trust()) for one in policies):
        return ()
    return tuple(Interest(directory, pattern=r".*\.crt") for directory in certificates.DIRECTORIES)


def require_allowed(policies: Iterable[Demand], copy: Copy) -> None:
    """Raise Refused for a copy that one of the policies does not allow."""
    file_system = copy.format.file_system if copy.format is not None else ""
    for one in policies:
        why = one.refusal(copy.trust, file_system, tree=copy.kind is Kind.DIRECTORY)
        if not why and copy.format is not None:
            why = unit_refusal(one, copy.format.parts)
        if why:
            raise Refused(why)


def not_allowed(policies: Iterable[Demand], stack: Stack) -> tuple[Remark, ...]:
    """What of a stack that a service has would not get in now: a policy is stricter than it was. It stays."""
    found = ((layer, _why_not(policies, layer)) for layer in stack.layers)
    return tuple(Remark("warning", layer.source, why) for layer, why in found if why)


def _why_not(policies: Iterable[Demand], layer: Layer) -> str:
    tree = layer.kind is Kind.DIRECTORY
    for one in policies:
        why = one.refusal(layer.trust, layer.file_system, tree=tree)
        if why:
            # systemd asks nothing of trees.
            fails = one.setting.key == UNIT_KEY and not tree
            then = ", and systemd will not start the unit on it" if fails else ""
            return f"stays, but would not get in now{then}: {why}"
    return ""


def let_in_anyway(wanted: Stack, before: Stack) -> list[Remark]:
    """What there is to say of new layers that prove less than they claim: no policy asks for more."""
    return [
        Remark(
            "warning",
            layer.source,
            f"{layer.trust.remark}; let in, since no policy asks for more (ImagePolicy=)",
        )
        for layer in wanted.layers
        if layer.trust.remark and layer.digest not in before.digests
    ]
