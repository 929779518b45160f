# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is worth remembering of a service between rounds: to spare work, and to be patient. Nothing that decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from watcher.model import Stack
from watcher.mounts.converge import Compared


@dataclass(frozen=True, slots=True)
class Afterglow:
    """A stack that proved good just now: should the service go down within a moment, that is put down to it.

    Attributes:
        restarts: how often it had been started again by then (`Service.went_down_since`).
    """

    restarts: int
    until: float
    stack: Stack


@dataclass(slots=True)
class Memory:
    """Of one service.

    Attributes:
        interests: what is watched for it.
        attempts: rounds in a row that left something to wait for.
        mounted: digests of what it runs on, None while that is not known.
        at_hand: digests of what the last look came upon, in a stack or not: what has to wait is not copied again.
        compared: see `converge()`.
        counted: digests of a stack whose try was counted, and which has to wait before it can be made.
        held: what is kept out of it for the moment: digests (or `STACK` and an identity) with the reason.
        held_for: the start of the service for which `held` holds.
        fell: it went down with what is kept out, so that its next start is systemd's or our doing.
        output: what the command printed that the last stack failed by.
        ran: when a round saw it running, `time.monotonic()`.
        blameless: of a service that went down, whether a copy was found damaged since it ran; None: not looked at.
    """

    interests: tuple[object, ...] | None = None
    attempts: int = 0
    mounted: frozenset[str] | None = None
    at_hand: frozenset[str] = frozenset()
    afterglow: Afterglow | None = None
    compared: Compared = field(default_factory=dict)
    counted: frozenset[str] = frozenset()
    held: dict[str, str] = field(default_factory=dict)
    held_for: str = ""
    fell: bool = False
    output: str = ""
    ran: float = 0.0
    blameless: bool | None = None
