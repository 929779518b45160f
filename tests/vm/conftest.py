# SPDX-License-Identifier: LGPL-2.1-or-later
"""One virtual machine for all tests: to boot it takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm.machine import Machine
from vm.program import install


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The machine with the checkout's program, as its package would install it."""
    with Machine() as booted:
        install(booted, tmp_path_factory.mktemp("program"))
        yield booted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows what the machine's journal and its console say."""
    report = yield
    machine = item.funcargs.get("machine") if isinstance(item, pytest.Function) else None
    if report.when == "call" and report.failed and isinstance(machine, Machine):  # type: ignore[attr-defined]
        report.sections.append(("journal of the machine", machine.journal("--lines=60")))  # type: ignore[attr-defined]
        report.sections.append(("console of the machine", machine.console()))  # type: ignore[attr-defined]
    return report
