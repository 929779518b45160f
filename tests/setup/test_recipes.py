# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recipe is what its file says, and one with a mistake in it is not used at all."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest

from support import CHECKOUT
from watcher.records.schema import Failed
from watcher.settings import config
from watcher.setup import recipes

SHIPPED = sorted((CHECKOUT / "contrib/recipes").iterdir())

GOOD = """\
[Recipe]
Units=web.service web@*.service
From=/etc/web
From=/etc/default/web
Exclude=*.key /etc/web/run/*
Note=First.
Note=Second, with = and # in it.
[X-Confext]
Check=/usr/sbin/web -t
Check=/usr/sbin/web --probe %i
[Service]
ExecReload=/bin/kill -HUP $MAINPID
"""


def test_what_a_recipe_says() -> None:
    recipe = recipes.read(GOOD, "/x/web.conf")
    assert (recipe.name, recipe.sources) == ("web", ("/etc/web", "/etc/default/web"))
    assert recipe.notes == ("First.", "Second, with = and # in it.")
    assert recipe.is_for(["other.service", "web@a.service"]) and recipe.is_for(["web@.service"])
    assert not recipe.is_for(["webs.service"])
    assert recipe.excludes("/etc/web/ssl/a.key") and recipe.excludes("/etc/web/run/pid")
    assert not recipe.excludes("/etc/web/web.conf")
    assert recipe.checks
    assert recipe.sections() == [
        "[X-Confext]",
        "Check=/usr/sbin/web -t",
        "Check=/usr/sbin/web --probe %i",
        "[Service]",
        "ExecReload=/bin/kill -HUP $MAINPID",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[Recipe]\nUnits=a.service\n", "Units.conf: From= is missing"),
        ("[Recipe]\nFrom=/etc/a\n", "Units= is missing"),
        ("[Recipe]\nUnits=a.service\nFrom=/etc\n", ":3: From= is no path below /etc: /etc"),
        ("[Recipe]\nUnits=a.service\nFrom=/etc/\n", "no path below /etc"),
        ("[Recipe]\nUnits=a.service\nFrom=/var/a\n", "no path below /etc"),
        ("[Recipe]\nUnits=a.service\nFrom=/etc/../root\n", "From= is "),
        ("[Recipe]\nUnits=a.service\nFrom=/etc/a/../b\n", "not written plainly"),
        ("[Recipe]\nUnits=a\nFrom=/etc/a\n", ":2: Units= is no name of a service unit: a"),
        ("[Recipe]\nUnits=a.service\nFrom=/etc/a\nExclude=b/c\n", ":4: Exclude= is neither"),
        ("[Recipe]\nunits=a.service\n", ":2: units= is not known in [Recipe]"),
        ("[Unit]\nAfter=b\n", ":2: [Unit] is no section of a recipe"),
        ("[Recipe]\nUnits\n", ":2: not of the form KEY=VALUE"),
        (GOOD.replace("Check=", "Chek="), ":9: Chek= is not known in [X-Confext]"),
        (GOOD.replace("[Service]", "ReloadSec=soon\n[Service]"), "ReloadSec= is "),
        (GOOD + "\udcff=1\n", "not valid UTF-8"),
    ],
)
def test_a_recipe_with_a_mistake_is_one_clear_line(text: str, problem: str) -> None:
    with pytest.raises(Failed) as raised:
        recipes.read(text, "/x/Units.conf")
    assert problem in str(raised.value)
    assert "/x/Units.conf" in str(raised.value) and "\n" not in str(raised.value)


def made(directory: Path, name: str, text: str = GOOD) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)


def test_a_local_recipe_takes_the_place_of_that_of_the_package(tmp_path: Path) -> None:
    made(tmp_path / "usr", "web.conf")
    made(tmp_path / "usr", "other.conf", GOOD.replace("web", "other"))
    made(tmp_path / "etc", "web.conf", GOOD.replace("web -t", "mine -t"))
    places = [str(tmp_path / "etc"), str(tmp_path / "usr")]
    found = recipes.find(["web.service"], places)
    assert found is not None and found.path == str(tmp_path / "etc/web.conf")
    assert recipes.named("web.conf", places) == recipes.named("web", places) == found
    assert recipes.find(["none.service"], places) is None
    (tmp_path / "etc/web.conf").unlink()
    os.symlink("/dev/null", tmp_path / "etc/web.conf")
    assert recipes.find(["web.service"], places) is None
    with pytest.raises(Failed, match="no such recipe, only other"):
        recipes.named("web", places)


def test_two_recipes_for_one_unit_are_not_chosen_from(tmp_path: Path) -> None:
    made(tmp_path / "usr", "web.conf")
    made(tmp_path / "usr", "web2.conf")
    with pytest.raises(Failed, match=r"web\.conf and .*web2\.conf: choose one by --recipe"):
        recipes.find(["web.service"], [str(tmp_path / "usr")])
    assert recipes.named(str(tmp_path / "usr/web2.conf"), []).name == "web2"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_recipe_of_ours_is_right(path: Path) -> None:
    assert path.suffix == ".conf"
    recipe = recipes.load(str(path))
    settings, remarks = config.service_settings(recipe.settings)
    assert remarks == ()
    assert settings.enabled and not settings.trusted_users and not settings.trusted_groups
    for command in settings.check + settings.health_check:
        assert command.startswith("/"), "commands are run without a shell, and without a search path"
    assert all(len(note) <= 160 for note in recipe.notes)


def test_no_two_of_our_recipes_are_for_one_unit() -> None:
    claimed = [(name, path.name) for path in SHIPPED for name in recipes.load(str(path)).units]
    for unit, of in claimed:
        assert [who for pattern, who in claimed if fnmatch.fnmatchcase(unit, pattern)] == [of]
