# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit names, the places of unit files and drop-ins, and the `%` specifiers in them (systemd.unit(5)).

Standard library only, for the generator.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Iterable

from watcher.text import shown

UNIT_PATHS = (
    "/etc/systemd/system.control",
    "/run/systemd/system.control",
    "/run/systemd/transient",
    "/run/systemd/generator.early",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/run/systemd/system",
    "/run/systemd/system.attached",
    "/run/systemd/generator",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/run/systemd/generator.late",
)
"""The system manager's search path, highest precedence first, as `systemd-analyze unit-paths` prints it."""

_NAME = re.compile(
    r"(?P<prefix>[A-Za-z0-9:_.\\-]+)(?P<at>@(?P<instance>[A-Za-z0-9:_.\\@-]*))?\.(?P<type>[a-z]+)"
)
_TYPES = frozenset(
    "service socket target device mount automount swap timer path slice scope".split()  # systemd.unit(5)
)
# The generator takes the same name apart several times.
_match = functools.lru_cache(maxsize=2048)(_NAME.fullmatch)
_ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")


class UnitName:
    """The parts of a unit's name: "foo-bar@inst.service".

    Attributes:
        full: "foo-bar@inst.service".
        prefix: "foo-bar".
        instance: "inst"; "" for the template "foo-bar@.service"; None for a plain unit.
        type: "service".
    """

    __slots__ = ("full", "instance", "prefix", "type")

    def __init__(self, full: str) -> None:
        """Raises ValueError: not a unit's name."""
        match = _match(full)
        if match is None or len(full) > 255:
            raise ValueError(f"not a unit name: {full!r}")
        self.full = full
        self.prefix: str = match["prefix"]
        self.instance: str | None = match["instance"]
        self.type: str = match["type"]

    @property
    def template(self) -> str | None:
        """ "foo-bar@.service" for an instance, None for anything else."""
        return f"{self.prefix}@.{self.type}" if self.instance else None


def is_unit(text: str) -> bool:
    """Whether a text names a unit, an instance included, and no template."""
    try:
        name = UnitName(text)
    except ValueError:
        return False
    return name.instance != "" and name.type in _TYPES


def is_template(text: str) -> bool:
    """Whether a text names a template of a service, as "alert@.service" does."""
    try:
        name = UnitName(text)
    except ValueError:
        return False
    return name.instance == "" and name.type == "service"


def unescape(text: str) -> str:
    """`systemd-escape --unescape`: "-" becomes "/", "\\x2d" the byte; at "\\x00" the text ends, as in C."""
    raw = _ESCAPED.sub(lambda m: bytes([int(m[1], 16)]), os.fsencode(text).replace(b"-", b"/"))
    return os.fsdecode(raw.partition(b"\0")[0])


def drop_in_names(unit: str) -> list[str]:
    """Names whose `.d/` directories configure `unit`, most specific first, without that of its type (`service.d/`).

    "foo-bar@x.service" has its own, then "foo-bar@.service", "foo-.service", "foo-@x.service", "foo-@.service".

    Raises:
        ValueError: not a unit's name.
    """
    name = UnitName(unit)
    names = [unit]
    if name.template:
        names += drop_in_names(name.template)
    stem = name.prefix.removesuffix("-")
    dash = stem.rfind("-")
    if dash > 0:
        instance = f"@{name.instance}" if name.instance else ""
        names += drop_in_names(f"{stem[: dash + 1]}{instance}.{name.type}")
    return list(dict.fromkeys(names))


def config_files(
    directories: Iterable[str],
    suffix: str = ".conf",
    listing: Callable[[str], Iterable[str]] = os.listdir,
) -> list[str]:
    """The files of several drop-in directories, highest precedence first, in the order in which they are read.

    Args:
        listing: names in a directory.

    Raises:
        OSError: a directory is there and cannot be read.
    """
    chosen: dict[str, str] = {}
    for directory in directories:
        try:
            names = listing(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            if name.endswith(suffix) and not name.startswith("."):
                chosen.setdefault(name, f"{directory}/{name}")
    ordered = sorted(chosen.items(), key=lambda item: os.fsencode(item[0]))
    return [path for _, path in ordered if not _is_masked(path) and not os.path.isdir(path)]


def _is_masked(path: str) -> bool:
    """Whether a path is a link to /dev/null or an empty regular file. A link that leads nowhere masks nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    if stat.S_ISREG(status.st_mode):
        return status.st_size == 0
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


class Specifiers:
    """Replaces `%` specifiers as the system manager does for a unit (systemd.unit(5), "Specifiers").

    Files of the host are read only when a specifier needs them.
    """

    def __init__(self, unit: str, fragment_path: str = "", root: str = "/") -> None:
        """
        Args:
            fragment_path: for %y and %Y.
            root: where the host's own files are read from.

        Raises:
            ValueError: not a unit's name.
        """
        self.unit = UnitName(unit)
        self._root = root.rstrip("/")
        self._fragment = fragment_path

    def expand(self, text: str) -> str:
        """
        Raises:
            ValueError: a specifier is not known, or has no value on this host: systemd ignores the whole value.
        """
        return re.sub(r"%(.)", lambda m: self._value(m[1]), text, flags=re.DOTALL) if "%" in text else text

    def _value(self, letter: str) -> str:
        if letter in _FIXED:
            return _FIXED[letter]
        if letter in _OS_RELEASE:
            return self._os_release.get(_OS_RELEASE[letter], "")
        reader = _READERS.get(letter)
        if reader is None:
            raise ValueError(f"the specifier %{shown(letter)} is not known")
        return reader(self)

    @functools.cached_property
    def _os_release(self) -> dict[str, str]:
        from watcher.settings.os_release import parse_os_release

        paths = ("/etc/os-release", "/usr/lib/os-release")
        path = next((path for path in paths if os.path.exists(self._root + path)), None)
        return {"ID": "linux", **(parse_os_release(self._read(path)) if path else {})}

    def _read(self, path: str) -> str:
        try:
            with open(self._root + path, encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def _last(self) -> str:
        return self.unit.prefix.rpartition("-")[2]

    def _path(self) -> str:
        return "/" + unescape(self.unit.instance or self.unit.prefix).strip("/")

    def _id(self, path: str) -> str:
        return self._read(path).strip().replace("-", "")


_FIXED = {
    "%": "%",
    "C": "/var/cache",
    "D": "/usr/share",
    "E": "/etc",
    "L": "/var/log",
    "S": "/var/lib",
    "T": "/tmp",
    "V": "/var/tmp",
    "g": "root",
    "G": "0",
    "h": "/root",
    "s": "/bin/sh",
    "t": "/run",
    "u": "root",
    "U": "0",
}
_OS_RELEASE = {
    "A": "IMAGE_VERSION",
    "B": "BUILD_ID",
    "M": "IMAGE_ID",
    "o": "ID",
    "w": "VERSION_ID",
    "W": "VARIANT_ID",
}
_READERS: dict[str, Callable[[Specifiers], str]] = {
    "n": lambda s: s.unit.full,
    "N": lambda s: s.unit.full.removesuffix(f".{s.unit.type}"),
    "p": lambda s: s.unit.prefix,
    "P": lambda s: unescape(s.unit.prefix),
    "i": lambda s: s.unit.instance or "",
    "I": lambda s: unescape(s.unit.instance or ""),
    "j": lambda s: s._last(),
    "J": lambda s: unescape(s._last()),
    "f": lambda s: s._path(),
    "y": lambda s: s._fragment,
    "Y": lambda s: os.path.dirname(s._fragment),
    "d": lambda s: f"/run/credentials/{s.unit.full}",
    "m": lambda s: s._id("/etc/machine-id"),
    "b": lambda s: s._id("/proc/sys/kernel/random/boot_id"),
    "H": lambda s: os.uname().nodename,
    "l": lambda s: os.uname().nodename.partition(".")[0],
    "v": lambda s: os.uname().release,
    "a": lambda s: _architecture(),
}


def _architecture() -> str:
    from watcher.settings.architectures import native

    return native()
