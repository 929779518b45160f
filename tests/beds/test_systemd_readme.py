# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README has people type on a systemd host does what it says there, also pasted in one go.

Covers setup/enable.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.site import drop, sees
from support import CHECKOUT, needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def first_lines(unit: str) -> str:
    """How a service comes to take part."""
    text = (CHECKOUT / "README.md").read_text()
    found = re.search(r"^    confext-watcher enable .*\n(?:    \S.*\n)+", text, re.MULTILINE)
    assert found
    return found[0].replace("nginx.service", unit).replace("nginx", unit).replace("web.raw.v", "site.raw.v")


def test_the_first_lines_pasted_together_make_a_service_take_part(host: Host) -> None:
    units = [f"web{number}.service" for number in range(10)]
    text = f"{SLEEP}ExecReload=/bin/true\n[X-Confext]\nSettleSec=0\n"
    host.units(dict.fromkeys(units, text), takes_part=False)
    host.watch()
    host.systemctl("start", *units)
    journal = host.journal()
    for number, unit in enumerate(units):
        host.bed.run(["sh", "-e", "-c", first_lines(unit)])
        drop(host, number, {"web.conf": str(number)}, unit)
        sees(host, str(number), unit)
    assert not [entry["MESSAGE"] for entry in journal.said() if "restart it once" in entry["MESSAGE"]]


def test_enable_says_what_is_to_be_done(host: Host) -> None:
    host.unit("web.service", takes_part=False)
    host.watch()
    host.systemctl("start", "web")

    def enable(*words: str) -> tuple[int, str]:
        done = host.bed.run(["confext-watcher", "enable", *words], check=False)
        return done.returncode, done.stdout + done.stderr

    status, said = enable("web", "site.raw.v")
    place = "/etc/systemd/system/web.service.confext.d/site.raw.v"
    assert status == 0 and f"drop images into {place}/" in said and "systemctl restart web.service" in said
    host.systemctl("restart", "web")
    status, said = enable("web", "site.raw.v")
    assert status == 0 and "Restart it" not in said
    for words, reason in {
        ("nobody-has-this",): "there is no such unit",
        ("web.socket",): "is no service unit",
        ("web", "../up.v"): "no directory of versions",
        ("web", "site.raw"): "no directory of versions",
    }.items():
        status, said = enable(*words)
        assert status == 1 and reason in said
    as_user = ["setpriv", "--reuid=65534", "--clear-groups", "confext-watcher", "enable", "web"]
    assert "only root may" in host.bed.run(as_user, check=False).stderr


# --- the five minutes ---

_BUILDER = CHECKOUT / "contrib/packaging/deb.py"
_DURATION = re.compile(r"\b\d+(?:\.\d+)? (?:us|ms|s)\b")


def five_minutes() -> list[tuple[str, list[str]]]:
    """The commands of that section, each with what README says that it prints: all of a line, or parts around "..."."""
    text = (CHECKOUT / "README.md").read_text()
    part = text[text.index("\n## Five minutes") :]
    part = part[: part.index("\n## ", 1)]
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# "):
                steps.append((line.removeprefix("# "), []))
            else:
                steps[-1][1].append(line)
    return steps


def is_as_written(written: str, printed: str) -> bool:
    parts = [re.escape(_DURATION.sub("DURATION", part.strip())) for part in written.split("...")]
    return re.fullmatch(".*".join(parts), _DURATION.sub("DURATION", printed.strip())) is not None


@pytest.mark.limit(400)
@needs.tool("dpkg-deb")
def test_five_minutes_from_nothing_to_a_deploy_that_is_rolled_back(tmp_path: Path) -> None:
    """Each line, on a Debian 13 that has never seen the program.

    The bed has no network: what the first line installs from Debian is there already, and the package comes by dpkg.
    """
    (install, _), *steps = five_minutes()
    assert install == "apt install nginx curl ./confext-watcher_*_all.deb"
    built = [sys.executable, str(_BUILDER), str(tmp_path), "1.0"]
    package = Path(subprocess.run(built, check=True, capture_output=True, text=True).stdout.strip())
    with Bed("257", project=False) as bed:
        shutil.copyfile(package, bed.path(f"/root/{package.name}"))
        bed.run(["dpkg", "--install", f"/root/{package.name}"])
        for command, written in steps:
            done = bed.run(["sh", "-c", f"cd /root; {command}"], check=False, timeout=120)
            said = done.stdout + done.stderr
            print(f"# {command}\n{said}", end="")
            ends = 1 if any("refused" in line or "taken out" in line for line in written) else 0
            assert done.returncode == ends, f"{command}\n{said}"
            for line in written:
                assert any(is_as_written(line, one) for one in said.splitlines()), f"{line}\n{said}"
