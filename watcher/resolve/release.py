# SPDX-License-Identifier: LGPL-2.1-or-later
"""Is an extension made for this host? Extension-release files and their match, os-release(5), without any I/O.

A confext is only known by its `etc/extension-release.d/extension-release.NAME`. The rules are systemd's, with one
difference: what it mentions in a debug line and leaves out in silence is refused here with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from watcher.model import Kind, Refused, shown
from watcher.settings import architectures
from watcher.settings.unit_names import is_unit

PREFIX = "extension-release."

RESTART, RELOAD_OR_RESTART = "restart", "reload-or-restart"
_ASKING = {"EXTENSION_RESTART_UNITS": RESTART, "EXTENSION_RELOAD_OR_RESTART_UNITS": RELOAD_OR_RESTART}

_IMAGE_SUFFIX = re.compile(
    r"(?:\.raw|\.confext\.raw|\.sysext\.raw|\.img|\.bin|\.qcow2|\.xz|\.gz|\.bz2|\.zst)+\Z"
)


def image_name(filename: str, kind: Kind = Kind.IMAGE) -> str:
    """What systemd calls an extension with that file name: "web_1.4.raw" is "web_1.4", a directory is its name."""
    return _IMAGE_SUFFIX.sub("", filename) if kind is Kind.IMAGE else filename


def base_name(filename: str, kind: Kind = Kind.IMAGE) -> str:
    """`image_name()` without version and counters: "web_1.4+3.raw" is "web"."""
    return re.split(r"[_+]", image_name(filename, kind), maxsplit=1)[0]


def choose_release_file(
    filename: str, names: Iterable[str], strict_false: Collection[str] = (), kind: Kind = Kind.IMAGE
) -> str:
    """The release file that counts for an extension.

    Args:
        filename: the image's or directory's own file name.
        names: of the regular files in its `etc/extension-release.d/`.
        strict_false: those of them whose xattr `user.extension-release.strict` is false: they fit any name.

    Returns:
        One of `names`.

    Raises:
        Refused: none fits, or more than one does.
    """
    names = sorted(names)
    exact, base = PREFIX + image_name(filename, kind), PREFIX + base_name(filename, kind)
    if exact in names and _valid(exact):
        return exact
    fitting = [name for name in names if _valid(name) and (name == base or name in strict_false)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise Refused(
            f"has {len(fitting)} extension-release files that fit it, one is allowed: {_listed(fitting)}"
        )
    there = _listed(names) if names else "nothing"
    wanted = _listed(sorted({exact, base}, reverse=True), " or ")
    raise Refused(
        f"its etc/extension-release.d/ has {there}, but must have {wanted} to go with its file name"
    )


def match(extension: Mapping[str, str], host: Mapping[str, str], architecture: str) -> None:
    """Check an extension-release against the os-release of the root directory that it goes onto.

    Args:
        architecture: the kernel's, by systemd's name ("x86-64").

    Raises:
        Refused: made for something else; the text names the key.
    """
    wanted = extension.get("ARCHITECTURE", "")
    if wanted not in ("", "_any", architecture):
        called = architectures.meant(wanted)
        hint = f" (systemd calls {shown(wanted)} {called}: write that)" if called else ""
        raise Refused(f"{_differs('ARCHITECTURE', wanted, architecture)}{hint}")
    identity = extension.get("ID", "")
    ours = host.get("ID") or "linux"
    if not identity:
        raise Refused(f"its extension-release has no ID=, which must be {shown(ours)} or _any")
    if identity == "_any":
        return
    if identity != ours and identity not in host.get("ID_LIKE", "").split():
        raise _differs("ID", identity, ours)
    _match_version(extension, host)


def asks_for(extension: Mapping[str, str], names: Collection[str]) -> str:
    """What a unit is to be told when an extension comes or goes (os-release(5) of systemd 262, systemd-confext(8)).

    The lists have whole names of units, also of instances: a pattern or a template is none, and means no unit. One that
    is in both is restarted.

    Args:
        names: of the unit, and its aliases.

    Returns:
        RESTART; RELOAD_OR_RESTART: a restart if it has no way to reload; "" if the extension does not say.
    """
    for key, action in _ASKING.items():
        if not set(names).isdisjoint(extension.get(key, "").split()):
            return action
    return ""


def no_units(extension: Mapping[str, str]) -> list[str]:
    """One line for each word of these lists that is no name of a unit."""
    return [
        f"{key}= in it has {shown(word)}, which is no unit's name: it is passed over"
        for key in _ASKING
        for word in extension.get(key, "").split()
        if not is_unit(word)
    ]


def _match_version(extension: Mapping[str, str], host: Mapping[str, str]) -> None:
    """CONFEXT_LEVEL where both have one, else VERSION_ID; a rolling release has neither and takes any."""
    level, our_level = extension.get("CONFEXT_LEVEL", ""), host.get("CONFEXT_LEVEL", "")
    version, our_version = extension.get("VERSION_ID", ""), host.get("VERSION_ID", "")
    if level and our_level:
        if level != our_level:
            raise _differs("CONFEXT_LEVEL", level, our_level)
    elif our_version and version != our_version:
        if not version:
            raise Refused(
                f"its extension-release has no VERSION_ID=, which must be {shown(our_version)} here"
            )
        raise _differs("VERSION_ID", version, our_version)


def _differs(key: str, theirs: str, ours: str) -> Refused:
    return Refused(f"made for {key}={shown(theirs)}, and here it is {key}={shown(ours)}")


def _valid(name: str) -> bool:
    """systemd's image_name_is_valid() for what stands after "extension-release."."""
    extension = name.removeprefix(PREFIX)
    if extension == name or extension in ("", ".", "..") or extension.startswith(".#"):
        return False
    return not any(char < " " or char == "\x7f" or 0xD800 <= ord(char) <= 0xDFFF for char in extension)


def _listed(names: Iterable[str], between: str = ", ") -> str:
    return between.join(shown(name) for name in names)
