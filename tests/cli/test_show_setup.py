# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `init`, `remove` and `doctor` print, before and after: tests/screens/.

Of plans and findings made here, so that it is the same on each host. With real services:
tests/beds/test_systemd_init.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from support import CHECKOUT
from support.screens import Look, keep
from watcher.cli import doctor, show, show_init, show_remove, terminal
from watcher.doctor.findings import error, ok, warning
from watcher.managers.systemd.unit_files import Unit
from watcher.model import Event, Outcome
from watcher.setup import drop_in, first_version, init, recipes, remove
from watcher.setup.drop_in import Written
from watcher.setup.enable import Enabled
from watcher.setup.first_version import Taken
from watcher.setup.remove import Removed

NGINX = "nginx.service"
UNITS = "/etc/systemd/system"
TOP = f"{UNITS}/{NGINX}.confext.d"
RECIPE = replace(
    recipes.load(str(CHECKOUT / "contrib/recipes/nginx.conf")),
    path="/usr/lib/confext-watcher/recipes/nginx.conf",
)
INIT = init.Plan(
    unit=Unit(NGINX, f"/usr/lib/systemd/system/{NGINX}", (), (NGINX,)),
    recipe=RECIPE,
    top=TOP,
    directory=f"{TOP}/nginx.raw.v",
    others=(),
    versions=(),
    makes=True,
    image=f"{TOP}/nginx.raw.v/nginx_0.raw",
    sources=RECIPE.sources,
    taken=Taken(
        files=["/etc/nginx/nginx.conf", "/etc/nginx/mime.types", "/etc/nginx/secret.conf"],
        size=5321,
        private=[("/etc/nginx/secret.conf", 0o640)],
        excluded=["/etc/nginx/site.key"],
    ),
    drop_in=f"{UNITS}/{NGINX}.d/confext.conf",
    there=None,
    content=drop_in.text(NGINX, "nginx.raw.v", RECIPE),
    checked=False,
)
REMOVE = remove.Plan(
    unit=NGINX,
    top=TOP,
    entries=("nginx.raw.v",),
    stays=("site.raw.v",),
    drop_in=f"{UNITS}/{NGINX}.d/confext.conf",
    there=Written("", "nginx.raw.v", changed=True),
    place="/var/lib/confext-watcher/removed",
    known=True,
)


def kept(monkeypatch: pytest.MonkeyPatch, name: str, columns: int, lines: Iterable[str]) -> None:
    """On a terminal that is so wide."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "columns", lambda: columns)
    written = "".join(f"{line}\r\n" for line in show.fit(lines))
    keep(f"{name}-{columns}", Look(written, columns, 0))


@pytest.mark.parametrize("columns", [80, 40])
def test_init(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(show_init, "_missing_programs", lambda plan: [])
    monkeypatch.setattr(first_version, "of_packages", lambda files: {"nginx"})
    kept(monkeypatch, "init-dry-run", columns, show_init.planned(INIT))
    done = Enabled(NGINX, INIT.directory, needs_restart=True, watched=False)
    kept(monkeypatch, "init-done", columns, show_init.told(INIT, done, None))


@pytest.mark.parametrize("columns", [80, 40])
def test_remove(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    kept(monkeypatch, "remove-dry-run", columns, show_remove.planned(REMOVE))
    done = Removed(NGINX, f"{REMOVE.place}/{NGINX}_1", "stack", watched=False, last=None, ends=True)
    kept(monkeypatch, "remove-done", columns, show_remove.done(done))


@pytest.mark.parametrize("columns", [80, 40])
def test_doctor(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    found = (
        ok("kernel", "Linux 6.12.48+deb13-amd64"),
        error(
            "daemon",
            "does not run: nothing that is dropped is used",
            "systemctl enable --now confext-watcher",
        ),
        warning(
            "inotify",
            "8192 watches: changes may be seen late where there are many directories",
            "sysctl fs.inotify.max_user_watches=524288",
        ),
        warning(
            NGINX,
            "nginx_1.4.raw is kept out: check '/usr/sbin/nginx -t' failed with exit status 1",
            f"confext-watcher rollback --forget {NGINX}",
        ),
    )
    kept(monkeypatch, "doctor", columns, doctor._lines(found))


def test_a_command_that_is_to_be_copied_is_never_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "columns", lambda: 40)
    done = Enabled(NGINX, INIT.directory, needs_restart=True, watched=False)
    lines = [*show.fit(show_init.told(INIT, done, None))]
    assert f"  cp nginx_1.raw {INIT.directory}/" in lines
    assert f"  confext-watcher wait --timeout 60 {NGINX} nginx_1.raw" in lines


def test_who_does_not_take_the_hosts_etc_is_not_to_be_restarted_on_it_as_it_is() -> None:
    last = Event(NGINX, Outcome.FAILED, f"{NGINX}: reload failed", 1)
    first, advice, command = show_remove.done(Removed(NGINX, "", "stack", watched=True, last=last, ends=True))
    assert first == last.message and "Mend the host's own /etc first" in advice
    assert command == f"  systemctl restart {NGINX}"
