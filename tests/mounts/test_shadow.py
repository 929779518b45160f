# SPDX-License-Identifier: LGPL-2.1-or-later
"""In a shadow a stack can be tried, and neither the service nor the host sees anything of it."""

from __future__ import annotations

import os

from support.needs import root
from support.service import Service
from watcher.model import Stack
from watcher.mounts.swap import shadow
from watcher.mounts.workers import MountWorkers

from .conftest import Layers, Swaps

pytestmark = root


def test_a_shadow_shows_the_stack_and_the_service_does_not(
    service: Service, layers: Layers, swaps: Swaps, workers: MountWorkers
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    service("tmpfs('/etc/app')")
    swaps(service, one)
    before = service("rows()")
    fd = workers.submit(shadow, workers, service.namespace, Stack((two,)), layers.copies).result()

    def look() -> str:
        with workers.entered(fd):
            tried = os.open("/etc/web.conf", os.O_RDONLY)
            with open(tried) as file:
                return file.read()

    try:
        assert workers.submit(look).result() == "2"
    finally:
        os.close(fd)
    assert service.read("/etc/web.conf") == "1"
    assert service("rows()") == before
