# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls `Trace` and `Compare`, apart from client.py: their answers are of many classes, which others do without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from watcher.control.client import Client, read
from watcher.records.schema import Failed
from watcher.records.traces import Diff, Origin

ROOT_ONLY = (
    "--to: images that are not dropped yet only root may compare: the kernel has to mount them. Use sudo"
)


def origin(client: Client, service: str, paths: Sequence[str] = ()) -> Origin:
    """Which images its files come from. Raises ServiceNotFound, MembersOnly, Failed."""
    answers = client.stream("Trace", service=service, paths=list(paths) or None)
    replies = [read(Origin, answer.get("origin")) for answer in answers]
    if paths:
        return replace(replies[0], paths=tuple(path for reply in replies for path in reply.paths or ()))
    return replace(replies[0], files=tuple(file for reply in replies for file in reply.files or ()))


def diff(client: Client, service: str, before: str | None = None, after: Sequence[str] = ()) -> Diff:
    """What differs between two stacks. Raises ServiceNotFound, MembersOnly, Failed.

    Args:
        before, after: as of `diff.differences()`; an image is Failed.
    """
    if named_images(after):
        raise Failed(ROOT_ONLY)
    answers = client.stream("Compare", service=service, before=before, after=after[0] if after else None)
    replies = [read(Diff, answer.get("diff")) for answer in answers]
    return replace(replies[0], files=tuple(file for reply in replies for file in reply.files))


def named_images(after: Sequence[str]) -> list[str]:
    """The images among the arguments of `--to`. Raises Failed: there are none, but more than one stack."""
    images = [argument for argument in after if "/" in argument or argument.endswith(".raw")]
    if len(after) > 1 and not images:
        raise Failed("--to: one stack, or images, each with a / in its path or ending in .raw")
    return images
