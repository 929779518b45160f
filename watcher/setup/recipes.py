# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recipes: what is known of a service before anybody deploys to it. Files in systemd's INI syntax, one for a service:

    [Recipe]
    Units=nginx.service       names or globs of the units that it is for
    From=/etc/nginx           what of the host's /etc the first version takes
    Packages=nginx            Debian packages, for people
    Exclude=*.key             what below From= no image may have: a name, or a path; globs
    Note=...                  what a person has to know; one line each
    [X-Confext]               goes into the unit's drop-in, as it is
    [Service]                 likewise

A file in /etc takes the place of one with the same name in /usr, and a link to /dev/null masks it, as systemd has it
(systemd.unit(5)). Unlike systemd, a recipe with a mistake is not used at all: nobody would notice that the check that
it brings is missing.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from watcher.model import shown
from watcher.records.schema import Failed
from watcher.settings import config, syntax, unit_names
from watcher.settings.syntax import Assignment

SECTION = "Recipe"
COPIED = (config.SERVICE_SECTION, "Service")
VENDOR_DIRECTORIES = ("/usr/local/share/confext-watcher/recipes", "/usr/share/confext-watcher/recipes")
_SUFFIX = ".conf"
_LISTS = ("Units", "From", "Packages", "Exclude")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is known of a service.

    Attributes:
        name: of its file, without ".conf".
        path: of its file.
        units: names or globs of units.
        sources: `From=`, absolute paths below /etc.
        packages: `Packages=`.
        exclude: `Exclude=`, names or absolute paths, globs.
        notes: `Note=`, a line each.
        settings: all of `COPIED`, in the order in which they are written.
    """

    name: str
    path: str
    units: tuple[str, ...]
    sources: tuple[str, ...]
    packages: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: tuple[Assignment, ...] = ()

    def is_for(self, names: Iterable[str]) -> bool:
        """Whether one of a unit's names is named here."""
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.units)

    def excludes(self, path: str) -> bool:
        """Whether no image may have this file or directory of the host (an absolute path)."""
        return any(
            fnmatch.fnmatchcase(path if "/" in pattern else os.path.basename(path), pattern)
            for pattern in self.exclude
        )

    @property
    def checks(self) -> bool:
        """Whether the service's own check comes with it."""
        return any((one.section, one.key) == (config.SERVICE_SECTION, "Check") for one in self.settings)

    def sections(self) -> list[str]:
        """Lines of the drop-in: the sections that are copied."""
        lines: list[str] = []
        for section in COPIED:
            own = [one for one in self.settings if one.section == section]
            if own:
                lines += [f"[{section}]", *(f"{one.key}={one.value}" for one in own)]
        return lines


def directories(configuration_directory: str) -> tuple[str, ...]:
    """Where recipes are, highest precedence first."""
    return (f"{configuration_directory}/recipes", *VENDOR_DIRECTORIES)


def find(names: Sequence[str], places: Iterable[str]) -> Recipe | None:
    """The recipe for a unit; None: there is none.

    Args:
        names: all names of the unit.
        places: see `directories()`.

    Raises:
        Failed: a recipe has a mistake in it, or two are for this unit.
        OSError: one cannot be read.
    """
    found = [recipe for recipe in map(load, unit_names.config_files(places)) if recipe.is_for(names)]
    if len(found) > 1:
        both = " and ".join(shown(recipe.path) for recipe in found[:2])
        raise Failed(f"two recipes are for {shown(names[0])}: {both}: choose one by --recipe")
    return found[0] if found else None


def named(name: str, places: Iterable[str]) -> Recipe:
    """The recipe of that name, or in that file (a path, with a `/` in it).

    Raises:
        Failed: there is none, or it has a mistake in it.
        OSError: it cannot be read.
    """
    if "/" in name:
        return load(os.path.abspath(name))
    paths = unit_names.config_files(places)
    for path in paths:
        if os.path.basename(path) == name.removesuffix(_SUFFIX) + _SUFFIX:
            return load(path)
    there = ", ".join(shown(os.path.basename(path).removesuffix(_SUFFIX)) for path in paths)
    raise Failed(f"{shown(name)}: there is no such recipe, only {there}" if there else "no recipes are here")


def load(path: str) -> Recipe:
    """Read one recipe.

    Raises:
        Failed: it has a mistake in it: the first, with its line.
        OSError: it cannot be read.
    """
    text = syntax.read(path).decode("utf-8", "surrogateescape")
    return read(text, path)


def read(text: str, path: str) -> Recipe:
    """The recipe that stands in a file. Raises Failed: as `load()`."""
    parsed = syntax.parse(text, path)
    for remark in parsed.remarks:
        raise _wrong(remark.path, remark.text.removeprefix("ignored: "))
    lists: dict[str, list[str]] = {key: [] for key in _LISTS}
    notes: list[str] = []
    for line in parsed.assignments:
        if line.section in COPIED:
            continue
        if line.section != SECTION:
            raise _at(line, f"[{shown(line.section)}] is no section of a recipe")
        if line.key == "Note":
            notes.append(line.value)
        elif line.key in lists:
            lists[line.key] += _words(line)
        else:
            raise _at(line, f"{shown(line.key)}= is not known in [{SECTION}]")
    for key in ("Units", "From"):
        if not lists[key]:
            raise _wrong(path, f"{key}= is missing in [{SECTION}]")
    copied = tuple(line for line in parsed.assignments if line.section in COPIED)
    for remark in config.service_settings(copied)[1]:
        raise _wrong(remark.path, remark.text.removeprefix("ignored: "))
    return Recipe(
        name=os.path.basename(path).removesuffix(_SUFFIX),
        path=path,
        units=tuple(lists["Units"]),
        sources=tuple(lists["From"]),
        packages=tuple(lists["Packages"]),
        exclude=tuple(lists["Exclude"]),
        notes=tuple(notes),
        settings=copied,
    )


def _words(line: Assignment) -> list[str]:
    words = line.value.split()
    for word in words:
        problem = ""
        if line.key == "Units" and not word.endswith(".service"):
            problem = "no name of a service unit"
        elif line.key == "From":
            problem = bad_source(word)
        elif line.key == "Exclude" and "/" in word and not word.startswith("/etc/"):
            problem = "neither a name nor a path below /etc"
        if problem:
            raise _at(line, f"{line.key}= is {problem}: {shown(word)}")
    return words


def bad_source(path: str) -> str:
    """Why nothing can be taken from this path: "" where it can."""
    if not path.startswith("/etc/") or os.path.normpath(path) in ("/etc", "/"):
        return "no path below /etc"
    return "" if os.path.normpath(path) == path.rstrip("/") else "not written plainly"


def _at(line: Assignment, problem: str) -> Failed:
    return _wrong(f"{line.path}:{line.line}", problem)


def _wrong(place: str, problem: str) -> Failed:
    return Failed(f"recipe {shown(place)}: {problem}: mend it, or link it to /dev/null")
