# SPDX-License-Identifier: LGPL-2.1-or-later
"""Have a unit take part with all that it needs: the directory, a first version of its image, and a drop-in.

First a plan, which changes nothing and can be shown; then it is carried out. Only what is not there yet is made, so
that a second time is nothing to do. What fails half-way leaves nothing: what was made is taken away again.

The drop-in comes first, so that the check in it counts for the first image, too; then the directory with the image in
it, in one rename; then systemd is told. A service that runs in the host's mount namespace needs one restart, which is
left to who calls.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from watcher.managers.systemd.unit_facts import settings_of
from watcher.managers.systemd.unit_files import SUFFIX, Index, Unit
from watcher.model import shown
from watcher.records.schema import Failed
from watcher.settings.config import Settings
from watcher.settings.unit_names import UNIT_PATHS, UnitName
from watcher.setup import drop_in, enable, first_image, first_version, recipes
from watcher.setup.drop_in import Written
from watcher.setup.first_version import Taken
from watcher.setup.recipes import Recipe

FIRST = "0"
"""Version of the first image: older than any that a person gives."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asks for; "" and () leave it to us.

    Attributes:
        service: name of a unit, with or without ".service".
        sources: what of /etc the first version takes, in place of the recipe's.
        name: of the image.
        recipe: name or path of one, "none" for none.
        user: who may deploy, besides root.
    """

    service: str
    sources: tuple[str, ...] = ()
    name: str = ""
    recipe: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        top: the drop directory.
        directory: the one for the versions of the image, in it.
        others: names of what is in the drop directory besides.
        versions: names of what is in `directory`.
        makes: `directory` is not there yet.
        image: path of the first version; "": there are versions, or nothing to make one of.
        sources: what it takes of the host.
        taken: what of that there is.
        drop_in: its path.
        there: the drop-in that is there.
        content: what it should say; "": it stays as it is.
        checked: the unit has a check already.
        user: who gets `directory`.
    """

    unit: Unit
    recipe: Recipe | None
    top: str
    directory: str
    others: tuple[str, ...]
    versions: tuple[str, ...]
    makes: bool
    image: str
    sources: tuple[str, ...]
    taken: Taken
    drop_in: str
    there: Written | None
    content: str
    checked: bool
    user: str = ""

    @property
    def nothing(self) -> bool:
        """Whether all is there already."""
        return not (self.image or self.content or self.makes)

    @property
    def name(self) -> str:
        """Of the image."""
        return os.path.basename(self.directory).removesuffix(".raw.v")

    @property
    def foreign(self) -> bool:
        """Whether the drop-in that is there is a person's, and stays."""
        return self.there is not None and self.there.changed


def plan(wish: Wish, settings: Settings, place: str = enable.PLACE) -> Plan:
    """Look at all that is there, and decide what is to be done.

    Raises:
        Failed: the unit cannot take part, or what was asked for cannot be; with what to do.
        OSError: something cannot be read.
    """
    index = Index(UNIT_PATHS)
    unit = enable.unit_of(index, wish.service)
    recipe = _recipe(wish, unit, settings)
    name = image_name(wish.name, unit.name)
    entry = f"{name}.raw.v"
    top = f"{place}/{unit.name}{SUFFIX}"
    directory = f"{top}/{entry}"
    there = names(top)
    versions = names(directory)
    path = f"{place}/{unit.name}.d/{drop_in.FILE}"
    written = drop_in.read(path)
    _require_user(wish.user)
    content = drop_in.text(unit.name, entry, recipe, wish.user)
    as_it_is = written is not None and (written.changed or written.text == content)
    sources = () if versions else _sources(wish, recipe, unit)
    excludes: Callable[[str], bool] = recipe.excludes if recipe else lambda path: False
    taken = first_version.take(sources, excludes, settings.image_max)
    if wish.sources and sources and not taken.files:
        raise Failed(
            f"there is nothing in {' '.join(map(shown, sources))} to make a first version of: --from PATH"
        )
    if taken.files:
        first_image.require_room(taken, top)
    return Plan(
        unit=unit,
        recipe=recipe,
        top=top,
        directory=directory,
        others=tuple(name for name in there if name != entry),
        versions=tuple(versions),
        makes=not os.path.isdir(directory),
        image=f"{directory}/{name}_{FIRST}.raw" if taken.files else "",
        sources=sources,
        taken=taken,
        drop_in=path,
        there=written,
        content="" if as_it_is else content,
        checked=bool(settings_of(index, unit)[0].check),
        user=wish.user,
    )


def _recipe(wish: Wish, unit: Unit, settings: Settings) -> Recipe | None:
    places = recipes.directories(settings.configuration_directory)
    if wish.recipe == "none":
        return None
    return recipes.named(wish.recipe, places) if wish.recipe else recipes.find(unit.names, places)


def image_name(name: str, unit: str) -> str:
    """The name of the image: without "_" and "+", behind which systemd looks for a version (systemd.v(7)).

    Raises Failed: the name that was asked for is none; "" asks for none.
    """
    if not name:
        return re.sub(r"[^A-Za-z0-9.-]+", "-", UnitName(unit).prefix).strip("-.") or "etc"
    if not _NAME.fullmatch(name):
        raise Failed(
            f"--name={shown(name)}: letters, digits, - and . alone: what follows a _ would be a version"
        )
    return name


def _sources(wish: Wish, recipe: Recipe | None, unit: Unit) -> tuple[str, ...]:
    if wish.sources:
        for source in wish.sources:
            if problem := recipes.bad_source(source):
                raise Failed(f"--from {shown(source)} is {problem}")
        return tuple(source.rstrip("/") for source in wish.sources)
    if recipe:
        return tuple(source.rstrip("/") for source in recipe.sources)
    usual = f"/etc/{UnitName(unit.name).prefix}"
    if os.path.isdir(usual) and not os.path.islink(usual):
        return (usual,)
    raise Failed(f"no recipe is for {shown(unit.name)}: say what it has in /etc, with --from /etc/...")


def _require_user(name: str) -> None:
    try:
        if name:
            pwd.getpwnam(name)
    except KeyError:
        raise Failed(f"--user {shown(name)}: there is no such user") from None


def names(directory: str) -> list[str]:
    """What there is in a directory that counts."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except FileNotFoundError:
        return []


def carry_out(plan: Plan, settings: Settings) -> enable.Enabled:
    """Do what is planned; the drop-in is in force when it returns.

    Raises:
        Failed: it did not work, and nothing of it is left; the reason.
        OSError: likewise.
    """
    with contextlib.ExitStack() as undo:
        if plan.content:
            _write_drop_in(plan, undo)
        if plan.image:
            _make_first(plan, settings, undo)
        elif plan.makes:
            _make_directory(plan.top, undo)
            _make_directory(plan.directory, undo)
            _give(plan.directory, plan.user)
        undo.callback(enable.systemctl, "daemon-reload", check=False)
        enable.bring_into_force(plan.unit, settings.state_directory, reload=bool(plan.content))
        found = enable.taking_part(plan.unit, plan.directory)
        undo.pop_all()
    return found


def _write_drop_in(plan: Plan, undo: contextlib.ExitStack) -> None:
    directory = os.path.dirname(plan.drop_in)
    _make_directory(directory, undo)
    if plan.there is not None:
        undo.callback(drop_in.write, plan.drop_in, plan.there.text)
    else:
        undo.callback(_unlink, plan.drop_in)
    drop_in.write(plan.drop_in, plan.content)


def _make_first(plan: Plan, settings: Settings, undo: contextlib.ExitStack) -> None:
    """The directory of versions with the first one in it appears in one step."""
    _make_directory(plan.top, undo)
    scratch = tempfile.mkdtemp(dir=plan.top, prefix=".init-")
    try:
        coming = f"{scratch}/{os.path.basename(plan.directory)}"
        os.mkdir(coming)
        os.chmod(coming, 0o755)
        image = f"{coming}/{os.path.basename(plan.image)}"
        excludes: Callable[[str], bool] = plan.recipe.excludes if plan.recipe else lambda path: False
        first_image.build(plan.sources, excludes, plan.name, image, settings.image_max)
        _give(coming, plan.user)
        if os.path.isdir(plan.directory):
            undo.callback(_unlink, plan.image)
            os.link(image, plan.image)  # never over one that came meanwhile
        else:
            undo.callback(_rmdir, plan.directory)
            undo.callback(_unlink, plan.image)
            os.rename(coming, plan.directory)
    finally:
        shutil.rmtree(scratch)


def _give(directory: str, user: str) -> None:
    if user:
        owner = pwd.getpwnam(user)
        os.chown(directory, owner.pw_uid, owner.pw_gid)


def _make_directory(path: str, undo: contextlib.ExitStack) -> None:
    if enable.make_directory(path):
        undo.callback(_rmdir, path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _rmdir(path: str) -> None:
    """Take away what we have made, unless a person has put something into it meanwhile."""
    with contextlib.suppress(OSError):
        os.rmdir(path)
