# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plain data that one step of a drop's way hands to the next, and the errors that are outcomes.

Standard library only: the generator imports it, if it must (see `watcher.text`).

Paths and names are `str` as `os.fsdecode()` makes them: bytes that are not UTF-8 are surrogates. `shown()` makes any of
them fit for a person and for a log.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from watcher.text import Kind as Kind
from watcher.text import printable as printable
from watcher.text import problem as problem
from watcher.text import shown as shown

# More than any /etc has. A walk takes two descriptors for each level, and Python limits recursion.
DEPTH_MAX = 64
ENTRIES_MAX = 100_000


class Unsupported(Exception):
    """This kernel or this systemd is too old: `str()` is one line for the administrator."""


class Refused(Exception):
    """This content is not accepted, now or later: `str()` is one line for the administrator."""


class Incomplete(Refused):
    """It is not whole: by its own account (a connection broke), or a file beside it has yet to come."""


class KeptOut(Refused):
    """This content is in quarantine for the service: it was refused or rolled back before.

    Attributes:
        digest: of that content.
    """

    def __init__(self, text: str, digest: str = "") -> None:
        super().__init__(text)
        self.digest = digest


class Sysext(Refused):
    """A system extension, which a unit may declare beside its confexts: it is left to systemd."""


class Unsafe(Refused):
    """A user whom the service does not trust can change it, see `strict_modes.py`.

    Attributes:
        path: what to mend, without links in it.
        hidden: a user has set a way there whose end he may not see himself: nothing must be told of that.
    """

    def __init__(self, text: str, path: str = "", *, hidden: bool = False) -> None:
        super().__init__(text)
        self.path = path
        self.hidden = hidden


class Busy(Exception):
    """It is still being written: no outcome, look again later."""


class Settling(Busy):
    """It may still be written: nothing tells when it is not.

    Attributes:
        seconds: after which to look again.
    """

    def __init__(self, text: str, seconds: float) -> None:
        super().__init__(text)
        self.seconds = seconds


class Later(Busy):
    """It cannot be done now (no space, no loop device): it gets a line, and the next round tries again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One place that a layer comes from: a source that the unit declares, or one entry of its `.confext.d/`.

    Attributes:
        slot: name of the link that stands for this entry under `units/UNIT/` ("web.raw", "tree"), unique in a unit.
        path: absolute path as declared or found, ".v/" form included ("/srv/web.raw.v", "/srv/web.v/web___").
        kind: image or directory.
        optional: declared with a `-` prefix, or dropped in: no line is logged if the source is missing.
        declared: from the unit's own settings (rather than from `.confext.d/`).
        options: mount options of an `ExtensionImages=` value, verbatim ("" if none).
    """

    slot: str
    path: str
    kind: Kind
    optional: bool = False
    declared: bool = False
    options: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One file or directory that could become the layer of an entry.

    Attributes:
        path: absolute path of the file or directory, as found in the directory (links not resolved).
        filename: its last component, "web_1.4+3-1.raw".
        name: the extension's name without version, counters and suffix, "web".
        version: "1.4", or "" if the name has none.
        tries_left: counter of `+LEFT`, None without one.
        tries_done: counter of `-DONE`, None without one.
        sidecars: names of the files beside an image that it is verified by (`resolve/sidecars.py`).
    """

    path: str
    filename: str
    name: str
    version: str
    kind: Kind
    tries_left: int | None = None
    tries_done: int | None = None
    sidecars: tuple[str, ...] = ()


class Scope(enum.Enum):
    """How far an interest reaches."""

    CHILDREN = "children"
    TREE = "tree"


@dataclass(frozen=True, slots=True)
class Interest:
    """A directory in which a change matters.

    Attributes:
        path: absolute. If it does not exist, its appearance is the change.
        scope: names directly in it, or anything below it.
        pattern: regular expression (`re.fullmatch`) that a name must match to matter; None: every name does.
    """

    path: str
    scope: Scope = Scope.CHILDREN
    pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Remark:
    """What a look found that gets one line, once: the caller remembers what it has said."""

    level: str  # "debug", "info" or "warning"
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Picks:
    """An entry with all its candidates, best first (systemd.v(7)).

    Attributes:
        unknown: something on the way could not be read (permissions, an I/O error). A candidate that is not here may
            still exist, so what was accepted stays.
        unsafe: why nothing of it may be used. What was accepted stays.
    """

    entry: Entry
    candidates: tuple[Candidate, ...]
    unknown: bool = False
    unsafe: Unsafe | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """Where a service's layers come from, before any directory is read.

    Attributes:
        images: the unit's `ExtensionImages=`, first to last.
        directories: the unit's `ExtensionDirectories=`, first to last.
        confext_dirs: paths of `<unit>.confext.d/`, highest precedence first; they need not exist.
    """

    images: tuple[Entry, ...] = ()
    directories: tuple[Entry, ...] = ()
    confext_dirs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """What a service could have, as the directories are now.

    Attributes:
        picks: bottom to top, each entry with its candidates.
        interests: all that must be watched so that no change to this answer is missed.
        remarks: what was passed over, and why.
        unknown: a `.confext.d/` could not be read. What is not in `picks` may still exist: what was accepted stays.
        unsafe: a user whom the service does not trust can write to a `.confext.d/`. What was removed there stays.
        failed: something could not be read (an I/O error), and no event tells when it can be.
    """

    picks: tuple[Picks, ...]
    interests: tuple[Interest, ...]
    remarks: tuple[Remark, ...] = ()
    unknown: bool = False
    unsafe: bool = False
    failed: bool = False


class Protection(enum.Enum):
    """How an image is protected, by systemd.image-policy(7): the values of CONFEXT_TRUST= in the journal."""

    UNPROTECTED = "unprotected"
    VERITY = "verity"
    SIGNED = "signed"


@dataclass(frozen=True, slots=True)
class Trust:
    """What was proved of a content, not what it claims.

    Attributes:
        protection: the verdict.
        signer: subject of the certificate whose key has signed it, for people; "" unless it is signed.
        fingerprint: SHA-256 of that certificate (DER), 64 hexadecimal digits; "" unless it is signed.
        root_hash: of its hash tree, hexadecimal digits; "" where there is none.
        how: in which way that was proved, for people: "its hash tree was verified over the store's copy".
        remark: why it is not more, one line for the administrator: "signed by an unknown key"; "" if there is nothing
            to say.
    """

    protection: Protection = Protection.UNPROTECTED
    signer: str = ""
    fingerprint: str = ""
    root_hash: str = ""
    how: str = ""
    remark: str = ""


class Mountable(Protocol):
    """What an image turned out to be, as far as others need it: see `images/formats/image.py`."""

    @property
    def name(self) -> str: ...

    @property
    def file_system(self) -> str: ...

    @property
    def parts(self) -> tuple[tuple[str, int], ...]: ...

    def fsmount(self, backing: int, label: str) -> int: ...


@dataclass(frozen=True, slots=True)
class Copy:
    """An image or tree in the store.

    Attributes:
        digest: SHA-256, 64 hexadecimal digits: of the file's bytes, or of a directory as `tree.py` has it.
        path: absolute path in the store; a regular file of mode 0400, or a tree.
        size: bytes.
        format: of an image, None for a tree.
        trust: what was proved of it, once it is let in.
        protected: a path of the same image beside which systemd finds what it is verified by; "": there is none.
    """

    digest: str
    path: str
    size: int
    kind: Kind
    format: Mountable | None = None
    trust: Trust = Trust()
    protected: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One admitted image or tree in a stack.

    Attributes:
        trust: what was proved of it when it was looked at last; nothing in what an older version has recorded.
        file_system: of an image, by the kernel's name; "" of a tree, and in what an older version has recorded.
    """

    slot: str
    name: str
    version: str
    digest: str
    kind: Kind
    source: str
    trust: Trust = Trust()
    file_system: str = ""

    @property
    def label(self) -> str:
        """Its name for people, fit for a line: "web 1.4"."""
        return shown(f"{self.name} {self.version}" if self.version else self.name)


@dataclass(frozen=True)
class Stack:
    """Layers bottom to top. Stacks with the same contents have the same `id`: names do not count."""

    layers: tuple[Layer, ...] = ()

    @functools.cached_property
    def digests(self) -> tuple[str, ...]:
        return tuple(layer.digest for layer in self.layers)

    @functools.cached_property
    def id(self) -> str:
        """16 hexadecimal digits, "" for the empty stack."""
        return stack_id(self.digests)


def stack_id(digests: Iterable[str]) -> str:
    """Identity of a stack by the digests of its layers, bottom to top: 16 hexadecimal digits, "" if there are none."""
    return _stack_id(tuple(digests))


@functools.lru_cache(maxsize=1024)
def _stack_id(digests: tuple[str, ...]) -> str:
    joined = "\n".join(digests)
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()[:16] if joined else ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a service that is written somewhere, and counts; `source`: "FILE:LINE", or the option of `exec`."""

    key: str
    value: str
    source: str


class Outcome(enum.Enum):
    """How a round ended for a service: the values of CONFEXT_OUTCOME= in the journal."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    REFUSED = "refused"
    INCOMPLETE = "incomplete"
    FAILED = "failed"
    ROLLED_BACK = "rolled-back"
    NEEDS_RESTART = "needs-restart"
    REQUESTED = "requested"  # somebody has asked for a rollback, or for its end: the outcome follows


class Verdict(enum.Enum):
    """How a service took a stack: the values of CONFEXT_VERDICT= in the journal."""

    GOOD = "good"
    CHECK_FAILED = "check-failed"  # Check= refused it, the service never saw it
    RELOAD_FAILED = "reload-failed"
    HEALTH_CHECK_FAILED = "health-check-failed"
    WENT_DOWN = "went-down"  # its main process ended, or its unit failed, while the stack was on trial


@dataclass(frozen=True, slots=True)
class Event:
    """One line of history, and one entry in the journal; usec are microseconds, `when` since the epoch."""

    service: str
    outcome: Outcome
    message: str
    when: int
    stack: str = ""
    previous: str = ""
    image: str = ""
    version: str = ""
    digest: str = ""
    source: str = ""
    reason: str = ""
    output: str = ""
    swap_usec: int | None = None
    total_usec: int | None = None
    layers: tuple[Layer, ...] = field(default=())
    verdict: Verdict | None = None

    @property
    def trust(self) -> Trust | None:
        """What was proved of the image that it is about; None if it is about none of the stack."""
        return next((layer.trust for layer in self.layers if layer.digest == self.digest), None)

    @property
    def result(self) -> str:
        """The outcome, and what was wrong with a stack that was judged bad: "rolled-back (health-check-failed)"."""
        if self.verdict is None or self.verdict is Verdict.GOOD:
            return self.outcome.value
        return f"{self.outcome.value} ({self.verdict.value})"
