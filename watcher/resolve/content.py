# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a directory tree is content. People keep trees in git, and edit them where they lie.

Only `etc/` gets to a service. Beside it counts what tells a sysext (`usr/lib/extension-release.d/`), and the marker.
All else at the top (`.git/`, a README, `build/`) is not looked at, and so costs no reload. Pure.
"""

from __future__ import annotations

import re
from typing import Final

TOP = r"etc|usr|\.confext-complete"
"""Regular expression (`re.fullmatch`) of the names at the top of a tree that matter."""
MARKER: Final = ".confext-complete"
"""A file at the top of a tree, written last: all of the tree is there."""

_SYSEXT = ("usr", "lib", "extension-release.d")

# systemd's hidden_or_backup_file() (src/basic/path-util.c) with the ".ignore" of 259, but for "all that begin with a
# dot": a file such as `.htaccess` is content. Then what vim, emacs and GNOME's editors make beside a file.
_LEFTOVER = re.compile(
    r"lost\+found|aquota\.(?:user|group)|.*~|"
    r".*\.(?:rpm(?:new|save|orig)|dpkg-(?:old|new|tmp|dist|bak|backup|remove)|ucf-(?:new|old|dist)|"
    r"sw[opx]|bak|old|new|ignore)|"
    r"4913|\.?#.*|\.goutputstream-.*",
    re.DOTALL,
)


def is_content(path: tuple[str, ...]) -> bool:
    """Whether a node of a tree counts; what is below one that does not is not looked at.

    Args:
        path: from the root of the tree, which is ().
    """
    if _LEFTOVER.fullmatch(path[-1]):
        return False
    return path[0] == "etc" or path == (MARKER,) or path[: len(_SYSEXT)] == _SYSEXT[: len(path)]
