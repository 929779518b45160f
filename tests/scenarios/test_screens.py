# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person sees of services in all states, in a real terminal: tests/screens/."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from scenarios.place import PYTHON, Place, Service, image, until
from support.fork_server import COMMAND
from support.needs import root, tool
from support.screens import Look, keep, look, place_path
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
        start(place, "api.service", "1.4")
        # By its name it does not count.
        place.bring(place.confext("1.5"), place.versions("api.service") / "w\u00fcb_1.5.raw")
        bad = place.start("--reload-command=grep -qv bad /etc/web.conf", name="shop.service")
        bad.put("1.3")
        settled(bad, "1.3")
        bad.put("1.4", value="bad")
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


# Few tests, since each process that runs some of them starts all these services.


def keep_look(many: Place, name: str, *words: str, columns: int = 80, utf8: bool = True) -> Look:
    seen = look([COMMAND, *words], columns=columns, environment=many.environment, utf8=utf8)
    keep(name, seen, many.path)
    return seen


def test_at_a_glance_in_colours_that_can_be_read_on_light_and_on_dark(many: Place) -> None:
    for columns in (80, 40):
        seen = keep_look(many, f"status-{columns}", "status", columns=columns)
        assert seen.styles <= {"bold", "red", "green"}
    seen = look([COMMAND, "status"], columns=80, environment=many.environment)
    keep("status-80-styles", seen, many.path, styled=True)
    colourless = look([COMMAND, "status"], columns=80, environment=many.environment, colour=False)
    assert "\x1b" not in colourless.written and seen.styles
    keep_look(many, "status-unknown", "status", "fornt")


def test_in_depth(many: Place) -> None:
    for name in ("db", "front", "mail", "proxy", "shop", "news", "wiki", "cache", "api"):
        keep_look(many, f"status-{name}-80", "status", name)
    keep_look(many, "status-front-40", "status", "front", columns=40)
    assert keep_look(many, "status-api-80-ascii", "status", "api", utf8=False).written.isascii()


@pytest.mark.parametrize("columns", [80, 40])
def test_what_a_look_now_would_change(many: Place, columns: int) -> None:
    keep_look(many, f"plan-{columns}", "plan", "--check", "--stat", columns=columns)


WAITS = {
    "incomplete": ("mail.service", "web_1.4.raw"),
    "not-there": ("mail.service", "wbe_1.3.raw"),
    "refused": ("db.service", "web_1.4.raw"),
    "kept-out": ("front.service", "web_1.4.raw"),
    "applied": ("api.service", "web_1.4.raw"),
}


def test_wait_with_the_daemon_and_without(many: Place) -> None:
    for kind, words in WAITS.items():
        limit = "--timeout=1" if kind == "incomplete" else "--timeout=60"
        seen = keep_look(many, f"wait-{kind}-80", "wait", limit, *words)
        assert "has not answered" not in seen.text
    assert many.daemon is not None
    many.daemon.stop()
    keep_look(many, "status-80-without-daemon", "status")
    keep_look(many, "status-front-80-without-daemon", "status", "front")
    missing = str(many.versions("mail.service") / "wbe_1.3.raw")
    waits = WAITS | {"not-there": ("mail.service", missing)}
    for kind in ("incomplete", "kept-out", "not-there"):
        name = f"wait-{kind}-80-without-daemon"
        assert keep_look(many, name, "wait", "--timeout=0.2", *waits[kind]).status == 3
    many.start_daemon()


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
