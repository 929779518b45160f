# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deploying as people do: rsync and scp through a real sshd from another container, for a real nginx."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

import needs
from beds.bed import Bed
from beds.host import SECONDS, UNITS, Host, install

pytestmark = needs.bed

SSH = "ssh -o StrictHostKeyChecking=no -o BatchMode=yes -o LogLevel=ERROR -i /root/.ssh/id_ed25519"
SITE = "server { listen 127.0.0.1:8080; location / { return 200 '%s'; } }\n"
DROPS = f"{UNITS}/nginx.service.confext.d"


class Fleet:
    """A host with nginx that takes part and an sshd, and another host from which is deployed."""

    def __init__(self, target: Bed, source: Bed, stack: contextlib.ExitStack) -> None:
        self.host = Host(target, stack)
        self.source = source
        _, self.address = source.connect(target)
        source.run(
            [
                "sh",
                "-c",
                "mkdir -p -m 700 /root/.ssh; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519",
            ]
        )
        key = source.path("/root/.ssh/id_ed25519.pub").read_text()
        target.run(["sh", "-c", "mkdir -p -m 700 /root/.ssh; cat >/root/.ssh/authorized_keys"], input=key)
        target.run(["sh", "-c", "ssh-keygen -A; systemctl start ssh"])
        self.host.take_part("nginx.service")
        self.host.confext_dir("nginx.service").joinpath("site.raw.v").mkdir()
        self.host.watch()
        self.host.systemctl("restart", "nginx")

    def image(self, version: str, size: int = 0) -> None:
        """A new version in /root of the deploying host."""
        files = {"nginx/conf.d/site.conf": SITE % version}
        if size:
            files["noise"] = os.urandom(size).hex()
        built = self.host.image(f"site_{version}", files)
        shutil.copyfile(built, self.source.path(f"/root/{built.name}"))

    def deploy(self, tool: str, version: str) -> subprocess.CompletedProcess[str]:
        target = f"root@{self.address}:{DROPS}/site.raw.v/"
        copy = {"rsync": ["rsync", "--partial", "-e", SSH], "scp": ["scp", *SSH.split()[1:]]}[tool]
        return self.source.run([*copy, f"/root/site_{version}.raw", target])

    def answers(self, version: str) -> None:
        """nginx answers with this version: now, or, as its reload only tells it to begin, once that is through."""
        look = f'until [ "$(curl --silent http://127.0.0.1:8080/)" = {version} ]; do sleep 0.02; done'
        self.host.bed.run(["sh", "-c", look], timeout=SECONDS)


@pytest.fixture
def fleet(bed: Bed, new_bed: Callable[[str], Bed]) -> Iterator[Fleet]:
    install(bed)
    with contextlib.ExitStack() as stack:
        yield Fleet(bed, new_bed(bed.version), stack)


@pytest.mark.limit(400)
def test_rsync_and_scp_through_sshd(fleet: Fleet) -> None:
    journal = fleet.host.journal()
    for version, tool in (("1", "rsync"), ("2", "scp"), ("3", "rsync")):
        fleet.image(version)
        fleet.deploy(tool, version)
        journal.applied("nginx.service")
        fleet.answers(version)

    # The same bytes again change nothing, and nginx is not told.
    workers = fleet.host.bed.run(["pgrep", "-P", str(fleet.host.main_pid("nginx.service"))]).stdout
    fleet.deploy("scp", "3")
    fleet.image("4")
    fleet.deploy("rsync", "4")
    assert journal.applied("nginx.service")["CONFEXT_VERSION"] == "4"
    assert fleet.host.bed.run(["pgrep", "-P", str(fleet.host.main_pid("nginx.service"))]).stdout != workers

    # Twenty in a row.
    for number in range(10, 30):
        fleet.image(str(number))
        fleet.deploy("rsync", str(number))
    journal.until(
        lambda entry: entry.get("CONFEXT_VERSION") == "29" and entry["CONFEXT_OUTCOME"] == "applied"
    )
    fleet.answers("29")


@pytest.mark.limit(400)
def test_an_upload_that_was_cut_off_is_not_seen_and_taken_once_it_is_resumed(fleet: Fleet) -> None:
    journal = fleet.host.journal()
    fleet.image("1")
    fleet.deploy("rsync", "1")
    journal.applied("nginx.service")
    fleet.image("2", size=3_000_000)
    whole = fleet.source.path("/root/site_2.raw").stat().st_size
    # As scp leaves it when its connection goes.
    cut = f"head -c {whole // 2} /root/site_2.raw | {SSH} root@{fleet.address} 'cat >{DROPS}/site.raw.v/site_2.raw'"
    fleet.source.run(["sh", "-c", cut])
    journal.outcome("nginx.service", "incomplete")
    fleet.host.systemctl("restart", "nginx")
    fleet.answers("1")
    append = ["rsync", "--append", "-e", SSH, "/root/site_2.raw", f"root@{fleet.address}:{DROPS}/site.raw.v/"]
    fleet.source.run(append)
    journal.applied("nginx.service")
    fleet.answers("2")
