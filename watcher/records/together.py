# SPDX-License-Identifier: LGPL-2.1-or-later
"""What costs the same for many as for one, and so is done for many at once: bringing files to the disk, one commit.

A function that needs such a thing is a generator. It yields what it needs, and goes on when that is done, for whoever
needs the same then. `watch/offload.py` gathers what its jobs yield. For a function that is the only one, there is
`alone()`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Together:
    """What a function needs.

    Attributes:
        function: does it for several. What it raises, each of them gets.
        item: what it is to be done for.
        last: nobody waits for it: it may be done when nothing else is left to do.
    """

    function: Callable[[Sequence[Any]], None]
    item: Any
    last: bool = False


WHEN_QUIET = Together(lambda items: None, None, last=True)
"""Nothing is needed but that nothing else is left to do."""

Gathering = Generator[Together, None, T]
"""A function that yields what it needs; T is what it returns."""


def alone(steps: Gathering[T]) -> T:
    """Run a function for which nothing is done together with another's."""
    try:
        need = next(steps)
        while True:
            try:
                need.function([need.item])
            except Exception as error:  # noqa: BLE001 -- raised where it is needed
                need = steps.throw(error)
            else:
                need = next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def done_alone(function: Callable[P, Gathering[T]]) -> Callable[P, T]:
    """The same function for who is the only one: it returns when all is done."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return alone(function(*args, **kwargs))

    return call
