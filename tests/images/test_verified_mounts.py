# SPDX-License-Identifier: LGPL-2.1-or-later
"""How an image with verity data is mounted, and what that adds to the verdict. For dm-verity itself see `tests/vm/`.

The programs are scripts here: the device that `veritysetup open` makes is the loop device with the data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from support.images import confext, image, noise
from support.needs import loop, root, tool
from support.signed import Key, make_key, make_tree, padded, sign
from watcher.images import sidecars
from watcher.images.admission import Admission, copied
from watcher.images.certificates import Keys
from watcher.images.made_for import host
from watcher.images.store import Store
from watcher.images.verification import Proofs
from watcher.images.verified_mounts import VerifiedMounts
from watcher.model import Candidate, Copy, Kind, Protection
from watcher.mounts import dm_verity
from watcher.mounts.workers import MountWorkers
from watcher.settings import device_mapper

pytestmark = [root, loop, tool("mksquashfs"), tool("veritysetup"), tool("openssl")]
MIB = 1 << 20
NO_KEY = "echo 'reload ioctl failed: Required key not available' >&2; exit 1"
WORKS = 'ln -s "$2" "$mapper/$3"'
KEYLESS = f'case "$*" in *signature*) {NO_KEY};; esac; {WORKS}'


class Bench:
    """A store with one signed image, mount workers, and an `Admission`."""

    def __init__(self, store: Store, workers: MountWorkers, mounts: VerifiedMounts, copy: Copy) -> None:
        self.store, self.workers, self.mounts, self.copy = store, workers, mounts, copy

    def admission(self, *certificates: Path) -> Admission:
        directories = [str(one.parent) for one in certificates]
        return Admission(self.store, self.workers, proofs=Proofs(Keys(directories)), mounts=self.mounts)

    def mount(self, copy: Copy | None = None) -> str:
        """A file of the image, read where it is mounted; afterwards it is not any more."""

        def read() -> str:
            with self.workers.images.attached([copy or self.copy]) as roots:
                return Path(roots[self.copy.digest], "etc/web.conf").read_text()

        found = self.workers.submit(read).result()
        self.workers.submit(self.workers.images.retain, []).result()
        return found


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def bench(tmp_path: Path, key: Key) -> Iterator[Bench]:
    path = tmp_path / "web_1.4.raw"
    files = {"etc/web.conf": b"x = 1\n", "etc/large": noise(50_000)}
    content = padded(image(confext(tmp_path / "tree", "web", files), tmp_path / "made").read_bytes())
    tree = make_tree(content)
    path.write_bytes(content)
    path.with_suffix(".verity").write_bytes(tree.content)
    path.with_suffix(".roothash").write_text(f"{tree.root_hash.hex()}\n")
    path.with_suffix(".roothash.p7s").write_bytes(sign(tree.root_hash, key))
    candidate = Candidate(str(path), path.name, "web", "1.4", Kind.IMAGE, sidecars=sidecars.found(str(path)))
    mounts = VerifiedMounts()
    with (
        Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as store,
        MountWorkers(fsmount=mounts.fsmount) as workers,
    ):
        yield Bench(store, workers, mounts, copied(store, candidate))


@pytest.fixture
def veritysetup(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Have the program be a shell script. What it was called with is in the file returned."""
    programs, devices = tmp_path / "bin", tmp_path / "mapper"
    devices.mkdir()
    programs.mkdir()
    monkeypatch.setattr(device_mapper, "CONTROL", os.devnull)
    monkeypatch.setattr(dm_verity, "DEVICES", str(devices))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    called = tmp_path / "called"

    def make(script: str) -> Path:
        called.write_text("")
        for name, text in (("veritysetup", script), ("dmsetup", 'rm "$mapper/$3"')):
            made = programs / name
            made.write_text(f'#!/bin/sh\necho {name} "$*" >>{called}\nmapper={devices}\n{text}\n')
            made.chmod(0o755)
        return called

    return make


def test_it_is_mounted_from_the_device(bench: Bench, veritysetup: Callable[[str], Path], key: Key) -> None:
    called = veritysetup(WORKS)
    admission = bench.admission(key.certificate)
    before = admission.trust(bench.copy)
    assert "dm-verity" not in before.how, "it is not mounted yet"
    assert bench.mount() == "x = 1\n"
    lines = called.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["veritysetup", "dmsetup"]
    assert "--root-hash-signature=" in lines[0]
    how = admission.trust(bench.copy).how
    assert how == (
        f"{before.how}; dm-verity verifies what is read of it, and its signature is of a key in the kernel's keyring"
    )


def test_signed_by_a_key_of_the_kernel_alone(bench: Bench, veritysetup: Callable[[str], Path]) -> None:
    """As for systemd, which asks the kernel first."""
    veritysetup(WORKS)
    admission = bench.admission()
    before = admission.trust(bench.copy)
    assert before.protection is Protection.VERITY and "unknown key" in before.remark
    bench.mount()
    after = admission.trust(bench.copy)
    assert after.protection is Protection.SIGNED and not after.remark and not after.signer


def test_without_the_key_the_kernel_verifies_all_the_same(
    bench: Bench, veritysetup: Callable[[str], Path], key: Key
) -> None:
    """And it is not asked again for a signature by the same certificate."""
    called = veritysetup(KEYLESS)
    admission = bench.admission(key.certificate)
    trusted = replace(bench.copy, trust=admission.trust(bench.copy))
    assert bench.mount(trusted) == bench.mount(trusted) == "x = 1\n"
    opened = [line for line in called.read_text().splitlines() if line.startswith("veritysetup")]
    assert ["signature" in line for line in opened] == [True, False, False]
    after = admission.trust(bench.copy)
    assert after.protection is Protection.SIGNED
    assert after.how.endswith("; dm-verity verifies what is read of it")


def test_a_failure_that_is_not_for_the_key_says_nothing_of_it(
    bench: Bench, veritysetup: Callable[[str], Path], key: Key
) -> None:
    """Only where it works without the signature is the key what was missing."""
    veritysetup("echo 'device-mapper: reload ioctl failed: Cannot allocate memory' >&2; exit 1")
    admission = bench.admission(key.certificate)
    trusted = replace(bench.copy, trust=admission.trust(bench.copy))
    bench.mount(trusted)
    veritysetup(WORKS)
    bench.mount(trusted)
    assert admission.trust(bench.copy).how.endswith("and its signature is of a key in the kernel's keyring")


def test_no_worker_waits_for_the_device(
    bench: Bench, veritysetup: Callable[[str], Path], tmp_path: Path
) -> None:
    """Admission has it set up: swaps of other services go on meanwhile."""
    os.mkfifo(tmp_path / "go")
    called = veritysetup(f"read go <{tmp_path}/go; {WORKS}")
    candidate = Candidate(str(tmp_path / "web_1.4.raw"), "web_1.4.raw", "web", "1.4", Kind.IMAGE)
    candidate = replace(candidate, sidecars=sidecars.found(candidate.path))
    with ThreadPoolExecutor() as threads, bench.store.using():
        admitted = threads.submit(bench.admission().admit, candidate, host(), set(), None)
        deadline = time.monotonic() + 20
        while not called.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing announces it
        assert bench.workers.submit(lambda: "a swap").result(5) == "a swap"
        (tmp_path / "go").write_text("go\n")
        assert admitted.result(20).digest == bench.copy.digest
    assert [line.split()[0] for line in called.read_text().splitlines()] == ["veritysetup", "dmsetup"]


@pytest.mark.parametrize(
    "fails",
    [
        "exit 1",
        NO_KEY,
        "echo 'Kernel does not support dm-verity' >&2; exit 1",
        'echo "device-mapper: reload ioctl on $3 (253:$$) failed: Invalid argument" >&2; exit 1',
    ],
)
def test_where_the_kernel_refuses_it_is_mounted_without(
    bench: Bench, veritysetup: Callable[[str], Path], key: Key, fails: str
) -> None:
    """It was verified: the verdict is the same, and one line says so, however many images there are."""
    veritysetup(fails)
    admission = bench.admission(key.certificate)
    before = admission.trust(bench.copy)
    with structlog.testing.capture_logs() as logs:
        assert bench.mount() == bench.mount() == "x = 1\n"
    (said,) = [entry["event"] for entry in logs]
    assert said.startswith("images with verity data are mounted without dm-verity: veritysetup: ")
    assert admission.trust(bench.copy) == before


def test_without_a_device_mapper_nothing_is_tried_or_said(
    bench: Bench, veritysetup: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = veritysetup(WORKS)
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path / "none"))
    with structlog.testing.capture_logs() as logs:
        assert bench.mount() == "x = 1\n"
    assert (called.read_text(), logs) == ("", [])
