# SPDX-License-Identifier: LGPL-2.1-or-later
"""Before a stack is accepted: the service's own test of the new `/etc` (`Check=`), where the service cannot see it.

The test runs in a shadow of the service's mount namespace that has the new stack on `/etc`. So `nginx -t` reads what
nginx would read, with the same sandbox mounts and root directory. What the test does to mounts goes with the shadow.
Where the service does not run, or in the host's namespace, its manager makes what its next start would see, with the
new stack. The service's manager ends what the test leaves running.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence

from watcher.managers.base import Ended, Manager, NoShadow, Service
from watcher.model import Copy, Later, Layer, Stack, shown
from watcher.mounts.process import Gone
from watcher.mounts.swap import shadow
from watcher.records.together import Gathering
from watcher.rounds.tools import Tools
from watcher.settings import values
from watcher.text import reason_in

CopyOf = Callable[[Layer], Copy]

# A command that does nothing: what is asked is whether systemd comes so far.
_NOTHING = ("/bin/true",)
_BEGIN_SEC = 10.0


async def check(tools: Tools, service: Service, stack: Stack, copies: Mapping[str, Copy]) -> Ended:
    """Run every `Check=` of a running service against a stack, in order, until one fails: as `run_all()`.

    Raises:
        Gone: the service has ended.
        Later: a test could not be run.
        Unanswered: its files do not answer.
        HostNamespace, Refused, OSError, ...: as `swap()`.
    """

    def make(held: Service) -> Gathering[int]:
        yield from ()
        if held.main is None:
            raise Gone(f"{service.name} has ended")
        namespace = held.main.namespace()
        try:
            return tools.workers.call(shadow, tools.workers, namespace, stack, copies)
        finally:
            os.close(namespace)

    shadowed = await tools.in_turn(service, make)
    try:
        settings = service.settings
        return await run_all(tools.manager, service, shadowed, settings.check, settings.check_usec, "check")
    finally:
        os.close(shadowed)


async def check_at_start(
    manager: Manager, service: Service, stack: Stack, copies: Mapping[str, Copy]
) -> Ended:
    """`check()` of a service that does not run where a stack can be put in place: as its next start would see it.

    Raises:
        NoShadow: that cannot be made.
        Later: a test could not be run.
    """
    layers = [copies[layer.digest] for layer in stack.layers]

    async def run(words: Sequence[str], seconds: float) -> Ended:
        return await manager.execute_at_start(service, layers, words, seconds)

    return await _run_each(run, service.settings.check, service.settings.check_usec, "check")


async def unstartable(manager: Manager, service: Service, stack: Stack, before: Stack, copy: CopyOf) -> str:
    """Why the manager cannot start a service on a stack, where it can on the one before; "" if that is not so.

    Raises:
        Later: it could not be found out.
    """

    async def why(one: Stack) -> str:
        layers = [copy(layer) for layer in one.layers]
        try:
            await manager.execute_at_start(service, layers, _NOTHING, _BEGIN_SEC)
        except NoShadow as error:
            return str(error)
        return ""  # a process has begun, or would have if the command were there

    reason = await why(stack)
    if not reason or await why(before):
        return ""
    return f"systemd cannot start the service on it: {reason}"


async def run_all(
    manager: Manager, service: Service, namespace: int, commands: tuple[str, ...], usec: int, what: str
) -> Ended:
    """Run command lines one after the other, each for at most `usec` microseconds, until one fails.

    Args:
        what: what they are, for the reason: "check".

    Returns:
        With a whole line as the reason, and the output of all that were run.

    Raises:
        Gone: the service has ended.
        Later: one could not be run, which says nothing about the stack.
    """

    async def run(words: Sequence[str], seconds: float) -> Ended:
        return await manager.execute(service, namespace, words, seconds)

    return await _run_each(run, commands, usec, what)


async def _run_each(
    run: Callable[[Sequence[str], float], Awaitable[Ended]], commands: Sequence[str], usec: int, what: str
) -> Ended:
    output = ""
    for command in commands:
        try:
            ended = await run(values.split(command), usec / 1_000_000)
        except Later as error:
            raise Later(f"{what} {shown(command)!r} {error}") from error
        output += ended.output
        if ended.reason:
            return Ended(f"{what} {shown(command)!r} {ended.reason}{reason_in(ended.output)}", output)
    return Ended("", output)
