# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the policies of a service say of images: `ImagePolicy=` of the watcher and of the service, and the unit's own.

A unit that systemd starts on an image that `ExtensionImagePolicy=` does not allow fails with 226/NAMESPACE. So that one
counts here too, and an image has to pass all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from watcher.managers.base import Service
from watcher.model import Copy, Refused, Setting, Trust
from watcher.settings.config import ServiceSettings, Settings
from watcher.settings.image_policy import KEY, Demand, demand


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


def require_allowed(policies: Iterable[Demand], copy: Copy) -> None:
    """Raise Refused for a copy that one of the policies does not allow."""
    why = refusal(policies, copy.trust, copy.format.file_system if copy.format is not None else "")
    if why:
        raise Refused(why)


def refusal(policies: Iterable[Demand], trust: Trust, file_system: str) -> str:
    """Why an image does not get in, one line; "" if it does.

    Args:
        file_system: "" for a tree.
    """
    return next(filter(None, (one.refusal(trust, file_system) for one in policies)), "")
