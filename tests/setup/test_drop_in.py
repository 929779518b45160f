# SPDX-License-Identifier: LGPL-2.1-or-later
"""The drop-in that `init` writes: what it says, and whether a person has changed it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from watcher.settings import config, syntax
from watcher.setup import drop_in, recipes

RECIPE = recipes.read(
    "[Recipe]\nUnits=web.service\nFrom=/etc/web\nNote=Know this.\n"
    "[X-Confext]\nCheck=/usr/sbin/web -t\n[Service]\nExecReload=/bin/true\n",
    "/usr/share/confext-watcher/recipes/web.conf",
)


def test_it_says_what_the_recipe_says_who_made_it_and_how_to_undo_it() -> None:
    first, _, *rest = drop_in.text("web.service", "web.raw.v", RECIPE).splitlines()
    assert first.startswith("# ") and first.endswith("Undo: confext-watcher remove web.service")
    assert rest == [
        "# Know this.",
        "[X-Confext]",
        "Check=/usr/sbin/web -t",
        "[Service]",
        "ExecReload=/bin/true",
    ]


@pytest.mark.parametrize("recipe", [RECIPE, None])
def test_who_may_deploy_is_one_more_setting(recipe: recipes.Recipe | None) -> None:
    text = drop_in.text("web.service", "web.raw.v", recipe, "deploy")
    settings, remarks = config.service_settings(syntax.parse(text, "/x").assignments)
    assert settings.trusted_users == ("deploy",) and remarks == ()
    assert settings.check == (("/usr/sbin/web -t",) if recipe else ())


def test_without_a_recipe_it_says_how_to_give_a_check() -> None:
    text = drop_in.text("web.service", "web.raw.v", None)
    assert "# Check=" in text and syntax.parse(text, "/x").assignments == ()


def test_a_change_by_hand_is_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "confext.conf")
    assert drop_in.read(path) is None
    text = drop_in.text("web.service", "web.raw.v", RECIPE)
    drop_in.write(path, text)
    assert drop_in.read(path) == drop_in.Written(text, "web.raw.v", changed=False)
    assert os.stat(path).st_mode & 0o777 == 0o644 and os.listdir(tmp_path) == ["confext.conf"]
    for changed in (text + "CheckSec=9\n", text.replace("web -t", "web -tt"), text.replace("# Know", "# No")):
        drop_in.write(path, changed)
        there = drop_in.read(path)
        assert there is not None and there.changed and there.entry == "web.raw.v"
    drop_in.write(path, "[X-Confext]\nCheck=/bin/true\n")
    there = drop_in.read(path)
    assert there is not None and there.changed and not there.entry
