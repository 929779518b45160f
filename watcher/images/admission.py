# SPDX-License-Identifier: LGPL-2.1-or-later
"""May this become a layer of that service? From a candidate on the disk to a copy in the store, or one line why not.

The watcher looks up the path once, and judges each step on the way (`strict_modes.py`). It follows links: people deploy
with them. From then on it works on the descriptor of the file that it found, whatever happens to the path.

Each content is read once for all services. Its verdict, good or bad, is remembered by what `stat` says of it, and its
release files by its digest. What depends on the service (its root's os-release, the file's name) is asked each time;
that costs microseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import replace

from watcher.images import bundles, originals
from watcher.images.complete import Complete, Rule, Seen
from watcher.images.copy_release import release_of
from watcher.images.effects import effects
from watcher.images.errors import translated
from watcher.images.extension import Release, read_release
from watcher.images.formats.image import Image
from watcher.images.made_for import Host, parsed, passed_over, require_match
from watcher.images.opened import opened
from watcher.images.readable import require_readable
from watcher.images.sidecars import beside, explained
from watcher.images.store import Store
from watcher.images.verification import Proofs
from watcher.images.verified_mounts import VerifiedMounts
from watcher.model import (
    Busy,
    Candidate,
    Copy,
    Incomplete,
    Kind,
    Later,
    Layer,
    Refused,
    Sysext,
    Trust,
)
from watcher.mounts.workers import MountWorkers
from watcher.resolve import release
from watcher.resolve.strict_modes import StrictModes, Way
from watcher.watch.writers import Writers


class Admission:
    """Admits candidates; safe to use from several threads.

    Args:
        complete: judges whether trees are.
        proofs: what was proved of images.
        mounts: how the workers mount them, where that proves something too.
        writers: who writes to files.
    """

    def __init__(
        self,
        store: Store,
        workers: MountWorkers,
        complete: Complete | None = None,
        proofs: Proofs | None = None,
        mounts: VerifiedMounts | None = None,
        writers: Writers | None = None,
    ) -> None:
        self._store = store
        self._workers = workers
        self._complete = complete or Complete()
        self._releases: dict[str, Release] = {}
        self._were_read: set[str] = set()
        self._effects: dict[str, tuple[str, ...]] = {}
        self._proofs = proofs or Proofs()
        self._mounts = mounts or VerifiedMounts()
        self._writers = writers

    def admit(
        self,
        candidate: Candidate,
        made_for: Host,
        at_hand: set[str],
        modes: StrictModes | None,
        rule: Rule = Rule(),  # noqa: B008 -- frozen
    ) -> Copy:
        """The store's copy of a candidate. Blocks; must not run inside `MountWorkers.call()`, which it waits for.

        Hold `Store.using()` until a stack with the copy has been accepted.

        Args:
            at_hand: gets the digest of what is not refused. What has to wait is in no stack. Without this the store
                would collect its copy, and each look would copy it again.
            modes: whom the service trusts; None: everybody.
            rule: when a tree is complete.

        Raises:
            Refused, Incomplete: it cannot be a layer; `str()` says why, for a line that begins with its path.
            Busy: another process is writing to it, or may be.
            Later: something is missing here, not in the image.
        """

        def judge(copy: Copy) -> None:
            try:
                trusted = replace(copy, trust=self.trust(copy))  # nothing of it is mounted before
                found = self._release(trusted, made_for.root)
                # A directory comes file by file: the release file may be still to come.
                if not found[0] and candidate.kind is Kind.DIRECTORY:
                    raise Incomplete(
                        "incomplete: there is no etc/extension-release.d/extension-release.* in it yet"
                    )
                require_match(candidate, found, made_for)
            except (OSError, Busy):
                at_hand.add(copy.digest)
                raise
            at_hand.add(copy.digest)

        def complete(tree: Seen) -> None:
            self._complete.require(tree, rule)

        terms = candidate.filename, made_for.terms
        return copied(self._store, candidate, judge, terms, modes, complete, self._writers)

    def forget(self, digests: Iterable[str]) -> None:
        """Drop what is remembered of content that has left the store."""
        for digest in digests:
            self._releases.pop(digest, None)
            self._were_read.discard(digest)
            self._effects.pop(digest, None)
            self._proofs.forget((digest,))
            self._mounts.forget(digest)

    def trust(self, copy: Copy) -> Trust:
        """What is proved of a copy in the store, remembered by its digest and the certificates that there are.

        Blocks: of an image with verity data, all of it is read the first time.

        Raises:
            Refused: its hash tree says that it is damaged; its signature is not one.
            Later: the copy is gone; openssl is missing.
        """
        if not isinstance(copy.format, Image) or copy.format.brought is None:
            return Trust()
        with (
            translated(f"the copy {copy.digest} in the store"),
            explained(bundles.is_in_bundle(copy)),
            bundles.verity(copy) as verity,
        ):
            trust = self._proofs.trust(copy.digest, verity) if verity else Trust()
            return self._mounts.trust(copy.digest, trust)

    def asks_for(self, layer: Layer, names: Collection[str]) -> str:
        """What a layer says that a unit of these names is to be told, see `release.asks_for()`.

        Blocks, as `admit()`; "" also of one whose copy cannot be read any more.
        """
        try:
            found, strict_false = self._release(self._store.copy(layer))
            filename = os.path.basename(layer.source)
            chosen = release.choose_release_file(filename, found, strict_false, layer.kind)
        except (Refused, Later, OSError):
            return ""
        return release.asks_for(parsed(found[chosen]), names)

    def effects(self, digest: str) -> tuple[str, ...]:
        """What an admitted content does to `/etc` besides bringing files, and what in it is passed over; a line each.

        That is to the `/etc` of the first service that it was looked at for: others may have a root of their own.
        """
        return self._effects.get(digest, ())

    def _release(self, copy: Copy, host_root: str = "/") -> Release:
        found = self._releases.get(copy.digest)
        if found is None:

            def read(root: int) -> None:
                if copy.kind is Kind.DIRECTORY:
                    self._effects[copy.digest] = effects(root, host_root)
                    return
                # Many services may get the same image at once: one thread reads it.
                with self._store.verdicts.turn(("read", copy.digest)):
                    if copy.digest not in self._were_read:
                        require_readable(root, self._store.image_max)
                        self._effects[copy.digest] = effects(root, host_root)
                        self._were_read.add(copy.digest)

            found = release_of(copy, self._workers, read, self._mounts.ready)
            self._releases[copy.digest] = found
            self._effects[copy.digest] = (*self.effects(copy.digest), *passed_over(found))
        return found


def copied(
    store: Store,
    candidate: Candidate,
    judge: Callable[[Copy], object] | None = None,
    terms: Hashable = None,
    modes: StrictModes | None = None,
    complete: Callable[[Seen], object] = lambda tree: None,
    writers: Writers | None = None,
) -> Copy:
    """The store's copy of a candidate, made now or before.

    Args:
        judge: whether the copy will do as a confext; raises Refused if not.
        terms: all that the judgement depends on besides the content. A refusal is remembered with them. Otherwise the
            store would collect what was refused, and copy it again at every look.
        modes: see `Admission.admit()`. A refusal because of who could write is no verdict on the content, and is never
            remembered.
        complete: raises Busy or Incomplete for a tree that is not. Not asked for one that was copied before.
        writers: who writes to images. That several did at once is not remembered as a verdict on the content either.

    Raises: as `Admission.admit()`, and what `judge` and `complete` raise.
    """
    way = Way()
    with opened(candidate, modes, way) as (fd, guard), beside(candidate, fd, modes) as files:
        content = (
            originals.Tree(fd, guard)
            if candidate.kind is Kind.DIRECTORY
            else originals.ImageFile(fd, candidate, files, writers)
        )
        verdicts = store.verdicts
        verdicts.recall((content.key, terms))
        with verdicts.turn(content.key):
            copy = verdicts.recall(content.key)
            if copy is None or not store.verify(copy.digest):
                if isinstance(content, originals.Tree):
                    require_no_sysext(fd)
                    complete(content.seen(candidate.path, way))
                copy = _copy(store, content)
        if judge is not None:
            try:
                judge(copy)
            except Refused as refused:
                if verdicts.recall(content.key) == copy:
                    verdicts.remember((content.key, terms), refused)
                raise
        return copy


def require_no_sysext(root: int) -> None:
    """Raise Sysext for a tree that is one, complete or not: systemd mounts it as it is, not we."""
    try:
        read_release(root)
    except Sysext:
        raise
    except (Refused, OSError):
        pass  # admission says so, once the tree is complete


def _copy(store: Store, content: originals.ImageFile | originals.Tree) -> Copy:
    verdict: Copy | Refused
    try:
        verdict = content.copy(store)
    except Refused as refused:
        verdict = refused
    if content.lasting:
        store.verdicts.remember(content.key, verdict)
    if isinstance(verdict, Refused):
        raise verdict
    return verdict
