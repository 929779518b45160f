# SPDX-License-Identifier: LGPL-2.1-or-later
"""`ExtensionImagePolicy=` of a unit on real systemd: what would fail its start does not get in (226/NAMESPACE)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host
from beds.site import WEB, drop, kept, run, sees
from support import needs
from support.disks import NO_AUTO, Part, disk
from support.signed import make_key, padded, protected
from watcher.images.formats.partition_types import OTHERS
from watcher.images.formats.probe import probe
from watcher.model import Protection, Trust
from watcher.settings.image_policy import parse

pytestmark = [needs.bed, needs.tool("mksquashfs")]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
AWAITED = (
    "beside it awaited: it is unprotected, and ExtensionImagePolicy=root=signed ({}/web.service.d/policy.conf:2)"
    " asks for signed: "
)


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def policy(host: Host, text: str) -> None:
    """As `systemctl edit` does it."""
    path = host.bed.path(f"{UNITS}/web.service.d/policy.conf")
    path.parent.mkdir(exist_ok=True, parents=True)
    path.with_name("coming").write_text(f"[Service]\nExtensionImagePolicy={text}\n")
    path.with_name("coming").rename(path)
    host.systemctl("daemon-reload")


def start_fails(host: Host) -> bool:
    host.bed.run(["systemctl", "restart", WEB], check=False)
    status = host.bed.run(["systemctl", "show", "--property=ExecMainStatus", WEB]).stdout
    host.bed.run(["systemctl", "reset-failed", WEB], check=False)
    return status.strip() == "ExecMainStatus=226"


def test_an_image_that_would_fail_the_start_waits_and_gets_in_once_it_may(host: Host) -> None:
    host.unit(WEB, UNIT)
    policy(host, "root=signed")
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "1"})
    # What it is signed by may lie beside an image, and come after it.
    entry = journal.outcome(WEB, "incomplete")
    assert AWAITED.format(UNITS) in entry["MESSAGE"]
    assert kept(host) == ""
    host.systemctl("start", WEB)  # it does, with the host's /etc
    policy(host, "root=signed+unprotected")
    journal.until(lambda entry: "site 1 added, applied" in entry["MESSAGE"])
    sees(host, "1")
    host.systemctl("restart", WEB)
    sees(host, "1")


def test_a_stricter_policy_takes_nothing_away_and_that_the_next_start_would_fail_is_said(host: Host) -> None:
    journal = run(host, UNIT, {"web.conf": "1"})
    policy(host, "root=signed")
    stays = "stays, but would not get in now, and systemd will not start the unit on it: it is unprotected"
    journal.until(lambda entry: stays in entry["MESSAGE"])
    sees(host, "1")
    for command in ("status", "plan"):
        assert stays in host.bed.run(["confext-watcher", command, "web"]).stdout
    assert start_fails(host)  # so it is
    policy(host, "root=verity+unprotected")
    host.systemctl("restart", WEB)
    sees(host, "1")


def test_words_that_only_newer_versions_know_count_all_the_same(host: Host) -> None:
    """systemd 257 passes over such a line in a drop-in: then nothing but the watcher goes by it."""
    journal = run(host, UNIT, {"web.conf": "1"})
    policy(host, "root=unprotected+erofs")
    assert start_fails(host) == (host.bed.version != "257")
    journal.until(
        lambda entry: "systemd will not start the unit on it: it is squashfs, and" in entry["MESSAGE"]
    )
    drop(host, 2, {"web.conf": "2"})
    entry = journal.outcome(WEB, "refused")
    assert "it is squashfs, and ExtensionImagePolicy=root=unprotected+erofs (" in entry["MESSAGE"]


# Of those that use no image at all, systemd says something else.
POLICIES = (
    *(
        "*",
        "~",
        "root=verity",
        "root=signed",
        "root=unprotected",
        "root=verity:=open",
        "root=verity:=absent",
    ),
    *(
        "root=unprotected:=absent",
        "root=signed:=absent",
        "root=verity+signed:=absent",
        "root=open+read-only-on",
    ),
    *(
        "root=open+read-only-off",
        "root=open+growfs-on",
        "root=open+growfs-off",
        "=verity",
        "=signed:root=verity",
    ),
    *(
        "root=unprotected:root-verity=absent",
        "root=verity:root-verity=unused",
        "root=encrypted",
    ),
    *("root=open:root-verity=read-only-on", "root=open:root-verity=read-only-off"),
    "root=signed:root-verity-sig=absent",
)
OF_OTHERS = (
    *("~", "root=unprotected:=absent", "=verity"),
    *("root=open:home=absent:esp=absent", "root=open:=absent+unprotected", "root=open:=unused"),
    *("root=open:=unused+absent", "root=open:home=unprotected+absent+read-only-on:=unused+absent"),
)


def other(designator: str) -> uuid.UUID:
    return next(id for id, known in OTHERS.items() if known == designator)


SCRATCH = "/var/tmp/policies"


@needs.tool("veritysetup")
def test_what_a_policy_says_of_partitions_is_what_systemd_says(host: Host, tmp_path: Path) -> None:
    """Where the versions differ, what 257 says; they do in one case."""
    content = host.image("bare", {"web.conf": "1"}).read_bytes()
    disks = {
        "bare": content,
        "plain": disk(Part(padded(content))),
        "flag": disk(Part(padded(content), flags=1 << 60)),
        "verity": protected(content),
        "signed": protected(content, make_key(tmp_path)),
        **{
            name: disk(Part(padded(content)), Part(bytes(4096), other(name), name))
            for name in OTHERS.values()
        },
        "home-no-auto": disk(Part(padded(content)), Part(bytes(4096), other("home"), "", NO_AUTO)),
        "esp-not-for-firmware": disk(Part(padded(content)), Part(bytes(4096), other("esp"), "", 2)),
    }
    host.bed.run(["mkdir", "-p", SCRATCH])
    host.stack.callback(host.bed.run, ["rm", "-rf", SCRATCH])
    found: dict[tuple[str, str], bool] = {}
    for name, made in disks.items():
        path = host.bed.path(f"{SCRATCH}/{name}.raw")
        path.write_bytes(made)
        with path.open("rb") as file:
            parts = probe(file.fileno(), len(made)).parts
        # There counts what is claimed, here what is proved.
        claims = Trust(tuple(Protection)[max(sum(one.startswith("root") for one, _ in parts) - 1, 0)])
        for text in OF_OTHERS if name.partition("-")[0] in OTHERS.values() else POLICIES:
            found[name, text] = not parse(text).allows(claims, "squashfs") or bool(
                parse(text).mismatch(parts)
            )
    ask = f"systemd-dissect --json=short '--image-policy={{1}}' {SCRATCH}/{{0}}.raw 2>&1 | grep -c 'image policy'"
    asked = "; ".join(ask.format(*case) for case in found)
    said = host.bed.run(["sh", "-c", asked], check=False).stdout.split()
    wrong = [case for (case, one), other in zip(found.items(), said, strict=True) if one != (other == "1")]
    assert wrong == ([] if host.bed.version == "257" else [("signed", "root=verity:=open")])
