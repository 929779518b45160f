# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images with what verifies them beside them, in units: where systemd can set up verity, and where it cannot.

A container has no device mapper. What systemd does up to there shows that it has found all that it needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import Host
from beds.site import WEB, run, sees
from support import needs
from support.images import confext, image
from support.signed import make_key, make_tree, padded, sign
from watcher.images import sidecars
from watcher.images.admission import copied
from watcher.images.store import Store
from watcher.model import Candidate, Kind, Layer, Stack
from watcher.resolve.sidecars import SUFFIXES
from watcher.settings import device_mapper

pytestmark = [needs.bed, *(needs.tool(one) for one in ("mksquashfs", "veritysetup", "openssl"))]

UNIT = "[Service]\nType=exec\nExecStart=/bin/sleep infinity\nExecReload=/bin/true\n"
SCRATCH = "/var/tmp/beside"
NAMES = ("site.raw", "site.roothash", "site.roothash.p7s", "site.verity")


def signed(directory: Path, version: str, content: str) -> Path:
    """An image, signed by a key that nobody knows, with all that belongs to it beside it."""
    tree = confext(directory / f"tree-{version}", "site", {"etc/web.conf": f"{content}\n".encode()})
    raw = directory / f"site_{version}.raw"
    raw.write_bytes(padded(image(tree, directory / "made").read_bytes()))
    made = make_tree(raw.read_bytes())
    raw.with_suffix(".verity").write_bytes(made.content)
    raw.with_suffix(".roothash").write_text(made.root_hash.hex())
    raw.with_suffix(".roothash.p7s").write_bytes(sign(made.root_hash, make_key(directory, f"key{version}")))
    return raw


@pytest.fixture
def scratch(bed: Bed) -> Iterator[Path]:
    yield bed.path(SCRATCH)
    shutil.rmtree(bed.path(SCRATCH), ignore_errors=True)


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def test_a_unit_has_the_same_by_a_swap_and_by_a_start(host: Host, tmp_path: Path) -> None:
    journal = run(host, UNIT, {"web.conf": "one"})
    for version, content in (("2", "two"), ("3", "three")):
        raw = signed(tmp_path, version, content)
        for suffix in (*SUFFIXES, ".raw"):
            host.drop(raw.with_suffix(suffix), WEB, f"site.raw.v/site_{version}{suffix}")
        journal.applied(WEB)
        sees(host, content)
        host.systemctl("restart", WEB)
        sees(host, content)
        host.systemctl("reload", WEB)


@pytest.mark.parametrize("policy", ["root=signed", "root=verity+signed"])
def test_a_policy_that_asks_for_a_signature_finds_it_beside_the_slot(
    bed: Bed, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    raw = signed(tmp_path, "1", "one")
    candidate = Candidate(str(raw), raw.name, "site", "1", Kind.IMAGE, sidecars=sidecars.found(str(raw)))

    def started(there: bool) -> tuple[list[str], str]:
        """The names of the slots, and how the start of a unit on them fails."""
        monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
        state = f"{SCRATCH}/{there}"
        with Store(str(bed.path(state)), 1 << 26, 1 << 26, 2) as store, store.using():
            copy = copied(store, candidate)
            stack = Stack((Layer("site.raw", "site", "1", copy.digest, Kind.IMAGE, ""),))
            store.accept("web.service", stack, ())
        slots = f"{state}/units/web.service"
        words = (
            f"systemd-run --quiet --wait --collect --unit=beside -p ExtensionImagePolicy={policy}"
            f" -p ExtensionImages={slots}/site.raw:ro,x-systemd.relax-extension-release-check true;"
            f" SYSTEMD_LOG_LEVEL=debug systemd-dissect --image-policy={policy} --list {slots}/site.raw 2>&1"
        )
        said = bed.run(["sh", "-c", words], check=False).stdout
        names = sorted(one for one in (scratch / str(there) / "units/web.service").iterdir())
        return [one.name for one in names if not one.name.startswith(".")], said

    names, said = started(there=True)
    assert names == sorted(NAMES)
    assert "policy" not in said.splitlines()[-1]
    assert "device-mapper" in said or "device mapper" in said.lower()
    names, said = started(there=False)
    assert names == ["site.raw"]
    assert "discovered with policy 'unprotected' but" in said
