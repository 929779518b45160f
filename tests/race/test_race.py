# SPDX-License-Identifier: LGPL-2.1-or-later
"""The race for a few seconds, and on daemons broken on purpose: then the harness sees what must not be."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from race import contents
from race.harness import race
from scenarios.place import SCRATCH
from support.needs import loop, root, tool

pytestmark = [root, loop, tool("mksquashfs")]

WITHOUT_LEASES = """
from watcher.watch import lease
def enter(self):
    self._open, self._before = True, self._signature()
    return self
lease.Lease.__enter__ = enter
lease.Lease.held = lambda self: True
lease.Lease.release = lambda self: None
"""
WITHOUT_STRICT_MODES = """
from watcher.images import opened
real = opened._open
opened._open = lambda candidate, modes, way: real(candidate, None, way)
"""


@contextmanager
def home() -> Iterator[Path]:
    """A directory; not pytest's own, which is root's alone."""
    with (
        TemporaryDirectory(prefix="confext-watcher-race-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        os.chmod(directory, 0o755)
        patch.setenv(SCRATCH, directory)
        yield Path(directory)


def test_what_is_mounted_is_one_of_the_contents_that_were_whole() -> None:
    """5 s, and the daemon's start: `make race` takes a minute."""
    with home() as place:
        result = race(place, 5)
    assert not result.violations, result
    assert result.applied and result.looks > 100, result


@pytest.mark.parametrize(
    ("broken", "kinds", "seen"),
    [
        (WITHOUT_LEASES, ["rewrite", "rewrite_mapped"], "files of several|not the content|applied: "),
        (WITHOUT_STRICT_MODES, ["link_to_roots"], "what only root may read"),
    ],
    ids=["without-leases", "without-strict-modes"],
)
def test_a_daemon_that_is_broken_is_found_out(broken: str, kinds: list[str], seen: str) -> None:
    """Of the harness: what it would see if the daemon did not do what keeps it from being seen.

    The attacker needs luck, and may try until he has it.
    """
    results = []
    for seed in range(0, 2000, 100):
        with home() as place:
            results.append(race(place, 3, kinds=["rename_into_place", *kinds], broken=broken, seed=seed))
        if any(re.search(seen, said) for said in results[-1].violations):
            return
    pytest.fail(f"never found out: {results}")


def test_what_is_a_violation() -> None:
    good = {file: contents.content("A", file) for file in contents.FILES}
    assert not contents.violation({}) and not contents.violation(good)
    for wrong in (
        {**good, "one": contents.content("B", "one")},
        {**good, "one": good["one"][:-1]},
        {**good, "four": b""},
        {"one": good["one"]},
        {file: contents.content(contents.SECRET, file) for file in contents.FILES},
        {**good, "one": good["one"][:1000] + contents.content("B", "one")[1000:]},
    ):
        assert contents.violation(wrong)
