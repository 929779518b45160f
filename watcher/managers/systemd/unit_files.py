# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unit files in systemd's search path, and which services take part by them.

A service takes part if its unit file or a drop-in declares `ExtensionImages=` or `ExtensionDirectories=`, or if there
is a `<unit>.confext.d/` by its own name, its template's or an alias. Portable services (portablectl(1)) never do.

The generator looks here at boot, when systemd cannot be asked. The daemon looks here to know which units to ask systemd
about. Standard library only. Rules: systemd.unit(5), and for links and aliases unit_file_build_name_map() in
src/basic/unit-file.c.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from watcher.managers.systemd import sandbox_settings
from watcher.settings import syntax, unit_names, values
from watcher.settings.unit_names import UNIT_PATHS

if TYPE_CHECKING:
    from watcher.model import Declared, Remark

DROPIN = "zzzz-confext-watcher.conf"
"""File name of our own drop-in: it sorts last."""

CHECKS = "confext-watcher-check-"
"""How the names of our own transient units begin. They never take part, though they may have images."""

SUFFIX = ".confext.d"
_SERVICE = ".service"
_DECLARING = (b"ExtensionImages", b"ExtensionDirectories")
RELEVANT = (
    *("ExtensionImages", "ExtensionDirectories", "Enabled"),
    *("DefaultDependencies", "Before", "PrivateDevices", "DevicePolicy", "DeviceAllow"),
    *("RootDirectory", "RootImage", "ProtectSystem", "ReadOnlyPaths", "BindPaths", "BindReadOnlyPaths"),
    *("TemporaryFileSystem", "MountImages", "ExtensionImagePolicy", "ConfigurationDirectory"),
)
"""The settings that decide whether a unit takes part and what its drop-in says."""
_RELEVANT_LINES = syntax.lines_of(RELEVANT)
_OF_INSTANCE = frozenset("iInNfd")  # specifiers that have a value for instances only, not for their template


def generators_search_path() -> tuple[str, ...]:
    """Where a generator may look for units: not in what generators make."""
    return tuple(path for path in UNIT_PATHS if not _is_generated(path))


class Sources(NamedTuple):
    """What a unit's files declare: images as (path, options, optional), directories as (path, optional)."""

    images: list[tuple[str, str, bool]]
    directories: list[tuple[str, bool]]


class Unit(NamedTuple):
    """A service unit by its files.

    Attributes:
        name: its own name; "foo@.service" for a template.
        fragment: path of the unit file.
        dropins: paths of the drop-ins in the order in which they apply, ours left out.
        names: its own name, then its aliases.
        places: the directories of its drop-ins.
    """

    name: str
    fragment: str
    dropins: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[str, ...] = ()


def confext_dirs(names: Iterable[str], search_path: Sequence[str] = UNIT_PATHS) -> tuple[str, ...]:
    """Paths of the `<unit>.confext.d/` of a unit, existing or not, highest precedence first.

    In the order of drop-in directories: name by name, for each the search path, and in each of its directories the
    instance before its template.
    """
    return tuple(
        f"{directory}/{related}{SUFFIX}"
        for name in names
        for directory in search_path
        for related in with_template(name)
    )


def with_template(name: str) -> tuple[str, ...]:
    """A unit's name, and for an instance its template's."""
    template = unit_names.UnitName(name).template if "@" in name else None
    return (name, template) if template else (name,)


def is_portable(fragment: str) -> bool:
    """Whether portablectl attached the unit: then it decides what is mounted there."""
    return os.path.basename(os.path.dirname(fragment)) == "system.attached"


def as_generators_see(unit: Unit) -> Unit:
    """A unit without the files that generators (podman's, say) make: all of them run at once, on empty directories."""
    fragment = "" if _is_generated(os.path.dirname(unit.fragment)) else unit.fragment
    dropins = (path for path in unit.dropins if not _is_generated(os.path.dirname(os.path.dirname(path))))
    return unit._replace(fragment=fragment, dropins=tuple(dropins))


def _is_generated(directory: str) -> bool:
    return os.path.basename(directory) in ("generator", "generator.early", "generator.late")


def declared(
    unit: Unit, parsed: syntax.Parsed, search_path: Sequence[str] = UNIT_PATHS
) -> tuple[Declared, tuple[Remark, ...]]:
    """Where a unit's layers come from, by its own files (`parsed`: the fragment and the drop-ins, in this order)."""
    from watcher.resolve import sources  # the generator can mostly do without, and counts milliseconds

    remarks: list[Remark] = []

    def complain(line: syntax.Assignment, text: str) -> None:
        remarks.append(line.remark(f"ignored: {text}"))

    images, directories = sources_in(parsed.assignments, _expander(unit), complain)
    return sources.declare(images, directories, confext_dirs(unit.names, search_path)), tuple(remarks)


def sources_in(
    assignments: Sequence[syntax.Assignment],
    expand: Callable[[str], str],
    complain: Callable[[syntax.Assignment, str], None] = lambda line, text: None,
) -> Sources:
    """What assignments declare.

    Args:
        expand: replaces specifiers; may raise ValueError.
        complain: is told what is left out of an assignment.
    """
    images = [
        image
        for line in syntax.assigned(assignments, "Service", "ExtensionImages")
        for image in values.extension_images(line.value, expand, functools.partial(complain, line))
    ]
    directories = [
        directory
        for line in syntax.assigned(assignments, "Service", "ExtensionDirectories")
        for directory in values.extension_directories(line.value, expand, functools.partial(complain, line))
    ]
    return Sources(images, directories)


def _expander(unit: Unit) -> Callable[[str], str]:
    specifiers = unit_names.Specifiers(unit.name, unit.fragment)
    if not unit_names.is_template(unit.name):
        return specifiers.expand

    def expand(text: str) -> str:
        if any(f"%{letter}" in text.replace("%%", "") for letter in _OF_INSTANCE):
            raise ValueError("it is another one for each instance")
        return specifiers.expand(text)

    return expand


class Index:
    """The services in a search path, at the moment at which the index is made.

    Each directory is read once, each file at most once. A directory or a file that cannot be read counts as missing,
    because systemd cannot use it either.
    """

    def __init__(self, search_path: Sequence[str] = UNIT_PATHS) -> None:
        self.search_path = tuple(search_path)
        self._files: dict[str, str] = {}
        self._links: dict[str, str] = {}
        self._dirs: dict[str, list[str]] = {}
        self.children = functools.cache(sandbox_settings.children)
        self._texts: dict[str, bytes] = {}
        self._listings: dict[str, list[str]] = {}
        self._relevant: dict[tuple[str, ...], syntax.Parsed] = {}
        self._sources: dict[Unit, Sources] = {}
        for directory in self.search_path:
            self._scan(directory)
        self._aliases: dict[str, list[str]] = {}
        for alias in sorted(self._links):
            self._aliases.setdefault(self.own_name(alias), []).append(alias)

    def services(self, known: Iterable[str] = ()) -> dict[str, Unit]:
        """All services that take part by their files, templates included, by name.

        Args:
            known: names of instances, which no file need name; they take part if their template does.
        """
        found: dict[str, Unit] = {}
        for name in self.candidates(known):
            unit = self.unit(name)
            if unit and unit.name not in found and self.takes_part(unit):
                found[unit.name] = unit
        return found

    def unit(self, name: str, *, unwritten: bool = False) -> Unit | None:
        """A unit under any of its names; None if it has no file or is masked.

        Args:
            unwritten: also a unit that has no file; `fragment` is "" then.
        """
        own = self.own_name(name)
        fragment = next((self._files[n] for n in with_template(own) if n in self._files), "")
        if not fragment and not unwritten:
            return None
        if fragment and not self.text(fragment):
            return None
        names = (own, *self._aliases_of(own))
        there = [
            path
            for each in names
            for path in self._existing(f"{n}.d" for n in unit_names.drop_in_names(each))
        ]
        there += self._existing(["service.d"])
        dropins = unit_names.config_files(there, listing=self._listing) if there else []
        dropins = [path for path in dropins if os.path.basename(path) != DROPIN]
        return Unit(own, fragment, tuple(dropins), names, tuple(there))

    def own_name(self, name: str) -> str:
        """The name of the unit that `name` is an alias of, or `name`."""
        for _ in range(len(self._links) + 1):
            if name in self._links:
                name = self._links[name]
                continue
            # An alias of a template is an alias of each of its instances.
            parts = unit_names.UnitName(name) if "@" in name else None
            target = self._links.get(parts.template or "") if parts else None
            if not parts or not target or not unit_names.is_template(target):
                break
            name = target.replace("@.", f"@{parts.instance}.")
        return name

    def text(self, path: str) -> bytes:
        """Content of a file, b"" if it cannot be read."""
        if path not in self._texts:
            try:
                self._texts[path] = syntax.read(path)
            except OSError:
                self._texts[path] = b""
        return self._texts[path]

    def parse(self, unit: Unit) -> syntax.Parsed:
        """The unit's file and drop-ins."""
        parsed = [
            syntax.parse(self.text(path).decode("utf-8", "surrogateescape"), path)
            for path in (unit.fragment, *unit.dropins)
        ]
        return syntax.Parsed(
            tuple(a for each in parsed for a in each.assignments),
            tuple(r for each in parsed for r in each.remarks),
        )

    def relevant(self, unit: Unit) -> syntax.Parsed:
        """The lines of the unit's file and drop-ins that begin with a word of `RELEVANT`, without their numbers."""
        paths = unit.fragment, *unit.dropins
        if paths not in self._relevant:
            parsed = (syntax.parse_only(self.text(path), path, _RELEVANT_LINES) for path in paths)
            self._relevant[paths] = syntax.Parsed(tuple(a for each in parsed for a in each.assignments))
        return self._relevant[paths]

    def sources(self, unit: Unit) -> Sources:
        """What the unit's files declare."""
        if unit not in self._sources:
            self._sources[unit] = sources_in(self.relevant(unit).assignments, _expander(unit))
        return self._sources[unit]

    def confext_dirs(self, unit: Unit) -> tuple[str, ...]:
        """The directories of `confext_dirs()` that exist."""
        names = ([f"{related}{SUFFIX}" for related in with_template(name)] for name in unit.names)
        return tuple(path for each in names for path in self._existing(each))

    def _existing(self, names: Iterable[str]) -> list[str]:
        """The directories of these names, in the order of the search path, there in the order of the names."""
        found = [(path, number) for number, name in enumerate(names) for path in self._dirs.get(name, ())]
        if len(found) > 1:
            found.sort(key=lambda one: (self.search_path.index(os.path.dirname(one[0])), one[1]))
        return [path for path, _ in found]

    def _scan(self, directory: str) -> None:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    self._note(directory, entry)
        except OSError:
            return

    def _note(self, directory: str, entry: os.DirEntry[str]) -> None:
        name = entry.name
        if name.endswith((f"{_SERVICE}.d", f"{_SERVICE}{SUFFIX}")) or name == "service.d":
            # For a link to itself entry.is_dir() raises, and all entries after it would be lost.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                self._dirs.setdefault(name, []).append(entry.path)
        elif not is_service(name) or name in self._files or name in self._links:
            return
        elif entry.is_symlink() and (target := self._alias(directory, entry.path)):
            self._links[name] = target
        else:
            self._files[name] = entry.path

    def _alias(self, directory: str, path: str) -> str | None:
        """The unit that a link in the search path is another name of; None if it is that unit's own file.

        A link that leads out of the search path, to /dev/null say, is the unit's own file; so is a link of an instance
        to its template.
        """
        try:
            target = os.path.normpath(os.path.join(directory, os.readlink(path)))
        except OSError:
            return None
        name, other = os.path.basename(path), os.path.basename(target)
        if other == name or not is_service(other):
            return None
        if not any(_same(os.path.dirname(target), searched) for searched in self.search_path):
            return None
        return None if other in with_template(name) else other

    def _aliases_of(self, own: str) -> Iterator[str]:
        yield from self._aliases.get(own, ())
        if "@" in own:
            parts = unit_names.UnitName(own)
            for alias in self._aliases.get(parts.template or "", ()):
                if unit_names.is_template(alias):
                    yield alias.replace("@.", f"@{parts.instance}.")

    def candidates(self, known: Iterable[str] = ()) -> Iterator[str]:
        """Names of units that may take part, and `known`, each once."""
        return iter(dict.fromkeys((*self._named(), *known)))

    def _named(self) -> Iterator[str]:
        """Units that a file or directory names, found without a look at the drop-ins of each unit."""
        for name, path in self._files.items():
            if any(word in self.text(path) for word in _DECLARING):
                yield name
        for path in sorted(path for paths in self._dirs.values() for path in paths):
            name = os.path.basename(path)
            if name.endswith(SUFFIX):
                yield from _if_service(name.removesuffix(SUFFIX))
            elif any(word in self.text(file) for file in self._files_in(path) for word in _DECLARING):
                yield from self._configured_by(name.removesuffix(".d"))

    def _mentions_sources(self, unit: Unit) -> bool:
        """A quick look: what is not mentioned need not be parsed."""
        return any(word in self.text(path) for path in (unit.fragment, *unit.dropins) for word in _DECLARING)

    def _configured_by(self, name: str) -> Iterator[str]:
        """The units to which the drop-in directory of that name applies."""
        if name == "service":
            yield from self._files
        elif name.endswith(f"-{_SERVICE}") or "-@" in name:
            for each in self._files:
                if name in unit_names.drop_in_names(each):
                    yield each
        else:
            yield from _if_service(name)

    def _files_in(self, directory: str) -> list[str]:
        names = self._listing(directory)
        return [f"{directory}/{name}" for name in names if name.endswith(".conf") and name != DROPIN]

    def _listing(self, directory: str) -> list[str]:
        if directory not in self._listings:
            try:
                self._listings[directory] = os.listdir(directory)
            except OSError:
                self._listings[directory] = []
        return self._listings[directory]

    def takes_part(self, unit: Unit) -> bool:
        """Whether a unit's files or directories say that it takes part; portable services and our own never do."""
        if is_portable(unit.fragment) or unit.name.startswith(CHECKS):
            return False
        return bool(self.confext_dirs(unit)) or (self._mentions_sources(unit) and any(self.sources(unit)))


def _same(directory: str, searched: str) -> bool:
    """Whether two paths are one directory (`/lib` is `/usr/lib`)."""
    return directory == searched or os.path.realpath(directory) == os.path.realpath(searched)


def is_service(name: str) -> bool:
    """Whether this can be the name of a service unit."""
    try:
        return unit_names.UnitName(name).type == "service"
    except ValueError:
        return False


def _if_service(name: str) -> Iterator[str]:
    if is_service(name):
        yield name
