# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store: a copy of every admitted image and tree, by its digest; and the accepted stacks made of them.

    store/DIGEST        a file of mode 0400, a directory tree, or a bundle (bundles.py): whole, and never changed
    store/.tmp-SIZE-*   being written (and locked), or being removed, or damaged; SIZE bytes are set aside for it
    store/.lock         shared: copies are looked for, made and put into a stack; exclusive: copies are removed
    store/.names        shared: a stack gets its links, or a temporary file its name; exclusive: names are taken away
    stacks/, units/     see stacks.py; for the locks, store_names.py

A service starts on a copy, and is rolled back to one: the dropped file may be overwritten, truncated or deleted. The
owner of the store alone can read it: trees keep their modes, set-id bits included.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from watcher.images import bundles, tree, unmounted
from watcher.images.errors import NO_SPACE, StoreFull, require_room, require_size, translated
from watcher.images.files import copy_file, leased_digest
from watcher.images.formats.probe import probe
from watcher.images.integrity import Whole
from watcher.images.sidecars import VerityData
from watcher.images.stacks import TEMPORARY
from watcher.images.states import Change, History, States
from watcher.images.store_names import DIGEST, Names
from watcher.images.verdicts import Verdicts
from watcher.model import Copy, Entry, Kind, Later, Layer, Mountable, Refused, Stack, shown
from watcher.records import durable
from watcher.records.state import State
from watcher.records.together import Gathering, done_alone
from watcher.watch.lease import Lease


class Store:
    """The store of one state directory. Threads may share it.

    Args:
        state_directory: absolute path; made if it does not exist.
        store_max: bytes all copies together may take, each file, directory and link as `tree.in_blocks()` has it
            (`StoreMax=`).
        image_max: bytes one image may have, or one tree may take in the same way (`ImageMax=`).
        keep_stacks: accepted stacks that `collect` keeps for each unit (`KeepStacks=`), the current one included.
        history: outcomes of a service, newest first: a damaged record is made anew of them. May raise LedgerError.

    Attributes:
        whole: which copies are whole, and which took the place of damaged ones.
    """

    def __init__(
        self,
        state_directory: str,
        store_max: int,
        image_max: int,
        keep_stacks: int,
        history: History = lambda slots: (),
    ) -> None:
        self.verdicts = Verdicts()
        self.configure(store_max, image_max, keep_stacks)
        self.state_directory = state_directory
        self._path = self.copies = f"{state_directory}/store"
        durable.make(state_directory)
        durable.make(self._path, 0o700)
        self._states = States(state_directory, history)
        for private in (self._path, self._states.stacks.directory):
            os.chmod(private, 0o700)  # it may have been there already, with another mode
        self._names = Names(self._path)
        self._directory = self._names.directory
        self.whole = Whole(self._directory)
        self._room = threading.Lock()
        self._copies: dict[str, Copy] = {}

    def configure(self, store_max: int, image_max: int, keep_stacks: int) -> None:
        """Set other limits. What was refused is looked at anew."""
        self.store_max = store_max
        self.image_max = image_max
        self.keep_stacks = keep_stacks
        self.verdicts.clear()

    def close(self) -> None:
        self._names.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def using(self) -> io.FileIO:
        """`hold()`, in a `with` statement."""
        return self.hold()

    def hold(self, wait: bool = True) -> io.FileIO:
        """Nothing is collected until what is returned is closed. Holders do not exclude each other; may be nested.

        Raises:
            Busy: another thread or process removes copies (that takes milliseconds), and `wait` is false.
            OSError: no descriptor is left.
        """
        return self._names.hold(wait)

    def add_image(self, fd: int, format: Mountable, lease: Lease, parts: VerityData | None = None) -> Copy:
        """Copy the image behind `fd`, which `lease` (entered) protects, and what lies beside it. Hold `using()`.

        Raises:
            Busy: another process has opened it for writing.
            Refused: larger than `image_max`.
            StoreFull: no room; the same content found in the store needs none.
            Later: reading or writing failed.
        """
        size = os.fstat(fd).st_size
        if parts is not None:
            return self._add_bundle(fd, bundles.room(size, parts), lease, parts)
        self._require_size(size)
        with translated("cannot be copied into the store"):
            try:
                digest = self._write_image(fd, size, lease)
            except (StoreFull, OSError) as error:
                if not lease.held():
                    raise
                digest = self._found_instead(error, lambda: leased_digest(fd, size, lease))
            if not lease.exact:
                # A server may have said something else when the format was looked at.
                self._copies.pop(digest, None)
                return self._copy(digest)
        return self._made(digest, size, Kind.IMAGE, format)

    def _add_bundle(self, fd: int, size: int, lease: Lease, parts: VerityData) -> Copy:
        self._require_size(size)
        with translated("cannot be copied into the store"):
            try:
                with self._set_aside(size, Kind.DIRECTORY) as (name, made):
                    digest, files = bundles.write(made, fd, lease, parts)
                    durable.fsync_tree(made, files)
                    self.whole.place(name, digest)
            except (StoreFull, OSError) as error:
                digest = self._found_instead(error, lambda: bundles.find(self._directory, fd, lease, parts))
            return self._copy(digest)

    def add_tree(self, root: int, signature: tree.Signature) -> Copy:
        """Copy the directory tree `root`, whose signature was taken before. Hold `using()`.

        Raises: as `add_image`; Refused also for what no tree may have in it.
        """
        self._require_size(signature.size)
        with translated("cannot be copied into the store"):
            tree.wait_for_clock(signature)
            try:
                digest = self._write_tree(root, signature)
            except (StoreFull, OSError) as error:
                digest = self._found_instead(error, lambda: tree.digest_of(root, signature))
        return self._made(digest, signature.size, Kind.DIRECTORY)

    def verify(self, digest: str) -> bool:
        """Whether there is a whole copy of that digest. Blocks: see integrity.py.

        Raises:
            Later: the store cannot be looked into.
        """
        with translated("the store cannot be looked into"):
            return self.whole.verify(digest)

    def is_whole(self, stack: Stack) -> bool:
        """Whether all copies of a stack are there and whole. Blocks, raises as `verify()`."""
        return all(map(self.verify, stack.digests))

    def doubt(self, unit: str) -> None:
        """Something went wrong with the accepted stack of a unit: its copies are read again before they are used."""
        self.whole.doubt((self.accepted(unit) or Stack()).digests)

    def was_damaged(self, unit: str, since: float) -> bool:
        """Whether a copy of the accepted stack of a unit is damaged now, or was found damaged.

        Blocks: all are read again.

        Args:
            since: the latter after this time, `time.monotonic()`.
        """
        stack = self.accepted(unit) or Stack()
        self.whole.doubt(stack.digests)
        return not self.is_whole(stack) or self.whole.damaged_since(stack.digests, since)

    def copy(self, layer: Layer) -> Copy:
        """The copy that a layer of an accepted stack is.

        Raises:
            Later: it is gone or damaged.
        """
        with translated(f"the copy of {layer.label} in the store, {layer.digest}"):
            try:
                return self._copy(layer.digest)
            except (FileNotFoundError, Refused) as error:
                reason = "gone" if isinstance(error, OSError) else f"damaged, remove it: {error}"
                raise Later(f"the copy of {layer.label} in the store, {layer.digest}, is {reason}") from error

    def usage(self) -> int:
        """Bytes that all copies take, with what is set aside for those being made."""
        return sum(self._size_of(name) for name in os.listdir(self._directory))

    def state(self, unit: str) -> State:
        """The record of a service: `State()` if it has none; with what could not be written yet.

        One that cannot be read, or is a later version's, is set aside with one warning, and made anew.

        Args:
            unit: the name of its slots.

        Raises:
            Later: the machine does not let us read it, or write a new one.
        """
        with translated(f"the record of {shown(unit)} cannot be read"):
            return self._states.state(unit)

    def states(self) -> Iterable[tuple[str, State]]:
        """The records of all services, by the names of their slots. Raises as `state()`."""
        with translated("the records cannot be looked at"):
            return [(unit, self._states.state(unit)) for unit in self._states.stacks.links.units()]

    def changing(self, unit: str, change: Change) -> Gathering[State]:
        """Read the record of a service, change, write and return it: one step for all other threads and processes.

        Nothing is written where nothing changes. When this returns, a power cut does not undo it.

        Args:
            change: pure; makes the new record. To change the accepted stack is for `accept()`.

        Raises:
            Later: it could not be written. It holds all the same, in memory: `state()` has it, and the next `change()`
                or `accept()` of the service that can be written writes it.
        """
        with translated(f"the record of {shown(unit)} cannot be written, it is kept in memory only"):
            return (yield from self._states.changing(unit, change))

    change = done_alone(changing)

    def accepting(
        self, unit: str, stack: Stack, entries: Sequence[Entry], change: Change = lambda state: state
    ) -> Gathering[State]:
        """Make `stack` the accepted stack of `unit`, its slots and the record in one atomic step. Hold `using()`.

        With the same stack, names and entries, from the same places, the slots stay as they are.

        Args:
            change: makes the new record, which is returned, of the one that has the new stack already.

        Raises:
            Later: a copy is not in the store (any more), or the record cannot be written; the old stack stays, and of
                what `change` would have made nothing holds.
        """
        with translated(f"the stack of {shown(unit)} cannot be recorded"):
            mounted = unmounted.noted(stack, self._states.state(unit).accepted.mounted)
            with self._names.naming():
                for layer in stack.layers:
                    if not self._names.holds(layer.digest, None):
                        raise Later(f"the copy {layer.digest} of {layer.label} is gone from the store")
                return (yield from self._states.accepting(unit, stack, entries, mounted, change))

    accept = done_alone(accepting)

    def settle(self) -> None:
        """After this, a power cut undoes nothing that was accepted: for who tells of it. Raises Later: not known."""
        with translated("what was accepted may not be on the disk yet"):
            self._states.stacks.links.settle()

    def accepted(self, unit: str) -> Stack | None:
        """The accepted stack, None if there never was one. Raises as `state()`."""
        accepted = self.state(unit).accepted
        return accepted.stack if accepted.when else None

    def stacks(self, unit: str) -> tuple[Stack, ...]:
        """The last accepted stacks that are kept, newest first, each once. Raises as `state()`."""
        with translated(f"the stacks of {shown(unit)} cannot be looked at"):
            return tuple(accepted.stack for accepted in self._states.stacks.history(unit))

    def without_layers(self) -> tuple[str, ...]:
        """The units whose accepted stack is the empty one, in no order."""
        with translated("the stacks cannot be looked at"):
            return self._states.stacks.without_layers()

    def forget(self, unit: str) -> None:
        """Drop the slots, the record and the stacks of a unit that is gone.

        Not if its accepted stack has layers, or if something is kept out of it, or if it was put on a stack by hand.

        Raises:
            Later: the file system does not let us.
        """
        with translated(f"the stacks of {shown(unit)} cannot be removed"):
            self._states.forget(unit)

    def collect(self, mounted: Iterable[str], worn: Iterable[str] = ()) -> tuple[str, ...]:
        """Remove the copies that no slot, no kept stack and none of the digests `mounted` refers to.

        Args:
            worn: digests of which a service still shows the damaged copy, though there is a new one.

        Returns:
            The digests removed.

        Raises:
            Busy: copies are being made; nothing was removed.
            Later: the file system does not let us.
        """
        with translated("copies that nobody needs cannot be removed"):
            used = frozenset(mounted)
            showing = self.whole.find_replaced() & used | frozenset(worn)
            removed = self._names.collect(lambda: self._states.stacks.prune(self.keep_stacks), used, showing)
        for digest in removed:
            self._copies.pop(digest, None)
        return removed

    def _require_size(self, size: int) -> None:
        require_size(size, self.image_max, "ImageMax=")
        require_size(size, self.store_max, "StoreMax=")

    def _size_of(self, name: str) -> int:
        if name.startswith(TEMPORARY):
            return int(name.split("-")[1])
        if not DIGEST.fullmatch(name):
            return 0
        known = self._copies.get(name)  # what has that name never changes
        try:
            return tree.in_blocks((known or self._copy(name)).size)
        except FileNotFoundError:
            return 0  # it has just been collected
        except Refused:
            return tree.in_blocks(os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_size)

    def _copy(self, digest: str) -> Copy:
        """The copy under a digest; each is looked into once. Raises FileNotFoundError, or Refused if it is damaged."""
        known = self._copies.get(digest)
        if known and self._names.holds(
            digest, known.size if known.path.endswith(digest) and known.format else None
        ):
            return known
        # Without O_DIRECTORY: this opens a file and a directory alike.
        fd = os.open(digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode) and bundles.is_bundle(fd):
                self._copies[digest] = bundles.copy(fd, digest, f"{self._path}/{digest}")
                return self._copies[digest]
            if stat.S_ISDIR(found.st_mode):
                return self._made(digest, tree.signature(fd, whole=True).size, Kind.DIRECTORY)
            return self._made(digest, found.st_size, Kind.IMAGE, probe(fd, found.st_size))
        finally:
            os.close(fd)

    def _made(self, digest: str, size: int, kind: Kind, format: Mountable | None = None) -> Copy:
        self._copies[digest] = Copy(digest, f"{self._path}/{digest}", size, kind, format)
        return self._copies[digest]

    @contextmanager
    def _set_aside(self, size: int, kind: Kind) -> Iterator[tuple[str, int]]:
        """A temporary file or directory with `size` bytes of the store's room, by name and descriptor.

        If it still has that name at the end, it is removed. Threads take room in turn. Two processes that ask in the
        same microseconds may both get the last of it: then `store_max` is exceeded by one image.
        """
        with self._room:
            used = self.usage()
            require_room(used, size, self.store_max)
            name, fd = self._names.begin(size, kind)
        try:
            yield name, fd
        finally:
            self._names.end(name, fd)

    def _write_image(self, fd: int, size: int, lease: Lease) -> str:
        hasher = hashlib.sha256()
        with self._set_aside(tree.in_blocks(size), Kind.IMAGE) as (name, made):
            os.fchmod(made, 0o400)  # open(2) has applied the umask
            copy_file(fd, made, size, hasher, lease, sync=True)
            digest = hasher.hexdigest()
            self.whole.place(name, digest)
        return digest

    def _write_tree(self, root: int, signature: tree.Signature) -> str:
        with self._set_aside(signature.size, Kind.DIRECTORY) as (name, made):
            digest = tree.copy(root, made, signature.size)
            tree.require_unchanged(root, signature)
            if not self.whole.verify(digest):
                durable.fsync_tree(made, signature.entries)
                self.whole.place(name, digest)
        return digest

    def _found_instead(self, error: Exception, digest: Callable[[], str]) -> str:
        """There is no room. But if the same content is in the store already, none is needed."""
        if isinstance(error, OSError) and error.errno not in NO_SPACE:
            raise error
        found = digest()
        if not found or not self.whole.verify(found):
            raise error
        return found
