# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ten thousand swaps, and nobody who reads in the service meanwhile sees anything of them but the new files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.needs import root
from support.service import Service
from watcher.model import Stack
from watcher.mounts.swap import swap

from .conftest import Layers, Swaps

pytestmark = root

SWAPS = 10_000
READS = ("path", "hidden", "pair", "held")
"""All in one process: with another one, two processors have less time for the swaps."""
READER = Path(__file__).with_name("reader.py")
CHECKOUT = READER.parent.parent.parent


@pytest.mark.limit(600)
def test_nobody_sees_a_swap(
    service: Service, swaps: Swaps, layers: Layers, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = swaps.workers
    stacks = [
        Stack((layers.tree({"one": content, "app/two": content, "secret": "to be hidden"}),))
        for content in "12"
    ]
    service("(write('/hidden', ''), os.chmod('/hidden', 0))")
    swaps(service, *stacks[0].layers)
    service("(bind('/hidden', '/etc/secret'), bind('/hidden', '/etc/app/private'))")
    swaps(service, *stacks[1].layers)
    command = [sys.executable, str(READER), str(service.pid), *READS]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as reader:
        try:
            assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
            for number in range(SWAPS):
                workers.submit(swap, workers, service.namespace, stacks[number % 2], layers.copies).result()
            reader.terminate()
            found: dict[str, dict[str, Any]] = json.loads(reader.stdout.readline())
        finally:
            reader.kill()
    with capsys.disabled():
        reads = ", ".join(f"{what} {result['reads']}" for what, result in found.items())
        wrong = {what: result["wrong"] for what, result in found.items() if result["wrong"]}
        print(f"\n{SWAPS} swaps; reads: {reads}; errors: {wrong or 0}")
    assert not wrong
    assert all(result["reads"] > SWAPS for result in found.values())
