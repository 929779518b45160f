# SPDX-License-Identifier: LGPL-2.1-or-later
"""`place`: a place of its own for a test; `shared`: one with a daemon that the tests of a module have in common."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.place import SCRATCH, Place, Service
from support.needs import root, tool, userns

IMAGES = pytest.param("images", marks=[root, tool("mksquashfs")])
TREES = pytest.param("trees", marks=userns)


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ[SCRATCH] = str(tmp_path_factory.mktemp("confexts"))


@pytest.fixture(params=[IMAGES, TREES])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """No daemon yet, no services."""
    with Place(tmp_path_factory.mktemp("place"), trees=request.param == "trees") as made:
        yield made


@pytest.fixture
def open_place() -> Iterator[Place]:
    """For images; where everybody may look, as in `/run` and `/var/lib`, and unlike in pytest's own directories."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        with Place(Path(path)) as place:
            yield place


@pytest.fixture(scope="module", params=[IMAGES, TREES])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """With a daemon that lives for the module: a test uses services of its own, and leaves the daemon alone.

    A module may say in SETTINGS what goes into its `watcher.conf`.
    """
    with Place(tmp_path_factory.mktemp("shared"), trees=request.param == "trees") as made:
        made.configure("SettleSec=20ms", *getattr(request.module, "SETTINGS", ()))
        made.start_daemon()
        yield made


@pytest.fixture(scope="module")
def long_lived(shared: Place) -> Service:
    """One service for the tests of a module: starting one takes longer than most of them."""
    return shared.start(name="long.service")


@pytest.fixture
def service(long_lived: Service) -> Service:
    """Of `shared`, with nothing but a version "0" of "web" in its directory."""
    long_lived.renew()
    return long_lived


@pytest.fixture(autouse=True)
def only_its_own_services(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test started at a shared place ends with the test."""
    yield
    if "shared" in request.fixturenames:
        shared: Place = request.getfixturevalue("shared")
        for service in [one for one in shared.services if one.name != "long.service"]:
            shared.services.remove(service)
            service.kill()
