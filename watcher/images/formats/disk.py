# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which partition of a disk image is the root, as systemd would choose it for an extension (UAPI.2, dissect_image()).

A service must see the same whether the watcher puts the stack on a running one, or systemd starts it. So what versions
of systemd would take differently is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from watcher.images.formats.gpt import NO_AUTO, Partition, Table
from watcher.images.formats.partition_types import KNOWN, OTHERS, PARTS, PartitionType
from watcher.model import Refused, Sysext
from watcher.resolve import version
from watcher.settings import architectures

_NO_BLOCK_IO = 1 << 1
"""Flag of a partition that firmware is not to look into."""
_EMPTY = "_empty"
"""Label of a partition that systemd-sysupdate has yet to fill. systemd 257 looks at it all the same."""


class Root(NamedTuple):
    """
    Attributes:
        verity: the partition with the verity data, None without one.
        signature: the partition with the signature of that, None without one.
        others: what is no part of a confext, by designator, and its flags.
    """

    partition: Partition
    verity: Partition | None
    signature: Partition | None
    others: tuple[tuple[str, int], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """By the names of systemd.image-policy(7): which there are, and their flags."""
        named = (("root", self.partition), ("root-verity", self.verity), ("root-verity-sig", self.signature))
        return (*((name, part.flags) for name, part in named if part is not None), *self.others)


def root(table: Table, architecture: str = "") -> Root:
    """The root partition.

    Args:
        architecture: the host's, by systemd's name ("x86-64").

    Raises:
        Sysext: there is only a usr partition.
        Refused: no root, or none that all versions of systemd agree on.
    """
    native = architecture or architectures.native()
    looked_at = [
        (KNOWN[one.type], one)
        for one in table.partitions
        if one.type in KNOWN and not one.flags & NO_AUTO
    ]  # fmt: skip
    roots, verity, signatures = (
        [pair for pair in looked_at if pair[0][:2] == ("root", part)] for part in PARTS
    )
    if any(kind[:2] == ("usr", "") for kind, _ in looked_at):
        if not roots:
            raise Sysext(
                "not a confext but a sysext: its disk image has a usr partition and no root partition"
            )
        raise Refused(
            "a disk image with a usr partition: of a confext there is only /etc, in the root partition"
        )
    if not roots:
        raise Refused(_no_root(table))
    if signatures and not verity:
        raise Refused("a disk image with a signature, and without the verity data that it is made for")
    chosen = _newest(roots, native)
    filled = [(kind, one) for kind, one in roots if one.label != _EMPTY]
    if not filled or _newest(filled, native) != chosen:
        raise Refused(
            f"a disk image whose root partition {chosen.number} is called {_EMPTY}: systemd 257 takes it, later ones"
            " do not; remove it, or give it the flag no-auto"
        )
    verity_of, signature_of = (_newest(found, native) if found else None for found in (verity, signatures))
    return Root(chosen, verity_of, signature_of, _others(table))


def _others(table: Table) -> tuple[tuple[str, int], ...]:
    """Of each kind the first, as systemd finds it; for the ESP there is another flag in the place of NO_AUTO."""
    found: dict[str, int] = {}
    for one in table.partitions:
        designator = OTHERS.get(one.type)
        ignored = _NO_BLOCK_IO if designator == "esp" else NO_AUTO
        if designator is not None and not one.flags & ignored:
            found.setdefault(designator, one.flags)
    return tuple(found.items())


def _no_root(table: Table) -> str:
    there = (
        f"{len(table.partitions)} partitions, none of them" if table.partitions else "no partitions, so none"
    )
    return (
        f"a disk image with {there} a root partition (by its type, and without the flag no-auto):"
        " build it with systemd-repart --make-ddi=confext"
    )


def _newest(roots: Sequence[tuple[PartitionType, Partition]], native: str) -> Partition:
    """The better architecture, then the newer label. Of several foreign architectures none is better."""
    (best_kind, best), *others = roots
    for kind, one in others:
        better = _rank(kind.architecture, native) - _rank(best_kind.architecture, native)
        if better > 0 or (better == 0 and version.compare(one.label, best.label) > 0):
            best_kind, best = kind, one
    return best


def _rank(architecture: str, native: str) -> int:
    return 2 if architecture == native else int(architecture == architectures.SECONDARY.get(native))
