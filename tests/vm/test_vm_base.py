# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's own files are never stale, on Debian 13's own kernel.

The clock of the machine counts instructions, 2 ns each, while it works: so what it measures is what a slow
machine would, however long that takes here.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from beds.fresh import LIVE, READER, RENEW, TLS, WRITER
from support import needs
from vm.machine import Machine
from vm.web import UNITS, WEB, web

pytestmark = [needs.vm, pytest.mark.limit(900), needs.tool("mksquashfs"), needs.tool("openssl")]

SLEEP = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
RENEWALS = 4


def test_a_renewed_certificate_is_served_after_the_very_next_reload(machine: Machine, tmp_path: Path) -> None:
    for number in range(RENEWALS + 1):
        make = f"""
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=number{number}
            -keyout key{number} -out cert{number}
        """
        subprocess.run(shlex.split(make), cwd=tmp_path, check=True, capture_output=True)
    archive = LIVE.replace("live", "archive")
    renew = ["python3", "/root/renew.py", LIVE, archive]
    with web(machine) as site:
        site.unit("[X-Confext]\n", "nginx.service", renew=RENEW)
        machine.send(tmp_path, to="/run")
        machine.run([*renew, "0"])
        directory = f"{UNITS}/nginx.service.confext.d/site.raw.v"
        site.drop(site.image(1, {"nginx/conf.d/site.conf": TLS}), directory)
        site.start("nginx.service")
        assert machine.run([*renew, str(RENEWALS)]).stdout == f"{RENEWALS}\n"


def test_a_new_user_can_be_resolved(machine: Machine) -> None:
    """It is looked up before it is there, so that the kernel remembers that it is not."""
    with web(machine) as site:
        site.unit(SLEEP)
        site.drop(site.image(1, {"web.conf": "1"}))
        site.start()
        pid = machine.property(WEB, "MainPID")
        add = f"""
            inside='nsenter --target {pid} --mount --root --'
            for i in 1 2 3; do
                $inside getent passwd somebody$i && exit 3
                useradd somebody$i || exit 4
                $inside getent passwd somebody$i || exit 5
            done
        """
        machine.run(["sh", "-c", add])


def test_readers_in_a_loop(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """On the stack that systemd has mounted, then on one of ours."""
    unit = SLEEP.replace("/bin/sleep infinity", "/usr/bin/python3 /root/reader.py 0.001")
    with web(machine) as site:
        machine.run(["sh", "-c", "echo start >/etc/hot"])
        site.unit(unit, reader=READER, writer=WRITER)
        site.drop(site.image(1, {"web.conf": "1"}))
        journal = site.start()
        for version in (1, 2):
            if version == 2:
                machine.run(["systemctl", "start", WEB])
                site.drop(site.image(2, {"web.conf": "2"}))
                journal.applied(WEB)
            written = json.loads(machine.run(["python3", "/root/writer.py", "30"]).stdout)
            machine.run(["systemctl", "stop", WEB])
            found = json.loads(machine.run(["cat", "/run/reader"]).stdout)
            assert found["errors"] == []
            late = sorted(
                found["last"][way + number] - written[str(int(number) + 1)]
                for number in written
                for way in ("path", "held")
                if way + number in found["last"] and str(int(number) + 1) in written
            )
            assert len(late) > 20
            with capsys.disabled():
                print(
                    f"\nLinux 6.12, version {version}: {found['reads']} reads, 0 errors; older than the change by at"
                    f" most {late[-1] * 1000:.1f} ms, median {late[len(late) // 2] * 1000:.1f} ms"
                )
            assert late[-1] < 0.1, "by the clock that counts instructions"
