# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's own files are never stale: what it replaces in its `/etc`, a service on a stack sees.

These tests are also those of rounds/fresh.py.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterator

import pytest

from beds.bed import Bed
from beds.fresh import LIVE, READER, RENEW, TLS, WRITER
from beds.host import UNITS, Host
from beds.site import WEB, drop, host, run, sees
from support import needs

pytestmark = needs.bed

SLEEP = "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"


@contextlib.contextmanager
def nginx(bed: Bed, settings: str = "") -> Iterator[Host]:
    """nginx with TLS, whose site is in an image and whose certificate is the host's."""
    with host(bed) as machine:
        machine.stack.callback(bed.run, ["rm", "-rf", "/etc/letsencrypt"])
        renew(machine, 0)
        machine.take_part("nginx.service")
        if settings:
            drop_in = bed.path(f"{UNITS}/nginx.service.d/confext.conf")
            drop_in.parent.mkdir()
            drop_in.write_text(f"[X-Confext]\n{settings}\n")
        drop(machine, 1, {"nginx/conf.d/site.conf": TLS}, "nginx.service")
        machine.watch()
        journal = machine.journal()
        machine.systemctl("restart", "nginx")
        journal.until(lambda entry: "nginx.service: started well" in entry["MESSAGE"])
        yield machine


def renew(machine: Host, times: int) -> str:
    archive = LIVE.replace("live", "archive")
    words = ["python3", "-c", RENEW, LIVE, archive, str(times)]
    return machine.bed.run(words, timeout=300).stdout.strip()


@pytest.mark.limit(400)
def test_a_renewed_certificate_is_served_after_the_very_next_reload(bed: Bed) -> None:
    with nginx(bed) as machine:
        history = machine.bed.run(["confext-watcher", "history", "nginx.service"]).stdout
        assert renew(machine, 60) == "60"
        assert machine.bed.run(["confext-watcher", "history", "nginx.service"]).stdout == history
        mounted = [row for row in machine.mounts("nginx.service") if row[4] == "/etc"]
        assert len(mounted) == 1


def test_without_that_the_old_one_is_served(bed257: Bed) -> None:
    """So this is what the test above shows."""
    with nginx(bed257, "BaseChanged=ignore") as machine:
        assert renew(machine, 2) == "0"


def test_a_new_user_can_be_resolved(bed: Bed) -> None:
    with host(bed) as machine:
        run(machine, SLEEP, {"web.conf": "1"})
        inside = ["nsenter", "--target", str(machine.started(WEB)), "--mount", "--root", "--"]
        for number in range(10):
            name = f"somebody{number}"
            assert bed.run([*inside, "getent", "passwd", name], check=False).returncode == 2
            add = f"useradd {name} || echo 'u {name} -' | systemd-sysusers -"
            bed.run(["sh", "-c", add], check=False)
            until = (
                f"i=0; until getent passwd {name}; do i=$((i+1)); [ $i -lt 50 ] || exit 1; sleep 0.1; done"
            )
            assert bed.run([*inside, "sh", "-c", until], check=False).returncode == 0
            assert bed.run([*inside, "id", name]).returncode == 0


@pytest.mark.limit(200)
def test_readers_in_a_loop(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    """On the stack that systemd has mounted, then on one of ours."""
    unit = f"""
        [Service]
        ExecStart=/usr/bin/python3 -c {json.dumps(READER).replace("%", "%%").replace("$", "$$")}
        ExecReload=/bin/true
        InaccessiblePaths=/etc/hidden
    """
    with host(bed) as machine:
        machine.stack.callback(bed.run, ["sh", "-c", "rm -f /etc/hot /etc/hidden /run/reader"])
        bed.path("/etc/hot").write_text("start")
        bed.path("/etc/hidden").write_text("hidden")
        run(machine, textwrap.dedent(unit), {"web.conf": "1"})
        for version in (1, 2):
            if version == 2:
                machine.systemctl("start", WEB)
                journal = machine.journal()
                drop(machine, 2, {"web.conf": "2"})
                journal.applied(WEB)
            written = json.loads(bed.run(["python3", "-c", WRITER, "200"]).stdout)
            sees(machine, "199", path="/etc/hot")
            machine.systemctl("stop", WEB)
            found = json.loads(bed.path("/run/reader").read_text())
            assert not found["errors"]
            late = [
                found["last"][way + number] - written[str(int(number) + 1)]
                for number in written
                for way in ("path", "held")
                if way + number in found["last"] and str(int(number) + 1) in written
            ]
            assert len(late) > 100
            with capsys.disabled():
                late.sort()
                print(
                    f"\nsystemd {bed.version}, version {version}: {found['reads']} reads, 0 errors; older than the"
                    f" change by at most {max(late) * 1000:.1f} ms, median {late[len(late) // 2] * 1000:.1f} ms"
                )
            assert max(late) < 5


def test_a_service_can_ask_to_be_told(bed257: Bed) -> None:
    with nginx(bed257, "BaseChanged=reload") as machine:
        journal = machine.journal()
        bed257.path("/etc/.other").write_text("1")
        bed257.path("/etc/.other").rename(bed257.path("/etc/other"))
        machine.stack.callback(bed257.path("/etc/other").unlink)
        entry = journal.applied("nginx.service")
        assert "the host's /etc has changed, same stack, reload done in" in entry["MESSAGE"]


def test_a_file_that_is_held_open_is_fresh_for_those_who_open_it(bed: Bed) -> None:
    """The stack is mounted anew, without a reload and without a word."""
    with host(bed) as machine:
        bed.path("/etc/hot").write_text("old")
        machine.stack.callback(bed.run, ["rm", "/etc/hot"])
        text = (
            "[Service]\nExecStart=/bin/sh -c 'exec 3</etc/hot; exec sleep infinity'\nExecReload=/bin/false\n"
        )
        run(machine, text + "InaccessiblePaths=/etc/shadow\n", {"web.conf": "1"})
        history = bed.run(["confext-watcher", "history", WEB]).stdout
        for content in ("new", "newer"):
            assert machine.see(WEB, "/etc/hot") == ("old" if content == "new" else "new")
            bed.path("/etc/.hot").write_text(content)
            bed.path("/etc/.hot").rename(bed.path("/etc/hot"))
            sees(machine, content, path="/etc/hot")
        assert machine.see(WEB, "/etc/web.conf") == "1"
        assert machine.see(WEB, "/etc/shadow") == ""
        assert bed.run(["confext-watcher", "history", WEB]).stdout == history
        rows = [row for row in machine.mounts(WEB) if row[4] == "/etc"]
        assert len(rows) == 2, "systemd's stays below ours, since the sandbox has mounts on it"


def test_a_service_with_a_root_of_its_own(bed: Bed) -> None:
    with host(bed) as machine:
        root = "/srv/own"
        make = f"""
            mkdir -p {root}/etc {root}/usr {root}/proc {root}/dev {root}/run; cp /etc/os-release {root}/etc
            for i in bin lib lib64 sbin; do ln -s usr/$i {root}/$i; done
        """
        bed.run(["sh", "-c", make])
        machine.stack.callback(bed.run, ["rm", "-rf", root])
        bed.path(f"{root}/etc/hot").write_text("old")
        text = f"[Service]\nRootDirectory={root}\nBindReadOnlyPaths=/usr\nExecStart=/bin/sleep infinity\n"
        run(machine, text, {"web.conf": "1"})
        assert machine.see(WEB, "/etc/hot") == "old"
        bed.path(f"{root}/etc/.hot").write_text("new")
        bed.path(f"{root}/etc/.hot").rename(bed.path(f"{root}/etc/hot"))
        sees(machine, "new", path="/etc/hot")
