# SPDX-License-Identifier: LGPL-2.1-or-later
"""SECURITY.md: what it names exists, and the README leads to it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from support import CHECKOUT
from watcher import model

PAGE = (CHECKOUT / "SECURITY.md").read_text()
NAMED = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", PAGE)


def test_each_file_that_it_names_exists() -> None:
    assert NAMED
    assert [shown for shown, link in NAMED if shown != link] == []
    assert [link for _, link in NAMED if not (CHECKOUT / link).is_file()] == []


def test_each_test_that_it_names_has_tests() -> None:
    tests = [link for _, link in NAMED if Path(link).name.startswith("test_")]
    assert [
        link for link in tests if not re.search(r"^\s*(?:async )?def test_", _text(link), re.MULTILINE)
    ] == []


def test_each_promise_names_a_test() -> None:
    promises = re.findall(r"^- (.*?)(?=^- |^$)", PAGE, re.MULTILINE | re.DOTALL)
    assert promises and [promise for promise in promises if "tests/" not in promise] == []


def test_the_readme_leads_to_it() -> None:
    assert "(SECURITY.md)" in _text("README.md")


def test_the_limits_that_it_names_are_those_of_trees() -> None:

    assert f"{model.DEPTH_MAX} levels and {model.ENTRIES_MAX:,} entries" in " ".join(PAGE.split())


def test_it_belongs_to_the_source_and_not_to_the_package() -> None:
    project = tomllib.loads(_text("pyproject.toml"))
    assert "SECURITY.md" not in str(project["tool"]["hatch"]["build"]["targets"]["wheel"])


def _text(path: str) -> str:
    return (CHECKOUT / path).read_text()
