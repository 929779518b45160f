# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image itself says that a service is to be told: EXTENSION_RESTART_UNITS= and its like."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from support import needs
from support.images import image
from watcher.resolve.release import no_units

pytestmark = [needs.bed, needs.tool("mksquashfs")]

A, B, SILENT = "web@a.service", "web@b.service", "silent.service"
RELOADS = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n[X-Confext]\nSettleSec=0\n"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def drop(host: Host, units: list[str], version: int, release: str = "") -> None:
    tree = host.tree(f"site_{version}", {"web.conf": str(version)}, release=f"ID=_any\n{release}")
    made = image(tree, tree.parent / f"site_{version}.raw")
    for unit in units:
        host.drop(made, unit, f"site.raw.v/{made.name}")


def test_an_image_says_which_units_are_restarted_when_it_comes_or_goes(host: Host) -> None:
    units = [A, B, SILENT]
    host.unit("web@.service", RELOADS, takes_part=False)
    host.unit(SILENT, RELOADS.replace("ExecReload=/bin/true\n", ""))
    for unit in (A, B):
        host.confext_dir(unit).mkdir()
    drop(host, units, 1)
    host.watch()
    journal = host.journal()
    host.systemctl("start", *units)
    for _ in units:
        journal.until(lambda entry: re.search(": started well", entry["MESSAGE"]))

    def told(version: int, release: str = "", remove: int = 0) -> dict[str, str]:
        """What each service was told when it got that version."""
        before = {unit: host.main_pid(unit) for unit in units}
        if remove:
            for unit in units:
                (host.confext_dir(unit) / f"site.raw.v/site_{remove}.raw").unlink()
        else:
            drop(host, units, version, release)
        found: dict[str, str] = {}
        while len(found) < len(units):
            entry = journal.until(lambda entry: "CONFEXT_OUTCOME" in entry)
            assert entry["CONFEXT_OUTCOME"] == "applied", entry["MESSAGE"]
            unit = entry["CONFEXT_SERVICE"]
            assert host.see(unit, "/etc/web.conf") == str(version)
            found[unit] = next(
                (word for word in ("reload", "restart") if f"{word} done" in entry["MESSAGE"]), ""
            )
            assert (host.main_pid(unit) != before[unit]) == (found[unit] == "restart")
        return found

    restart = f'EXTENSION_RESTART_UNITS="{A} web@*.service"\n'
    assert told(2) == {A: "reload", B: "reload", SILENT: ""}
    assert told(3, restart) == {A: "restart", B: "reload", SILENT: ""}
    assert any("has web@*.service, which is no unit's name" in entry["MESSAGE"] for entry in journal.said())
    assert told(2, remove=3) == {A: "restart", B: "reload", SILENT: ""}
    either = f'EXTENSION_RELOAD_OR_RESTART_UNITS="{SILENT} {A} {B}"\nEXTENSION_RESTART_UNITS={B}\n'
    assert told(4, either) == {A: "reload", B: "restart", SILENT: "restart"}
    assert told(5) == {A: "reload", B: "restart", SILENT: "restart"}
    assert told(6) == {A: "reload", B: "reload", SILENT: ""}


def test_it_says_so_also_where_the_image_proves_bad(host: Host) -> None:
    """A restart on the bad one, and one back."""
    unit = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n[X-Confext]\nSettleSec=0\n"
    unit += "HealthCheck=/bin/grep -q 1 /etc/web.conf\nHealthCheckSec=1s\nHealthStableSec=0\n"
    journal = site.run(host, unit, {"web.conf": "1"})
    before = host.main_pid(site.WEB)
    drop(host, [site.WEB], 2, f"EXTENSION_RESTART_UNITS={site.WEB}\n")
    entry = journal.outcome(site.WEB, "rolled-back")
    assert entry["CONFEXT_VERDICT"] == "health-check-failed"
    assert host.main_pid(site.WEB) != before
    assert host.see(site.WEB, "/etc/web.conf") == "1"


def test_what_the_unit_says_comes_first(host: Host) -> None:
    unit = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n[X-Confext]\nSettleSec=0\nReload=none\n"
    journal = site.run(host, unit, {"web.conf": "1"})
    before = host.main_pid(site.WEB)
    drop(host, [site.WEB], 2, f"EXTENSION_RESTART_UNITS={site.WEB}\n")
    assert "Reload=none" in journal.applied(site.WEB)["MESSAGE"]
    assert host.main_pid(site.WEB) == before


def test_systemd_itself_takes_the_same_words_for_units(host: Host) -> None:
    """Asked of systemd-confext: it names the words that are no units."""
    if host.bed.version != "262":
        pytest.skip("only from systemd 262 on there are these keys")
    words = [
        "a.service",
        "a@b.service",
        "a@.service",
        "a*.service",
        "a",
        "a/b.service",
        "a@b@c.service",
        ".service",
    ]
    words += ["a.socket", "a.confext", "A:_-.slice", "é.service", "a.service,b.service", "a@\\x2d.mount"]
    tree = host.tree(
        "oracle", {"oracle": "1"}, release=f"ID=_any\nEXTENSION_RESTART_UNITS='{' '.join(words)}'\n"
    )
    run = "/run/confexts/oracle"
    host.stack.callback(host.bed.run, ["sh", "-c", f"systemd-confext unmerge; rm -r {run}"])
    host.bed.path("/run/confexts").mkdir(exist_ok=True)
    host.drop_tree(tree, run)
    said = host.bed.run(["systemd-confext", "refresh"], check=False)
    theirs = set(
        re.findall(r"Invalid unit name '(.*?)' in EXTENSION_RESTART_UNITS=", said.stdout + said.stderr)
    )
    ours = no_units({"EXTENSION_RESTART_UNITS": " ".join(words)})
    assert (
        theirs and {word for word in words if any(f" has {word}, which" in line for line in ours)} == theirs
    )
