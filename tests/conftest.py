# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all tests share: skipping with a reason, a limit on each test, and the check that nothing is left behind."""

from __future__ import annotations

import faulthandler
import gc
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import pytest

from support import fork_server, needs
from support.apart import SHARED
from support.leaks import RUN, Snapshot, settled

# Nothing of a test may depend on how busy the machine is.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)

TEST_SECONDS = 180
"""No test may hang: after this long it fails. `@pytest.mark.limit(SECONDS)` allows more."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(what, ...): of the machine, by needs.py")
    config.addinivalue_line("markers", "limit(seconds): how long the test may take before it is failed")
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")
    os.environ[RUN] = uuid.uuid4().hex
    if hasattr(config, "workerinput"):
        os.environ[SHARED] = str(Path(config.option.basetemp).parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: Sequence[Any]) -> None:
    """Give each process that runs tests a mount namespace: a test counts mounts, and daemons follow the mount table."""
    if needs.lacking(needs.root.mark) or needs.lacking(needs.tool("unshare").mark):
        return
    for spec in specs:
        spec.python = shlex.join(["unshare", "--mount", "--propagation", "private", "--", sys.executable])


def pytest_collection_finish() -> None:
    # What is imported and collected stays: each search for garbage would look at all of it.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    fork_server.stop()


def _in_bed(item: pytest.Item) -> bool:
    return Path(__file__).with_name("beds") in item.path.parents


def _bed_place(item: pytest.Item) -> int:
    fixtures = set(getattr(item, "fixturenames", ()))
    if "bed254" in fixtures or {"bed257", "bed262"} <= fixtures:
        return 1
    version = item.callspec.params.get("bed") if hasattr(item, "callspec") else None
    return {"262": 2, None: 3, "257": 4}[version]


def _limit(item: pytest.Item) -> int:
    """Seconds that a test may take."""
    mark = item.get_closest_marker("limit")
    return int(mark.args[0]) if mark else TEST_SECONDS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Neighbours, which mostly share a process, share a bed; and what may take long begins first."""
    # Of tests that are run apart together (support/apart.py), the first does the work, and the others wait for it.
    first = {getattr(getattr(item, "obj", None), "apart", item.nodeid): item for item in reversed(items)}
    working = set(first.values())

    def place(item: pytest.Item) -> tuple[int, int]:
        return _bed_place(item) if _in_bed(item) else 0, -_limit(item) if item in working else -TEST_SECONDS

    items.sort(key=place)
    for item in filter(_in_bed, items):
        item.add_marker(needs.bed)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        reason = needs.lacking(mark)
        if reason:
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    seconds = _limit(item)

    def expired(signum: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _mounts_things(request: pytest.FixtureRequest) -> bool:
    module = request.node.nodeid
    return any(
        item.nodeid.startswith(module)
        and any(mark.args[:1] in (("root",), ("userns",)) for mark in item.iter_markers("needs"))
        for item in request.session.items
    )


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fails a module that mounts when it leaves mounts, loop devices, processes, namespaces or descriptors behind."""
    if not _mounts_things(request):
        yield
        return
    scratch = tmp_path_factory.getbasetemp()
    before = Snapshot.take(scratch)
    yield
    left = settled(before, scratch)
    if left:
        pytest.fail(f"{request.node.nodeid} left behind:\n  " + "\n  ".join(left), pytrace=False)
