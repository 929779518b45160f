# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deploying as people do: rsync and scp through a real sshd from another container, for a real nginx."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from beds.bed import Bed
from beds.host import SECONDS, UNITS, Host, install
from support import needs

pytestmark = needs.bed

# Who deploys is not root: the directory that he drops into is his, the unit names him, and that is all he has.
USER = "deploy"
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
        make = f"""
            echo 'u {USER} - - /home/{USER} /bin/sh' | systemd-sysusers -
            sed -i 's/^{USER}:[^:]*/{USER}:*/' /etc/shadow
            install -d -o {USER} /home/{USER} /home/{USER}/.ssh; cat >/home/{USER}/.ssh/authorized_keys
        """
        target.run(["sh", "-c", make], input=key)
        remove = f"rm -r /home/{USER}; sed -i /^{USER}:/d /etc/passwd /etc/shadow /etc/group /etc/gshadow"
        stack.callback(target.run, ["sh", "-c", remove])
        target.run(["sh", "-c", "ssh-keygen -A; systemctl start ssh"])
        self.host.take_part("nginx.service")
        target.run(["install", "--directory", f"--owner={USER}", f"{DROPS}/site.raw.v"])
        settings = target.path(f"{UNITS}/nginx.service.d/deploy.conf")
        settings.parent.mkdir()
        settings.write_text(f"[X-Confext]\nTrustedUsers={USER}\n")
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
        return self.source.run(self._copy(tool, version))

    def _copy(self, tool: str, version: str, *options: str) -> list[str]:
        copy = {"rsync": ["rsync", "-e", SSH], "scp": ["scp", *SSH.split()[1:]]}[tool]
        target = f"{USER}@{self.address}:{DROPS}/site.raw.v/"
        return [*copy, *options, f"/root/site_{version}.raw", target]

    def begin(self, tool: str, version: str, pattern: str) -> str:
        """Begin to deploy and kill that half-way; `pattern` is what the file is called by then.

        Returns:
            The name of the file that is left.
        """
        slowly = {"rsync": "--bwlimit=1000", "scp": "-l8000"}[tool]
        upload = shlex.join(self._copy(tool, version, slowly))
        client = self.source.popen(
            ["sh", "-c", f"echo $$ >/run/upload; exec {upload}"], stderr=subprocess.PIPE
        )
        half = f"{DROPS}/site.raw.v -name '{pattern}' -size +500k"
        look = f'until name=$(find {half} -printf "%f\\n" | grep .); do sleep 0.02; done; echo "$name"'
        name = self.host.bed.run(["sh", "-c", look], timeout=SECONDS).stdout.strip()
        # Both ends, the other one first: nobody is left to tidy up.
        its = f"for pid in $(pgrep -u {USER}); do ls -l /proc/$pid/fd | grep -qF '/{name}' && kill -KILL $pid; done; :"
        self.host.bed.run(["sh", "-c", its])
        self.source.run(["sh", "-c", "kill -KILL $(cat /run/upload)"], check=False)
        client.communicate(timeout=SECONDS)
        return name

    def resume(self, version: str) -> None:
        self.source.run(self._copy("rsync", version, "--append"))

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

    # Twenty in a row: each is taken, or the next one came before it was its turn.
    seen = len(journal.said())
    for number in range(10, 30):
        fleet.image(str(number))
        fleet.deploy("rsync", str(number))
    journal.until(
        lambda entry: entry.get("CONFEXT_VERSION") == "29" and entry["CONFEXT_OUTCOME"] == "applied"
    )
    fleet.answers("29")
    outcomes = [entry for entry in journal.seen[seen:] if "CONFEXT_OUTCOME" in entry]
    assert {entry["CONFEXT_OUTCOME"] for entry in outcomes} == {"applied"}
    assert all(entry["CONFEXT_IMAGE"] == "site" for entry in outcomes)
    versions = [int(entry["CONFEXT_VERSION"]) for entry in outcomes]
    assert versions == sorted(set(versions)) and len(versions) > 10, versions


@pytest.mark.limit(400)
def test_an_upload_that_was_killed_is_not_seen_and_taken_once_it_is_resumed(fleet: Fleet) -> None:
    journal = fleet.host.journal()
    fleet.image("1")
    fleet.deploy("rsync", "1")
    journal.until(lambda entry: "site 1 added" in entry["MESSAGE"] and "applied in" in entry["MESSAGE"])
    fleet.image("2", size=1_500_000)
    left = fleet.begin("rsync", "2", ".site_2.raw.*")
    assert (fleet.host.confext_dir("nginx.service") / "site.raw.v" / left).exists()
    fleet.host.systemctl("restart", "nginx")
    fleet.answers("1")
    fleet.deploy("rsync", "2")
    journal.applied("nginx.service")  # and of what was left nothing was said
    fleet.answers("2")

    fleet.image("3", size=1_500_000)
    assert fleet.begin("scp", "3", "site_3.raw") == "site_3.raw"
    assert "site_3.raw" in journal.outcome("nginx.service", "incomplete")["MESSAGE"]
    fleet.host.systemctl("restart", "nginx")
    fleet.answers("2")
    fleet.resume("3")
    journal.applied("nginx.service")
    fleet.answers("3")
