# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counted tries, systemd.v(7): "NAME_VERSION+LEFT-DONE.raw", kept up by renaming the dropped file.

Before each attempt one try is moved from LEFT to DONE; after a success the counters are removed. A file with nothing
left is not picked while there is another (`vpick.py`). One that failed and has tries left is tried again at the next
start of the service or of the watcher, or after `rollback --forget`. One that failed its last try is in quarantine like
any other. An attempt is all that may show that the file is bad: a check, a reload, and the next start of a service that
does not run.

The count belongs to the file. Services that share a directory share it: every attempt of any of them counts, and the
first success removes the counters. Two attempts at once are two: the second service finds the name that the first has
made. What one service has put into quarantine stays there when the file gets another name.

A rename never overwrites (RENAME_NOREPLACE), and is one step: after a kill the file has the old name or the new one.
Only files in a directory of the form `.v/` have counters; "+3" in any other name is part of that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

from watcher.model import Layer, Stack, Unsafe, shown
from watcher.mounts import syscalls
from watcher.records import journal
from watcher.resolve import vpick
from watcher.resolve.strict_modes import StrictModes
from watcher.resolve.trust import ROOT_ALONE, Trust

# Of a digest, in a note.
_DIGITS = 16

Renaming = Callable[[str, str], AbstractContextManager[None]]
"""Called with the old and the new path; the rename happens inside (`Watcher.renaming`)."""


def unseen(old: str, new: str) -> AbstractContextManager[None]:
    """A `Renaming` where no watcher has to know."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Counted:
    """A file's name taken apart: how many tries are left, how many were made."""

    stem: str
    left: int
    done: int
    suffix: str

    def next(self) -> str:
        """Its name while the next try is made."""
        return f"{self.stem}+{self.left - 1}-{self.done + 1}{self.suffix}"

    def good(self) -> str:
        """Its name after a try that went well."""
        return self.stem + self.suffix

    def is_later(self, other: Counted) -> bool:
        """Whether `other` may be the same file after further tries: each moves one from left to done."""
        same = (self.stem, self.suffix) == (other.stem, other.suffix)
        return same and other.done >= self.done and other.left + other.done == self.left + self.done


def counted(path: str) -> Counted | None:
    """The counters in the name of a file, None if it has none."""
    directory, name = os.path.split(path)
    return _taken_apart(name) if directory.endswith(".v") else None


def _taken_apart(name: str) -> Counted | None:
    """The counters are at the end of the name, before the suffix of an image, as for a pick."""
    rest = name.removesuffix(".raw")
    stem, left, done = vpick.counters(rest) or ("", 0, 0)
    return Counted(stem, left, done, name[len(rest) :]) if stem else None


def plain(path: str) -> str:
    """A path, or a name alone, without counters."""
    directory, name = os.path.split(path)
    counters = _taken_apart(name)
    return os.path.join(directory, counters.good()) if counters else path


def noted(stack: Stack, known: Stack) -> dict[str, int]:
    """How many tries were made of each counted file that is new in a stack: by the first digits of its digest."""
    new = (layer for layer in stack.layers if layer.digest not in known.digests)
    found = {layer.digest[:_DIGITS]: counted(layer.source) for layer in new}
    return {key: counters.done for key, counters in found.items() if counters is not None}


def uncounted(stack: Stack, known: Stack, before: Mapping[str, int]) -> dict[str, int]:
    """`noted()`, of the files of which this try was not counted yet.

    Args:
        before: what was noted before the files were renamed. If the watcher was killed in between, the name of a file
            says less.
    """
    return {key: done for key, done in noted(stack, known).items() if done < before.get(key, done + 1)}


def are_counted(stack: Stack) -> bool:
    """Whether any file of a stack has counters."""
    return any(counted(layer.source) is not None for layer in stack.layers)


def begin(
    stack: Stack, keys: Collection[str], service: str, renaming: Renaming = unseen, trust: Trust = ROOT_ALONE
) -> Stack:
    """Count one try of some layers of a stack; the stack with the files' names from now on.

    Args:
        keys: which, as `uncounted()` has it.
        trust: whom it lets drop things.

    Raises:
        FileNotFoundError: a file has been renamed or removed meanwhile; look again.
    """
    return Stack(
        tuple(
            _counted_once(layer, service, renaming, trust) if layer.digest[:_DIGITS] in keys else layer
            for layer in stack.layers
        )
    )


def succeed(stack: Stack, service: str, renaming: Renaming = unseen, trust: Trust = ROOT_ALONE) -> Stack:
    """Remove the counters of all layers of a stack; the stack with the files' names from now on."""
    return Stack(tuple(_proved_good(layer, service, renaming, trust) for layer in stack.layers))


def _counted_once(layer: Layer, service: str, renaming: Renaming, trust: Trust) -> Layer:
    counters = counted(layer.source)
    if counters is None or not counters.left:
        # With none left it keeps its name. Else services that refuse it would take each other's renames for somebody
        # who acts on the file, and try it again for ever.
        return layer
    try:
        with _directory(layer.source, trust) as directory:
            return _renamed(layer, directory, os.path.basename(layer.source), counters.next(), renaming)
    except FileNotFoundError:
        raise
    except (OSError, Unsafe) as error:
        return _not_counted(layer, service, error)


def _proved_good(layer: Layer, service: str, renaming: Renaming, trust: Trust) -> Layer:
    counters = counted(layer.source)
    if counters is None:
        return layer
    try:
        with _directory(layer.source, trust) as directory:
            name = _called_now(directory, os.path.basename(layer.source), counters)
            return _renamed(layer, directory, name, counters.good(), renaming)
    except FileNotFoundError:
        return layer  # removed, or another service's success was first
    except (OSError, Unsafe) as error:
        return _not_counted(layer, service, error)


@contextmanager
def _directory(path: str, trust: Trust) -> Iterator[str]:
    """A path that stays the same directory: that of a file. Raises Unsafe where strangers could choose it."""
    with StrictModes(trust) as modes:
        found = modes.open(os.path.dirname(path))
    try:
        if found.unsafe is not None:
            raise found.unsafe
        yield f"/proc/self/fd/{found.fd}"
    finally:
        os.close(found.fd)


def _called_now(directory: str, was: str, counters: Counted) -> str:
    """The name of a counted file, which another service's attempts may have renamed."""
    for name in os.listdir(directory):
        found = _taken_apart(name)
        if found is not None and counters.is_later(found):
            return name
    return was


def _renamed(layer: Layer, directory: str, old: str, new: str, renaming: Renaming) -> Layer:
    above = os.path.dirname(layer.source)
    with renaming(os.path.join(above, old), os.path.join(above, new)):
        syscalls.rename_noreplace(os.path.join(directory, old), os.path.join(directory, new))
    return replace(layer, source=os.path.join(above, new))


def _not_counted(layer: Layer, service: str, error: OSError | Unsafe) -> Layer:
    why = str(error) if isinstance(error, Unsafe) else error.strerror
    text = f"{service}: {shown(layer.source)}: its tries cannot be counted: {why}"
    journal.log.warning(text, service=service)
    return layer
