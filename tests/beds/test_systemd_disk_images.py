# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disk images as systemd-repart builds them: a swap and systemd itself make the same `/etc` of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, run, sees
from support import images, needs
from support.disks import disk

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
SCRATCH = "/var/tmp/ddi"
STORE = "/var/lib/confext-watcher/store"

ROOT = "[Partition]\nType=root\nFormat={}\nCopyFiles=/\nMinimize=best\n"
DEFINITIONS = {
    "squashfs": (ROOT.format("squashfs"),),
    "erofs": (ROOT.format("erofs"),),
    "ext4": (ROOT.format("ext4").replace("Minimize=best\n", ""),),
    "verity": (
        ROOT.format("erofs") + "Verity=data\nVerityMatchKey=root\n",
        "[Partition]\nType=root-verity\nVerity=hash\nVerityMatchKey=root\nMinimize=best\n",
    ),
}
TRUST = {"verity": ("verity", ""), "signed": ("signed", "CN=test"), "mkosi": ("signed", "CN=test")}
# What mkosi 25 gives to systemd-repart for Format=confext with Verity=yes.
DEFINITIONS["mkosi"] = (
    DEFINITIONS["verity"][0].replace("CopyFiles=/\n", "CopyFiles=/etc/\n"),
    DEFINITIONS["verity"][1],
    "[Partition]\nType=root-verity-sig\nVerity=signature\nVerityMatchKey=root\n",
)
KEY = f"""
openssl req -new -x509 -newkey rsa:2048 -nodes -keyout {SCRATCH}/key -out {SCRATCH}/crt -subj /CN=test -days 9
"""
SIGNED = f"""{KEY}exec systemd-repart --make-ddi=confext --private-key={SCRATCH}/key --certificate={SCRATCH}/crt \
    --copy-source={SCRATCH}/tree {SCRATCH}/made.raw
"""


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        made.stack.callback(bed.run, ["rm", "-rf", SCRATCH])
        yield made


def made(host: Host, kind: str, content: str, *options: str) -> Path:
    """A disk image by the bed's own systemd-repart."""
    release = "etc/extension-release.d"
    files = (
        f"rm -rf {SCRATCH}; mkdir -p {SCRATCH}/definitions {SCRATCH}/tree/{release};"
        f"echo ID=_any >{SCRATCH}/tree/{release}/extension-release.site;"
        f"echo {content} >{SCRATCH}/tree/etc/web.conf"
    )
    host.bed.run(["sh", "-c", files])
    if kind == "signed":
        host.bed.run(["sh", "-ec", SIGNED])
    else:
        for number, text in enumerate(DEFINITIONS[kind]):
            host.bed.path(f"{SCRATCH}/definitions/{number}.conf").write_text(text)
        if kind == "mkosi":
            host.bed.run(["sh", "-ec", KEY])
            options += (f"--private-key={SCRATCH}/key", f"--certificate={SCRATCH}/crt", "--seed=random")
        words = ("--empty=create", "--size=auto", "--offline=yes", f"--copy-source={SCRATCH}/tree", *options)
        host.bed.run(
            ["systemd-repart", f"--definitions={SCRATCH}/definitions", *words, f"{SCRATCH}/made.raw"]
        )
    return host.bed.path(f"{SCRATCH}/made.raw")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("squashfs", ()),
        ("erofs", ()),
        ("erofs", ("--sector-size=4096",)),
        ("ext4", ()),
    ],
)
def test_a_unit_has_the_same_by_a_swap_and_by_a_start(
    host: Host, kind: str, options: tuple[str, ...]
) -> None:
    journal = run(host, UNIT, {"web.conf": "one"})
    host.drop(made(host, kind, "two", *options), WEB, "site.raw.v/site_2.raw")
    journal.applied(WEB)
    sees(host, "two")
    host.systemctl("restart", WEB)
    sees(host, "two")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    "fstype",
    [
        pytest.param(one, marks=[needs.tool(f"mkfs.{one}"), needs.filesystem(one)])
        for one in ("ext4", "btrfs")
    ],
)
def test_versions_with_the_same_uuid_are_told_apart(
    host: Host, tmp_path: Path, fstype: str, bare: bool
) -> None:
    """systemd mounts the slot beside the watcher's own mount of it, and of the version before; and writes nothing."""
    made = []
    same = ("-U", str(uuid.uuid4()))
    for content in ("two", "three"):
        tree = images.confext(tmp_path / content, "site", {"etc/web.conf": f"{content}\n".encode()})
        made.append(images.image(tree, tmp_path / f"{content}.raw", fstype, *same))
        if not bare:
            made[-1].write_bytes(disk(made[-1].read_bytes()))
    journal = run(host, UNIT, {"web.conf": "one"})
    for version, content in enumerate(("two", "three"), 2):
        host.drop(made[version - 2], WEB, f"site.raw.v/site_{version}.raw")
        journal.applied(WEB)
        sees(host, content)
        host.systemctl("restart", WEB)
        sees(host, content)
    host.systemctl("stop", WEB)
    for image in made:
        assert images.digest(host.bed.path(f"{STORE}/{images.digest(image)}")) == images.digest(image)


@pytest.mark.parametrize("kind", ["verity", "signed", "mkosi"])
def test_a_unit_starts_on_what_was_verified(host: Host, kind: str) -> None:
    """Without a device mapper, as here, 262 would fail to set up verity for the start, and for each reload."""
    journal = run(host, UNIT, {"web.conf": "one"})
    path = made(host, kind, "two")
    host.bed.run(
        [
            "sh",
            "-ec",
            f"mkdir -p /run/verity.d; ! test -e {SCRATCH}/crt || cp {SCRATCH}/crt /run/verity.d/test.crt",
        ]
    )
    host.stack.callback(host.bed.run, ["rm", "-rf", "/run/verity.d"])
    host.drop(path, WEB, "site.raw.v/site_2.raw")
    applied = journal.applied(WEB)
    assert (applied["CONFEXT_TRUST"], applied.get("CONFEXT_SIGNER", "")) == TRUST[kind]
    sees(host, "two")
    host.systemctl("reload", WEB)
    host.systemctl("restart", WEB)
    sees(host, "two")
    host.no_watcher()
    host.systemctl("restart", WEB)
    sees(host, "two")


def test_where_the_unit_wants_systemd_to_verify_it_is_kept_out(host: Host) -> None:
    text = f"{UNIT}ExtensionImagePolicy=root=verity+signed+unprotected+absent:=unused+absent\n"
    journal = run(host, text, {"web.conf": "one"})
    host.drop(made(host, "verity", "two"), WEB, "site.raw.v/site_2.raw")
    journal.until(lambda entry: "site_2.raw refused: it has verity data, which systemd" in entry["MESSAGE"])
    host.systemctl("restart", WEB)
    sees(host, "one")


def test_one_flipped_bit_is_refused(host: Host) -> None:
    journal = run(host, UNIT, {"web.conf": "one"})
    path = made(host, "verity", "two")
    content = bytearray(path.read_bytes())
    content[content.index(b"verity\0\0\1\0\0\0\1") + 90] ^= 1  # in its salt
    path.write_bytes(content)
    host.drop(path, WEB, "site.raw.v/site_2.raw")
    journal.until(lambda entry: "by its hash tree: copy it again" in entry["MESSAGE"])
    sees(host, "one")
