# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be proved of an image: its hash tree (dm-verity), and the signature of the tree's root hash.

The whole tree is verified over all of the data, once for each content: the store's copy never changes. By whom it is
signed is asked again when the certificates are others (certificates.py). Without a device mapper that is all the
proof there is: it holds for what was dropped, and not against one who writes to the disk under the store. With one, see
verified_mounts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from watcher.images import hash_tree, signature
from watcher.images.certificates import Keys
from watcher.images.formats.base import Extent as Extent
from watcher.images.verdicts import Verdicts
from watcher.model import Protection, Refused, Trust, shown

KEYS = Keys()
"""Those of this host."""


class Verity(NamedTuple):
    """What an image brings to be verified by, whether as partitions or as files beside it.

    Attributes:
        data: its file system.
        tree: the verity superblock and the hash tree. At offset 0 it is a file of its own, which may be incomplete.
        root_hash: None where nothing tells it.
        signature: PKCS#7 (DER) over the root hash in lower-case hexadecimal digits, None without one.
        root_hash_from: for people, where the root hash was found: "its signature".
    """

    data: Extent
    tree: Extent
    root_hash: bytes | None
    signature: bytes | None
    root_hash_from: str = ""


def verify(verity: Verity, keys: Keys = KEYS, over: str = "the store's copy") -> Trust:
    """What is proved of the data. Blocks, reads all of it.

    Args:
        over: what is read, for people.

    Raises:
        Refused, Incomplete: data, tree, root hash and signature contradict each other: one line that says which.
        Later: the machine lacks something (the program openssl).
        Busy, OSError: it cannot be read.
    """
    return _signed(verity, _tree(verity, over), keys)


def _tree(verity: Verity, over: str) -> Trust:
    if verity.root_hash is None:
        raise Refused("it has verity data and no root hash, without which that proves nothing")
    hash_tree.verify(verity.data, verity.tree, verity.root_hash)
    origin = f", by the root hash of {verity.root_hash_from}" if verity.root_hash_from else ""
    how = f"its hash tree was verified over {over}{origin}"
    return Trust(Protection.VERITY, root_hash=verity.root_hash.hex(), how=how)


def _signed(verity: Verity, trust: Trust, keys: Keys) -> Trust:
    if verity.signature is None or verity.root_hash is None:
        return trust
    found = signature.signer(verity.signature, verity.root_hash, keys.ring())
    if found.certificate is None:
        return replace(trust, remark=found.remark)
    return replace(
        trust,
        protection=Protection.SIGNED,
        signer=found.certificate.subject,
        fingerprint=found.certificate.fingerprint,
        how=f"{trust.how}, its signature by {shown(found.certificate.path)}",
    )


class Proofs:
    """Remembers what was proved. Threads may share it: one reads, the others learn."""

    def __init__(self, keys: Keys = KEYS) -> None:
        self._keys = keys
        self._turns = Verdicts()
        self._trees: dict[str, Trust | Refused] = {}
        self._trusts: dict[str, tuple[str, Trust]] = {}

    def trust(self, content: str, verity: Verity) -> Trust:
        """As `verify()`; the signature is verified anew when there are other certificates.

        Args:
            content: stands for all bytes of `verity`, which never change: the digest of a copy.
        """
        with self._turns.turn((content,)):
            tree = self._trees.get(content)
            if tree is None:
                try:
                    tree = _tree(verity, "the store's copy")
                except Refused as refused:
                    tree = refused
                self._trees[content] = tree
            if isinstance(tree, Refused):
                raise type(tree)(*tree.args)
            if verity.signature is None:
                return tree
            ring = self._keys.ring().id
            known = self._trusts.get(content)
            if known is None or known[0] != ring:
                known = self._trusts[content] = ring, _signed(verity, tree, self._keys)
            return known[1]

    def forget(self, contents: Iterable[str]) -> None:
        """Drop what is remembered of contents that have left the store."""
        for content in contents:
            self._trees.pop(content, None)
            self._trusts.pop(content, None)
