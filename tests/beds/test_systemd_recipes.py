# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipes in contrib/recipes with the services of Debian 13 that they are for, all of them in one container.

Each runs on an image, gets a better one, and then a broken one. Beside each other, so that it takes a minute; what is
wrong is told for each of them.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from beds import roots, site
from beds.bed import Bed
from beds.host import SECONDS, UNITS, Host, Journal
from beds.recipe_cases import CASES, HOST, SETUP, Case
from support import CHECKOUT, needs
from watcher.setup import recipes

pytestmark = [needs.bed, needs.tool("mksquashfs")]

RECIPES = CHECKOUT / "contrib/recipes"
UNIT = {case.unit: case for case in CASES}
NOT_HERE = {"grafana": "Debian 13 has no package of it"}
"""Recipes that are not tested, and why."""


@pytest.fixture
def debian(capsys: pytest.CaptureFixture[str]) -> Iterator[Bed]:
    with capsys.disabled():  # it takes a minute where it is not there yet
        roots.build_services("trixie")
    with Bed("257", services=True) as bed:
        yield bed


@pytest.fixture
def host(debian: Bed) -> Iterator[Host]:
    with site.host(debian) as made:
        yield made


@pytest.mark.parametrize("name", NOT_HERE)
def test_a_recipe_that_is_not_tested_says_so(name: str) -> None:
    text = (RECIPES / f"{name}.conf").read_text()
    assert "Not tested here" in text.splitlines()[1] and "Note=Not tested here" in text
    pytest.skip(f"the recipe for {name} with its service: {NOT_HERE[name]}")


def test_each_recipe_is_tested_or_it_is_said_why_not() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == {case.recipe for case in CASES} | set(NOT_HERE)


def test_a_good_image_is_in_force_and_a_broken_one_is_not_and_the_service_stays_up(host: Host) -> None:
    for path, text in HOST.items():
        host.bed.path(path).write_text(text)
    host.bed.run(["sh", "-ec", SETUP])
    for case in CASES:
        take_part(host, case)
    wrong = Wrong(host)
    journal = host.journal()
    host.watch()
    wrong.unless_outcomes(journal, 1, lambda case: "applied: ")
    host.bed.run(["systemctl", "start", *UNIT], check=False)
    for unit in UNIT:
        state = host.bed.property(unit, "ActiveState")
        wrong.unless(state == "active", unit, f"is {state}")
    wrong.unless_they_answer(1, "on image 1")
    started = {unit: invocation(host, unit) for unit in UNIT}

    for case in CASES:
        drop(host, case, 2)
    wrong.unless_outcomes(journal, 2, lambda case: "applied: ")
    wrong.unless_they_answer(2, "on image 2")
    for unit, case in UNIT.items():
        now = invocation(host, unit)
        wrong.unless((started[unit] != now) == case.restarts, unit, "restarted, or not, for the second image")
        started[unit] = now

    for case in CASES:
        drop(host, case, 3)
    wrong.unless_outcomes(journal, 3, lambda case: case.end)
    wrong.unless_they_answer(2, "after the broken image")
    for unit, case in UNIT.items():
        same = started[unit] == invocation(host, unit)
        wrong.unless(same or case.end != "refused: ", unit, "restarted for the broken image")
    logged_in = ["nsenter", "--target", str(host.main_pid("ssh.service")), "--mount", "--", "touch", "/etc/x"]
    said = host.bed.run(logged_in, check=False).stderr
    wrong.unless("Read-only" in said, "ssh.service", f"who logs in may write to /etc: {said}")
    assert not wrong.said, "\n".join(wrong.said)


class Wrong:
    """What is wrong, so that a test can look at all services before it fails."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.said: list[str] = []

    def unless(self, right: object, unit: str, what: str) -> None:
        if not right:
            self.said.append(f"{unit}: {what}")

    def unless_outcomes(self, journal: Journal, version: int, expected: Callable[[Case], str]) -> None:
        """How the outcome of that image begins, for each."""
        of_it = re.compile(rf"site {version} (added|taken)|-> {version}\b")
        found: dict[str, str] = {}
        with contextlib.suppress(AssertionError):
            while len(found) < len(UNIT):
                entry = journal.until(lambda entry: "CONFEXT_OUTCOME" in entry)
                if entry["CONFEXT_SERVICE"] in UNIT and of_it.search(entry["MESSAGE"]):
                    found[entry["CONFEXT_SERVICE"]] = f"{entry['CONFEXT_OUTCOME']}: {entry['MESSAGE']}"
        for unit, told in (dict.fromkeys(UNIT, "none") | found).items():
            right = told.startswith(expected(UNIT[unit]))
            self.unless(right, unit, f"the outcome of image {version} is {told}")

    def unless_they_answer(self, version: int, when: str) -> None:
        """What the services themselves answer: old processes of one that has reloaded may do that for a moment."""
        deadline = time.monotonic() + SECONDS / 4
        left = dict.fromkeys(CASES, "")
        while left and time.monotonic() < deadline:
            left = {case: ask(self._host, case) for case in left}
            left = {case: found for case, found in left.items() if case.answer(version) not in found}
        for case, found in left.items():
            self.unless(False, case.unit, f"{when} it answers {found!r}, not {case.answer(version)!r}")


def ask(host: Host, case: Case) -> str:
    done = host.bed.run(["bash", "-c", case.ask], check=False)
    return done.stdout.strip() or done.stderr.strip()


def take_part(host: Host, case: Case) -> None:
    """As `confext-watcher init` has it: a drop-in with what the recipe says, and a first image."""
    recipe = recipes.load(str(RECIPES / f"{case.recipe}.conf"))
    assert recipe.is_for([case.unit]), case.unit
    drop_in = host.bed.path(f"{UNITS}/{case.unit}.d/recipe.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("\n".join([*recipe.sections(), case.settings]))
    host.take_part(case.unit)
    drop(host, case, 1)


def drop(host: Host, case: Case, version: int) -> Path:
    name = f"site_{version}"
    return host.drop(host.image(name, case.files(version)), case.unit, f"site.raw.v/{name}.raw")


def invocation(host: Host, unit: str) -> str:
    """What tells one start of a unit from another."""
    return host.bed.property(unit, "InvocationID")
