# SPDX-License-Identifier: LGPL-2.1-or-later
"""`build` with the tools of each Debian: the same squashfs bytes, and disk images that systemd and the watcher take."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host
from beds.site import WEB, run, sees
from support import needs
from support.images import digest
from watcher.images import build

pytestmark = [needs.bed, needs.tool("mksquashfs")]

SCRATCH = "/var/tmp/build"
UNIT = (
    "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n[X-Confext]\nImagePolicy={}\n"
)
TREE = f"""
rm -rf {SCRATCH}; mkdir -p {SCRATCH}/site/etc/d; cd {SCRATCH}; chmod 777 .
echo two >site/etc/web.conf
for i in $(seq 200); do seq $i 400 >site/etc/d/f$i; done
ln -s d/f1 site/etc/link; printf '#!/bin/sh\\n' >site/etc/run; chmod 755 site/etc/run; truncate -s 100000 site/etc/zero
"""
KEY = "openssl req -new -x509 -newkey {} -nodes -keyout {} -out {} -subj /CN=test -days 9"
SIGNED = ("--sign", "key", "--certificate", "crt")
AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/ XDG_CONFIG_HOME=/ XDG_STATE_HOME=/"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        made.stack.callback(bed.run, ["rm", "-rf", SCRATCH, "/etc/verity.d"])
        sh(made, TREE)
        sh(made, f"cd {SCRATCH}; {KEY.format('rsa:2048', 'key', 'crt')}; chmod 644 key")
        yield made


def sh(host: Host, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return host.bed.run(["sh", "-ec", script], check=check)


def built(host: Host, name: str, *options: str, prefix: str = "") -> Path:
    said = sh(host, f"cd {SCRATCH}; {prefix} confext-watcher build site -o {name} {' '.join(options)}").stdout
    assert said.startswith(f"{name}: good: site ")
    return host.bed.path(f"{SCRATCH}/{name}")


def test_every_version_of_mksquashfs_makes_the_same_bytes(host: Host, tmp_path: Path) -> None:
    """Of this Debian, and of this machine: 4.5.1, 4.6.1 and 4.7.5 have been compared so."""
    order = build.Order((str(host.bed.path(f"{SCRATCH}/site")),), str(tmp_path / "site_2.raw"))
    here = build.build(order, 1 << 30)
    assert digest(Path(here.path)) == digest(built(host, "site_2.raw"))


@pytest.mark.parametrize("format", ["squashfs", "erofs", "ddi"])
def test_the_same_tool_makes_the_same_bytes_for_every_user(host: Host, format: str) -> None:
    options = ("--format", format, *(SIGNED if format == "ddi" else ()))
    one = built(host, "site_2.raw", *options)
    sh(host, f"cd {SCRATCH}; touch site/etc/d/*; mkdir other; mv site_2.raw other/")
    other = host.bed.path(f"{SCRATCH}/other/site_2.raw")
    assert digest(built(host, "site_2.raw", *options, prefix=AS_NOBODY)) == digest(other)
    assert one == host.bed.path(f"{SCRATCH}/site_2.raw")


def test_a_signed_one_is_what_a_policy_asks_for_and_systemd_takes_it(host: Host) -> None:
    journal = run(host, UNIT.format("any"), {"web.conf": "one"})
    sh(host, f"cd {SCRATCH}; install -D -m 644 crt /etc/verity.d/test.crt")
    host.bed.path(f"{UNITS}/{WEB}").write_text(UNIT.format("signed"))
    host.systemctl("daemon-reload")
    drops = f"{UNITS}/{WEB}.confext.d/site.raw.v/"
    sh(host, f"cd {SCRATCH}; confext-watcher build site -o {drops} --version 2 {' '.join(SIGNED)}")
    applied = journal.applied(WEB)
    assert (applied["CONFEXT_TRUST"], applied["CONFEXT_SIGNER"]) == ("signed", "CN=test")
    sees(host, "two")
    host.systemctl("restart", WEB)
    sees(host, "two")
    assert "signed by CN=test" in host.bed.run(["confext-watcher", "status", "web"]).stdout


def test_one_without_a_signature_has_verity_data(host: Host) -> None:
    built(host, "site_2.raw", "--format", "ddi")
    said = host.bed.run(["confext-watcher", "check", "--json", f"{SCRATCH}/site_2.raw"]).stdout
    (found,) = json.loads(said)["images"]
    assert found["trust"]["protection"] == "verity" and found["admitted"]


def test_systemd_finds_in_it_what_was_meant(host: Host) -> None:
    built(host, "site_2.raw", *SIGNED)
    said = host.bed.run(
        ["systemd-dissect", "--json=short", "--validate", f"{SCRATCH}/site_2.raw"], check=False
    )
    assert said.returncode == 0, said.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sign", "other", "--certificate", "crt"), "systemd-repart failed with exit status 1: "),
        (("--sign", "crt", "--certificate", "key"), "systemd-repart failed with exit status 1: "),
    ],
)
def test_a_key_that_does_not_fit_is_one_line(host: Host, options: tuple[str, ...], said: str) -> None:
    sh(host, f"cd {SCRATCH}; {KEY.format('rsa:2048', 'other', 'other.crt')}")
    words = f"cd {SCRATCH}; confext-watcher build site -o site_2.raw {' '.join(options)}"
    done = sh(host, words, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"confext-watcher: {said}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not host.bed.path(f"{SCRATCH}/site_2.raw").exists()


def test_a_key_with_a_passphrase_asks_nobody(host: Host) -> None:
    sh(host, f"cd {SCRATCH}; openssl rsa -aes256 -passout pass:secret -in key -out locked")
    words = (
        f"cd {SCRATCH}; timeout 30 confext-watcher build site -o site_2.raw --sign locked --certificate crt"
    )
    done = sh(host, words, check=False)
    assert done.returncode == 1 and done.stderr.startswith("confext-watcher: systemd-repart failed"), (
        done.stderr
    )
