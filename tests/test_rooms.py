# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shape of the house: CONTRIBUTING.md says what it is, and this keeps it so."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import CHECKOUT

PACKAGE = CHECKOUT / "watcher"
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
ROOMS = [module for module in MODULES if module.name == "__init__.py" and module != Path("__init__.py")]

LINES_MAX = 400
SCREEN = 60


def lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([tool, "--no-cache"], cwd=checkout, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        (
            "records/journal.py",
            "from watcher.rounds import rollout",
            "watcher.records is not allowed to import",
        ),
        ("images/store.py", "import watcher.managers.base", "watcher.images is not allowed to import"),
        ("settings/syntax.py", "import trio", "watcher.generator is not allowed to import trio"),
        ("resolve/vpick.py", "import watcher.records.journal", "watcher.resolve is not allowed to import"),
    ],
)
def test_an_import_against_the_order_of_the_rooms_is_found(
    tmp_path: Path, module: str, line: str, broken: str
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "watcher", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    assert lint_imports(tmp_path).returncode == 0
    with (tmp_path / "watcher" / module).open("a") as file:
        file.write(f"\n{line}\n")
    checked = lint_imports(tmp_path)
    assert checked.returncode == 1
    assert broken in checked.stdout


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_a_room_begins_with_its_paragraph_and_nothing_else(room: Path) -> None:
    """What enters a service's namespace imports its room first, and must get nothing else with it."""
    (paragraph,) = ast.parse((PACKAGE / room).read_text()).body
    assert isinstance(paragraph, ast.Expr) and isinstance(paragraph.value, ast.Constant)
    assert "This room never" in " ".join(str(paragraph.value.value).split())


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_and_each_of_its_functions_can_be_read_at_once(module: Path) -> None:
    source = (PACKAGE / module).read_text()
    assert len(source.splitlines()) <= LINES_MAX
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [function.name for function in functions if (function.end_lineno or 0) - function.lineno >= SCREEN]
    assert long == []


def test_every_module_has_its_tests_or_a_scenario_that_names_it() -> None:
    named = "".join(
        ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in (CHECKOUT / "tests").rglob("test_*.py")
    )
    without = [
        str(module)
        for module in MODULES
        if module.name not in ("__init__.py", "__main__.py")
        and not (CHECKOUT / "tests" / module.with_name(f"test_{module.name}")).exists()
        and not re.search(rf"(?<![\w/]){re.escape(str(module))}", named)
    ]
    assert without == []


def test_what_contributing_names_is_there() -> None:
    page = (CHECKOUT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`(\w[\w.-]*/[\w./-]*)`|\]\((\w+/[\w/.]*)\)", page)
    named = {inside or link for inside, link in paths if "ROOM" not in inside}
    assert len(named) > 30
    assert [
        name for name in sorted(named) if not ((PACKAGE / name).exists() or (CHECKOUT / name).exists())
    ] == []


def test_the_readme_leads_to_contributing() -> None:
    assert "(CONTRIBUTING.md)" in (CHECKOUT / "README.md").read_text()
