# SPDX-License-Identifier: LGPL-2.1-or-later
"""`origin` and `diff` of units: what they say is what the kernel shows, whoever has mounted it; without a daemon."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, drop, run, sees
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
SANDBOX = "ProtectSystem=full\nTemporaryFileSystem=/etc/app\nInaccessiblePaths=/etc/hostname\n"
FILES = {"web.conf": "one\n", "app/a.conf": "a\n", "new.d/b": "b\n", "issue": "ours\n"}
# Names, types, modes and contents of all that can be seen.
LOOK = "cd /etc && find . -type f -exec sha256sum {} + | sort -k2; find . ! -type f -printf '%y %m %p %l\\n' | sort"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        # systemd makes it on the host for SANDBOX.
        made.stack.callback(bed.run, ["rm", "-rf", "/etc/app"])
        yield made


def look(host: Host, *prefix: str) -> dict[str, str]:
    """What is in `/etc`, by path."""
    lines = host.bed.run([*prefix, "sh", "-c", LOOK]).stdout.splitlines()
    return {f"/etc/{name}": line for line in lines if (name := line.partition("./")[2].split(" ")[0])}


def command(host: Host, *words: str, status: int = 0) -> dict[str, Any]:
    done = host.bed.run(["confext-watcher", words[0], "--json", WEB, *words[1:]], check=False)
    assert done.returncode == status, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(host: Host, version: str, *, sandboxed: bool = False) -> dict[str, Any]:
    """What `origin` says is what differs between the service and the host."""
    pid = str(host.started(WEB))
    service, own = look(host, "nsenter", "--target", pid, "--mount"), look(host)
    found = command(host, "origin")
    assert [layer["version"] for layer in found["layers"]] == [version]
    differ = {path for path in service.keys() | own.keys() if service.get(path) != own.get(path)}
    hidden = {path for path in differ if sandboxed and re.match("/etc/(app|hostname)", path)}
    assert {file["path"] for file in found["files"] if not file["mount"]} == differ - hidden
    return found


@pytest.mark.parametrize("sandbox", ["", SANDBOX], ids=["plain", "sandboxed"])
def test_what_is_said_is_what_is_seen_after_a_swap_and_after_a_start(host: Host, sandbox: str) -> None:
    journal = run(host, UNIT + sandbox, FILES)
    check(host, "1", sandboxed=bool(sandbox))  # systemd has mounted it
    drop(host, 2, FILES | {"web.conf": "two\n", "more": "m\n"})
    journal.applied(WEB)
    sees(host, "two")
    found = check(host, "2", sandboxed=bool(sandbox))
    covered = {file["path"]: file["mount"] for file in found["files"] if file["path"].startswith("/etc/app/")}
    assert covered == {"/etc/app/a.conf": "tmpfs on /etc/app" if sandbox else ""}
    changed = {file["path"]: file for file in command(host, "diff", "--from", "1", status=1)["files"]}
    assert {"/etc/web.conf", "/etc/more"} == set(changed)
    assert changed["/etc/web.conf"]["diff"] == "@@ -1 +1 @@\n-one\n+two\n"
    host.systemctl("restart", WEB)
    check(host, "2", sandboxed=bool(sandbox))


def test_the_mount_counts_where_systemd_does_not_say_which_stack_it_is(host: Host) -> None:
    """The service was started on version 1; what was accepted since has not been swapped in."""
    journal = run(host, UNIT, FILES)
    drop(host, 2, {"web.conf": "two\n"})
    journal.applied(WEB)
    host.no_watcher()
    first = f"cd {site.STATE}/units; cp -P {WEB} ../kept; ln -sf ../stacks/{WEB}/*1-* new; mv -T new {WEB}"
    host.bed.run(["sh", "-ec", first])
    host.systemctl("restart", WEB)
    host.bed.run(["sh", "-ec", f"cd {site.STATE}; mv -T kept units/{WEB}"])
    sees(host, "one")
    check(host, "1")
    found = command(host, "diff", status=1)
    assert (found["before"]["what"], found["after"]["what"]) == ("shown", "accepted")
    assert {file["path"] for file in found["files"]} == {
        f"/etc/{name}" for name in ("web.conf", "app", "app/a.conf", "new.d", "new.d/b", "issue")
    }


def test_of_a_stopped_unit_it_is_what_its_next_start_gets(host: Host) -> None:
    run(host, UNIT, FILES)
    host.systemctl("stop", WEB)
    host.no_watcher()
    found = command(host, "origin")
    assert (found["state"], found["layers"][0]["version"]) == ("stopped", "1")
    assert command(host, "diff")["files"] == []
    (step,) = command(host, "origin", "/etc/issue")["paths"]
    assert step["chain"][0]["role"] == "shown"


def test_a_member_of_the_group_has_the_daemon_look_within_its_sandbox(host: Host) -> None:
    journal = run(host, UNIT + SANDBOX, FILES)
    drop(host, 2, FILES | {"web.conf": "two\n"})
    journal.applied(WEB)
    there = host.bed.run(["cat", "/etc/group"]).stdout
    host.stack.callback(host.bed.run, ["cp", "/dev/stdin", "/etc/group"], input=there)
    others = "".join(line for line in there.splitlines(True) if not line.startswith("confext-watcher:"))
    host.bed.run(["cp", "/dev/stdin", "/etc/group"], input=f"{others}confext-watcher:x:4711:\n")
    host.systemctl("reload", "confext-watcher")
    as_member = ("setpriv", "--reuid=4700", "--regid=4700", "--groups=4711", "confext-watcher")
    for words in (["origin", WEB], ["origin", WEB, "hostname", "app/a.conf"], ["diff", WEB, "--from", "1"]):
        mine = host.bed.run([*as_member, *words], check=False)
        roots = host.bed.run(["confext-watcher", *words], check=False)
        assert (mine.stderr, mine.returncode) == ("", roots.returncode)
        assert mine.stdout == roots.stdout
    assert "+two" in mine.stdout
    secret = host.bed.run([*as_member, "diff", "--json", WEB, "--from", "none"], check=False)
    assert "could not read" not in secret.stdout
