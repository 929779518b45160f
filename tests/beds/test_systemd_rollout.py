# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Rollout=rolling` on real systemd: the instances of a template get new content one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import drop, kept
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

# Each reload writes down its beginning and its end.
TEMPLATE = """[Service]
ExecStart=/bin/sleep infinity
ExecReload=/bin/sh -c 'echo "+ %i" >>/run/told; sleep 0.2; echo "- %i" >>/run/told; ! grep -q bad /etc/web.conf'
[X-Confext]
Rollout=rolling
RolloutParallel=2
SettleSec=0
"""
INSTANCES = [f"many@{name}.service" for name in "abcd"]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def at_once(told: list[str]) -> list[int]:
    """How many reloads were going on after each line."""
    counts, count = [], 0
    for line in told:
        count += 1 if line.startswith("+") else -1
        counts.append(count)
    return counts


def test_the_instances_of_a_template_follow_the_first_but_not_into_what_is_bad(host: Host) -> None:
    told = host.bed.path("/run/told")
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/told"])
    host.unit("many@.service", TEMPLATE)
    drop(host, 1, {"web.conf": "one"}, "many@.service")
    host.watch()
    journal = host.journal()
    host.systemctl("start", *INSTANCES)
    for _ in INSTANCES:
        journal.until(lambda entry: "started well" in entry["MESSAGE"])
    assert not told.exists()  # they were started on what their template had: nobody needed to be told of it
    slots = [kept(host, name) for name in INSTANCES]

    drop(host, 2, {"web.conf": "bad"}, "many@.service")
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    drop(host, 3, {"web.conf": "three"}, "many@.service")
    followed: list[str] = []
    while len(followed) < len(INSTANCES):
        applied = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "applied")
        assert "site 1 -> 3" in applied["MESSAGE"]
        if applied["CONFEXT_SERVICE"] != "many@.service":
            followed.append(applied["CONFEXT_SERVICE"])
    assert sorted(followed) == INSTANCES
    lines = told.read_text().splitlines()
    first = entry["CONFEXT_SERVICE"].partition("@")[2].removesuffix(".service")
    # The first alone with the bad one, there and back.
    assert lines[:4] == [f"+ {first}", f"- {first}"] * 2
    # One alone with the good one, then no more than two at a time.
    good = lines[4:]
    assert len(good) == 2 * len(INSTANCES) and good[0][2:] == good[1][2:]
    assert max(at_once(good)) <= 2, good
    assert [host.see(name, "/etc/web.conf") for name in INSTANCES] == ["three"] * 4
    assert not set(slots) & {kept(host, name) for name in INSTANCES}
