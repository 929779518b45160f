# SPDX-License-Identifier: LGPL-2.1-or-later
"""One bed of each systemd for all tests: `bed262`, `bed257`, `bed254`; `new_bed` for a test that needs its own."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import pytest

from beds.bed import Bed
from support.leaks import Snapshot, settled


@pytest.fixture(scope="session", autouse=True)
def nothing_of_the_beds_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Once for all beds: they live longer than a module. A bed itself looks at its loop devices (`Bed.stop`)."""
    scratch = tmp_path_factory.getbasetemp()
    before = Snapshot.take(scratch)
    yield
    left = settled(before, scratch)
    if left:
        pytest.fail("the beds left behind:\n  " + "\n  ".join(left), pytrace=False)


def _bed(version: str) -> Iterator[Bed]:
    with Bed(version) as bed:
        yield bed


@pytest.fixture(scope="session")
def bed262() -> Iterator[Bed]:
    """systemd 262, of Debian forky."""
    yield from _bed("262")


@pytest.fixture(scope="session")
def bed257() -> Iterator[Bed]:
    """systemd 257, of Debian 13."""
    yield from _bed("257")


@pytest.fixture(scope="session")
def bed254() -> Iterator[Bed]:
    """systemd 254, of Debian 12's backports: older than what is supported."""
    yield from _bed("254")


@pytest.fixture(scope="session", params=["262", "257"])
def bed(request: pytest.FixtureRequest) -> Bed:
    """Each supported systemd in turn."""
    found: Bed = request.getfixturevalue(f"bed{request.param}")
    return found


@pytest.fixture
def new_bed() -> Iterator[Callable[[str], Bed]]:
    """Boots further beds, `new_bed("257")`, for one test."""
    beds: list[Bed] = []

    def boot(version: str) -> Bed:
        beds.append(Bed(version))
        beds[-1].boot()
        return beds[-1]

    yield boot
    for booted in reversed(beds):
        booted.stop()


def _beds(item: pytest.Item) -> list[Bed]:
    """Those that run, of the fixtures of a test."""
    found = item.funcargs.values() if isinstance(item, pytest.Function) else ()
    return list({id(bed): bed for bed in found if isinstance(bed, Bed) and bed.pid}.values())


_TAKES_PART = re.compile(r"^\s*Extension(Images|Directories)\s*=", re.MULTILINE)


def _taking_part(beds: list[Bed]) -> set[str]:
    """Where it says in these beds that a unit takes part; no unit of Debian's does."""
    found = set()
    for bed in beds:
        for place in ("/etc/systemd/system", "/run/systemd/system", "/run/systemd/transient"):
            directory = bed.path(place)
            for path in (*directory.glob("*.service"), *directory.glob("*.service.d/*.conf")):
                # An absolute link would lead out of the bed; a transient unit goes when it likes.
                with contextlib.suppress(FileNotFoundError):
                    plain = path.is_file() and not path.is_symlink()
                    if plain and _TAKES_PART.search(path.read_text(errors="replace")):
                        found.add(f"{bed.name}: {place}/{path.relative_to(directory)}")
            found.update(f"{bed.name}: {place}/{path.name}" for path in directory.glob("*.confext.d"))
    return found


@pytest.fixture(autouse=True)
def nobody_takes_part_any_more(request: pytest.FixtureRequest) -> Iterator[None]:
    """A unit that a test leaves behind makes another one fail, of those that share its bed."""
    before = _taking_part(_beds(request.node))
    yield
    deadline = time.monotonic() + 5
    while left := _taking_part(_beds(request.node)) - before:
        if time.monotonic() > deadline:
            pytest.fail("still taking part:\n  " + "\n  ".join(sorted(left)), pytrace=False)
        time.sleep(0.02)  # systemd takes a transient unit away after its end, when it comes to that


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what the journals of its beds say."""
    report = yield
    if report.when == "call" and report.failed:  # type: ignore[attr-defined]
        for bed in _beds(item):
            report.sections.append((f"journal of {bed.name}", bed.journal("--lines=60")))  # type: ignore[attr-defined]
    return report
