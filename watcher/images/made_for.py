# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image must be made for, and whether it is: the host of a service, and release files that were read."""

from __future__ import annotations

import codecs
import errno
import functools
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from watcher.images.extension import Release
from watcher.images.opened import READ
from watcher.model import Candidate, Refused
from watcher.mounts import syscalls
from watcher.mounts.descriptors import Descriptors
from watcher.resolve import release
from watcher.settings import architectures
from watcher.settings.os_release import parse_os_release

_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_OS_RELEASE_MAX = 64 * 1024

# How text begins that an editor has saved in a way that systemd does not read; UTF-16 is what PowerShell writes.
_UTF16 = "it is UTF-16: save it as UTF-8, without a byte order mark"
_MARKS = {
    "\ufeff": "it begins with a byte order mark, which hides the first line: save it without one",
    os.fsdecode(codecs.BOM_UTF16_LE): _UTF16,
    os.fsdecode(codecs.BOM_UTF16_BE): _UTF16,
}


@dataclass(frozen=True, slots=True)
class Host:
    """What an image must be made for: the os-release of the service's root, and the architecture (systemd's name).

    Attributes:
        root: that root; no image is made for one root alone.
    """

    os_release: Mapping[str, str]
    architecture: str
    root: str = field(default="/", compare=False)

    @property
    def terms(self) -> tuple[object, ...]:
        """All of that in a form that can be compared and hashed."""
        return (*sorted(self.os_release.items()), self.architecture)


def host(root: str = "/") -> Host:
    """The host of a service, os-release(5): `/etc/os-release` of its root, else `/usr/lib/os-release`.

    No link leads out of that root.

    Raises:
        FileNotFoundError: there is neither.
        OSError: it cannot be read.
    """
    with Descriptors() as fds:
        directory = fds.add(os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        for name in ("etc/os-release", "usr/lib/os-release"):
            try:
                found = fds.add(syscalls.openat2(directory, name, os.O_PATH, _IN_ROOT))
            except FileNotFoundError:
                continue
            return Host(parsed(_text(found)), architectures.native(), root)
    raise FileNotFoundError(errno.ENOENT, "no os-release in it", root)


@functools.lru_cache(maxsize=64)
def parsed(text: str) -> Mapping[str, str]:
    """Of an os-release or extension-release file; most files have one of the same few texts."""
    return MappingProxyType(parse_os_release(text))


def _text(place: int) -> str:
    """The content of a regular file (O_PATH), "" for anything else: opening that may have effects of its own."""
    if not stat.S_ISREG(os.fstat(place).st_mode):
        return ""
    with open(os.open(f"/proc/self/fd/{place}", READ), encoding="utf-8", errors="replace") as file:
        return file.read(_OS_RELEASE_MAX)


def passed_over(found: Release) -> tuple[str, ...]:
    """One line for each thing in release files that counts for nothing."""
    return tuple(line for text in found[0].values() for line in release.no_units(parsed(text)))


def require_match(candidate: Candidate, found: Release, made_for: Host) -> None:
    """Raise Refused where the release files do not make it a confext of that name, made for that host."""
    names, strict_false = found
    name = release.choose_release_file(candidate.filename, names, strict_false, candidate.kind)
    try:
        release.match(parsed(names[name]), made_for.os_release, made_for.architecture)
    except Refused as refused:
        hint = next((hint for mark, hint in _MARKS.items() if names[name].startswith(mark)), "")
        if hint:
            raise Refused(f"{refused} ({hint})") from None
        raise
