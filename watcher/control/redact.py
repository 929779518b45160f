# SPDX-License-Identifier: LGPL-2.1-or-later
"""What strangers are told: each answer of the control socket goes through here.

Strangers are all users but root, the user that the watcher runs as, and the members of the group `confext-watcher`
(peers.py). The watcher tells them outcomes and verdicts, one word each; and names, versions and digests, which all
users can read in the mount table of the service as well (proc_pid_mountinfo(5)). It does not tell them

- what commands have printed, which may be a password: outputs, and the reasons and messages that quote them;
- which paths there are, also in directories that they cannot read: sources, remarks, and again reasons and messages;
- the settings of services, whose commands may have a password in them, too.

A field is private until this module names it. A private field is empty, so that readers of the JSON find every key. An
event's message is a shorter sentence, made of public fields.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from watcher.model import Event, Layer, Trust, shown
from watcher.records.schema import (
    Answer,
    ErrorReply,
    MembersOnly,
    NoSuchStack,
    NotPermitted,
    PlannedChange,
    Quarantined,
    ServiceNotFound,
    ServiceStatus,
    TooManyCalls,
    types_of,
)

PUBLIC: dict[type, frozenset[str]] = {
    cls: frozenset(fields.split())
    for cls, fields in {
        Layer: "slot name version digest kind trust file_system",
        # How it was proved names files.
        Trust: "protection",
        Event: "service outcome verdict message when stack previous image version digest swap_usec total_usec layers",
        # Its kind would tell which names there are in a directory.
        Answer: "status",
        Quarantined: "service digest when",
        # What lies in directories is private, whether it is used or not.
        ServiceStatus: "service manager state pid stack accepted layers since last pinned quarantined on_trial step"
        " step_since",
        # Its remarks are about what lies in directories: even their number is private. A report has everything.
        PlannedChange: "service changes stack wanted layers wanted_layers reload",
    }.items()
}
"""The fields of each answer that strangers are told. A remark has none."""

PUBLIC_RESULTS = frozenset({"services", "events", "truncated", "changes", "event", "answer", "redacted"})
"""The results of methods that strangers are told; of each, what is public of its type."""

PUBLIC_ERRORS: frozenset[type[ErrorReply]] = frozenset(
    {ServiceNotFound, NoSuchStack, NotPermitted, MembersOnly, TooManyCalls}
)
"""The errors whose parameters strangers are told: these repeat what the stranger asked."""


def redacted(value: Any) -> Any:
    """An answer, or a part of one, as strangers are told it."""
    if isinstance(value, Event):
        value = dataclasses.replace(value, message=_sentence(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        public = PUBLIC.get(type(value), frozenset())
        return dataclasses.replace(
            value,
            **{
                name: redacted(getattr(value, name)) if name in public else _blank(kind)
                for name, kind in types_of(type(value)).items()
            },
        )
    return tuple(map(redacted, value)) if isinstance(value, list | tuple) else value


def redacted_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a method as strangers are told them. Raises ValueError for one that is private."""
    private = results.keys() - PUBLIC_RESULTS
    if private:
        raise ValueError(f"not for strangers: {private}")
    return {name: redacted(value) for name, value in results.items()}


def redacted_error(error: ErrorReply) -> dict[str, Any]:
    """The parameters of an error as strangers are told them: why something failed is private."""
    parameters = error.parameters()
    return parameters if type(error) in PUBLIC_ERRORS else dict.fromkeys(parameters, "")


def _sentence(event: Event) -> str:
    image = f"{event.image} {event.version}".rstrip()
    return f"{shown(event.service)}: {shown(image)} {event.result}".replace(":  ", ": ")


def _blank(kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return None
    return (typing.get_origin(kind) or kind)()
