# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes into an image, and where it goes: the words of `confext-watcher build SOURCE...`.

A path says itself where its content goes: `etc/nginx` and `/etc/nginx/nginx.conf` to the same place, and of any other
directory its `etc/`. For all else the place is given: `etc/nginx=./conf`.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from watcher.images.walk import Path
from watcher.model import Refused, shown


class Source(NamedTuple):
    """
    Attributes:
        path: on disk.
        place: where it goes in the image; () for a directory of which the `etc/` goes to `etc/`.
        follow: it may be a link, which is followed. Elsewhere a link goes into the image as it is.
    """

    path: str
    place: Path
    follow: bool


def source(word: str) -> Source:
    """What one word of the command line means.

    Raises:
        Refused: it does not say where its content goes, or it is all of this host's `/etc`.
        OSError: it is not there.
    """
    given, equals, path = word.partition("=")
    if equals and not os.path.lexists(word):
        found = Source(path, _place(given), follow=True)
        if not found.place or not path:
            raise Refused(
                f"{shown(word)}: what stands before = is a place in /etc: etc/NAME={shown(path) or 'PATH'}"
            )
    else:
        found = Source(word, _place(word), follow=False)
    st = os.stat(found.path, follow_symlinks=found.follow or not found.place)
    if not found.place:
        _require_etc(found.path, stat.S_ISDIR(st.st_mode))
        st = os.stat(os.path.join(found.path, "etc"))
    if len(found.place) == 1 and not stat.S_ISDIR(st.st_mode):
        raise Refused(f"{shown(word)}: {shown(found.path)} is no directory, and etc is one")
    if os.path.samestat(st, os.stat("/etc")):
        raise Refused(f"{shown(word)}: that is all of this host's /etc, with its passwords: name what of it")
    return found


def _place(path: str) -> Path:
    """The place in `/etc` that a path names, () if it names none."""
    parts = tuple(part for part in os.path.normpath(path).split("/") if part)
    return parts if parts[:1] == ("etc",) else ()


def _require_etc(path: str, is_directory: bool) -> None:
    name = shown(os.path.basename(os.path.normpath(path)).strip("./") or "NAME")
    where = f"say where in /etc it goes: etc/{name}={shown(path)}"
    if not is_directory:
        raise Refused(f"{shown(path)}: {where}")
    if os.path.islink(os.path.join(path, "etc")):
        raise Refused(f"{shown(path)}: etc in it is a link, and must be a directory")
    if not os.path.isdir(os.path.join(path, "etc")):
        raise Refused(f"{shown(path)}: there is no etc/ in it; {where}")
