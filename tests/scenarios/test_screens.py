# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person sees of services in all states, in a real terminal: tests/screens/."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from scenarios.place import PYTHON, Place, Service, image, until
from support.fork_server import COMMAND
from support.needs import root, tool
from support.screens import keep, look, place_path
from watcher.rounds.facts import AFTERGLOW_USEC

pytestmark = [root, tool("mksquashfs"), tool("unshare")]

# Another namespace than the one that `exec` made.
OUT_OF_REACH = ("unshare", "--mount", *PYTHON)


@pytest.fixture(scope="module")
def many() -> Iterator[Place]:
    """A service in each state."""
    with place_path() as path, Place(path) as place:
        place.start_daemon()
        stopped = start(place, "wiki.service", "1.3")
        proved = time.monotonic() + AFTERGLOW_USEC / 1e6
        health = ("--health-check=grep -qv bad /etc/web.conf", "--set=HealthCheckSec=5s")
        bad = start(place, "shop.service", "1.3", *health)
        bad.put("1.4", value="bad")  # what comes of it is seen below
        start(place, "api.service", "1.4")
        trial = start(
            place, "cache.service", "2.0", "--health-check=false", "--set=HealthCheckSec=1h", wait=False
        )
        trial.said.wait_for("^reloaded 2.0")
        refused = start(place, "db.service", "1.3")
        place.bring(
            image("web_1.4", "1.4", release="ID=other\n"), refused.versions / f"web_1.4{place.suffix}"
        )
        refused.logged("refused", "1.4")
        checked = start(place, "front.service", "1.3", "--check=grep -qv bad /etc/web.conf")
        checked.put("1.4", value="bad")
        checked.logged("refused", "1.4")
        partial = start(place, "mail.service", "1.3")
        whole = place.confext("1.4").read_bytes()
        (partial.versions / ".new").write_bytes(whole[:9000])
        (partial.versions / ".new").rename(partial.versions / f"web_1.4{place.suffix}")
        partial.logged("incomplete", "1.4")
        apart = place.start(name="news.service", program=OUT_OF_REACH)
        apart.put("1.3")
        apart.logged("restart it once")
        pinned = start(place, "proxy.service", "1.3")
        pinned.put("1.4")
        settled(pinned, "1.4")
        place.run("rollback", pinned.name)
        bad.logged("taken out again")
        until(lambda: time.monotonic() > proved)  # else its stack were to blame for its end
        stopped.kill()
        until(lambda: stopped.status()["state"] == "stopped")
        yield place


def start(place: Place, name: str, version: str, *options: str, wait: bool = True) -> Service:
    """A service that runs on a version."""
    service = place.start("--reload-signal=SIGHUP", *options, name=name)
    service.put(version)
    if wait:
        settled(service, version)
    return service


def settled(service: Service, version: str) -> None:
    service.logged("applied in", f"version={version} ")


@pytest.mark.parametrize("columns", [80, 40])
def test_at_a_glance(many: Place, columns: int) -> None:
    seen = look([COMMAND, "status"], columns=columns, environment=many.environment)
    keep(f"status-{columns}", seen, many.path)


def test_at_a_glance_in_colours_that_can_be_read_on_light_and_on_dark(many: Place) -> None:
    seen = look([COMMAND, "status"], columns=80, environment=many.environment)
    keep("status-80-styles", seen, many.path, styled=True)
    assert seen.styles <= {"bold", "red", "green"}
    colourless = look([COMMAND, "status"], columns=80, environment=many.environment, colour=False)
    assert "\x1b" not in colourless.written and seen.styles


@pytest.mark.parametrize("name", ["db", "front", "mail", "proxy", "shop", "news", "wiki", "cache"])
def test_in_depth(many: Place, name: str) -> None:
    seen = look([COMMAND, "status", name], columns=80, environment=many.environment)
    keep(f"status-{name}-80", seen, many.path)


def test_in_depth_on_a_narrow_terminal(many: Place) -> None:
    keep(
        "status-front-40",
        look([COMMAND, "status", "front"], columns=40, environment=many.environment),
        many.path,
    )


def test_a_service_that_is_not_there(many: Place) -> None:
    seen = look([COMMAND, "status", "fornt"], columns=80, environment=many.environment)
    keep("status-unknown", seen, many.path)


@pytest.mark.parametrize("columns", [80, 40])
def test_what_is_built_is_told_with_what_is_otherwise_in_it(columns: int) -> None:
    with place_path() as path:
        etc = path / "web/etc"
        (etc / "ssl/private").mkdir(parents=True)
        (etc / "ssl/private").chmod(0o700)
        for name, mode in (("web.conf", 0o644), ("web.conf~", 0o644), ("ssl/private/web.key", 0o600)):
            (etc / name).write_text("x\n")
            (etc / name).chmod(mode)
        words = [COMMAND, "build", path / "web", "-o", path / "web_1.4.raw"]
        keep(f"build-{columns}", look(words, columns=columns), path)
