# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images with what lies beside them: read as systemd does, copied as one content, and a slot has links to all of it.

Of images/bundles.py, images/sidecars.py, images/originals.py and images/renewal.py.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.disks import Part, disk
from support.images import confext, digest, image, noise
from support.killing import killed_before
from support.needs import loop, root, tool
from support.signed import Key, assembled, make_key, make_tree, padded, sign
from watcher.images import bundles, originals, sidecars
from watcher.images.admission import Admission, copied
from watcher.images.certificates import Keys
from watcher.images.errors import StoreFull
from watcher.images.formats.image import Image
from watcher.images.formats.probe import probe
from watcher.images.image_check import examine
from watcher.images.made_for import host
from watcher.images.renewal import renew_slots
from watcher.images.store import Store
from watcher.images.stored import stored
from watcher.images.verification import Proofs
from watcher.model import (
    Busy,
    Candidate,
    Copy,
    Incomplete,
    Kind,
    Layer,
    Protection,
    Refused,
    Stack,
    Trust,
    Unsafe,
)
from watcher.mounts.process import may_mount
from watcher.mounts.workers import MountWorkers
from watcher.records import durable
from watcher.resolve import scan, sources
from watcher.resolve.strict_modes import StrictModes
from watcher.settings import device_mapper
from watcher.watch.lease import Lease

pytestmark = [tool("mksquashfs"), tool("veritysetup"), tool("openssl")]
MIB = 1 << 20
RELEASE = "web_1.4"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    top = tmp_path_factory.mktemp("squashfs")
    files = {"etc/web.conf": b"x = 1\n", "etc/large": noise(50_000)}
    return padded(image(confext(top / "tree", "web", files), top / "web.raw").read_bytes())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as made:
        yield made


@pytest.fixture
def raw(tmp_path: Path, squashfs: bytes, key: Key) -> Path:
    """web_1.4.raw, and all that may lie beside it."""
    path = tmp_path / "web.raw.v/web_1.4.raw"
    path.parent.mkdir()
    return signed(path, squashfs, key)


def signed(path: Path, content: bytes, key: Key) -> Path:
    tree = make_tree(content)
    path.write_bytes(content)
    path.with_suffix(".verity").write_bytes(tree.content)
    path.with_suffix(".roothash").write_text(f"{tree.root_hash.hex()}\n")
    path.with_suffix(".roothash.p7s").write_bytes(sign(tree.root_hash, key))
    return path


def candidate(path: Path) -> Candidate:
    return Candidate(str(path), path.name, "web", "1.4", Kind.IMAGE, sidecars=sidecars.found(str(path)))


def copy_of(store: Store, path: Path) -> Copy:
    return copied(store, candidate(path))


def trusted(store: Store, copy: Copy, key: Key, tmp_path: Path) -> Trust:
    (tmp_path / "verity.d").mkdir(exist_ok=True)
    (tmp_path / "verity.d/maker.crt").write_bytes(key.pem)
    with MountWorkers() if may_mount() else pytest.skip("needs root") as workers:
        proofs = Proofs(Keys([str(tmp_path / "verity.d")]))
        return Admission(store, workers, proofs=proofs).trust(copy)


def inside(copy: Copy) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in Path(copy.path).parent.iterdir()}


class TestTheCopy:
    def test_has_all_of_it_and_is_found_again(self, store: Store, raw: Path, tmp_path: Path) -> None:
        copy = copy_of(store, raw)
        assert copy.path == f"{tmp_path}/state/store/{copy.digest}/image.raw" and copy.kind is Kind.IMAGE
        names = ("image.raw", "protected.raw", *(f"protected{one}" for one in PARTS))
        sources = (raw, raw, *(raw.with_suffix(one) for one in (".verity", ".roothash", ".roothash.p7s")))
        assert inside(copy) == {
            name: source.read_bytes() for name, source in zip(names, sources, strict=True)
        }
        assert {one.stat().st_mode & 0o7777 for one in Path(copy.path).parent.iterdir()} == {0o400}
        assert copy_of(store, raw) == copy
        with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as later:
            assert later.verify(copy.digest)
            again = later.copy(Layer("web.raw", "web", "1.4", copy.digest, Kind.IMAGE, str(raw)))
            assert (again.path, again.format) == (copy.path, copy.format)
            assert copy_of(later, raw) == again

    def test_who_only_looks_finds_the_same(self, store: Store, raw: Path, tmp_path: Path) -> None:
        """`origin` and `diff` (images/stored.py)."""
        copy = copy_of(store, raw)
        assert stored(str(tmp_path / "state"), copy.digest) == copy

    def test_a_changed_file_beside_it_is_another_content(
        self, store: Store, raw: Path, tmp_path: Path
    ) -> None:
        copy = copy_of(store, raw)
        other = make_key(tmp_path, "other")
        root_hash = bytes.fromhex(raw.with_suffix(".roothash").read_text())
        raw.with_suffix(".roothash.p7s").write_bytes(sign(root_hash, other))
        changed = copy_of(store, raw)
        assert changed.digest != copy.digest
        raw.with_suffix(".roothash.p7s").unlink()
        assert copy_of(store, raw).digest not in (copy.digest, changed.digest)
        for one in (".verity", ".roothash"):
            raw.with_suffix(one).unlink()
        plain = copy_of(store, raw)
        assert plain.digest == digest(raw) and plain.path.endswith(plain.digest)

    def test_the_attribute_beats_the_file_and_is_not_inherited(self, store: Store, raw: Path) -> None:
        before = copy_of(store, raw)
        file = raw.with_suffix(".roothash")
        os.setxattr(raw, sidecars.XATTR, file.read_text().strip().upper().encode())
        file.write_text("00" * 32)
        copy = copy_of(store, raw)
        assert copy.digest == before.digest  # one form of one root hash
        assert sidecars.XATTR not in os.listxattr(copy.path)
        file.unlink()
        assert copy_of(store, raw).digest == before.digest

    def test_damage_in_what_lies_beside_it_is_damage(self, store: Store, raw: Path, tmp_path: Path) -> None:
        copy = copy_of(store, raw)
        tree = Path(copy.path).with_name("protected.verity")
        content = bytearray(tree.read_bytes())
        content[5000] ^= 1
        tree.chmod(0o600)
        tree.write_bytes(content)
        tree.chmod(0o400)
        with Store(str(tmp_path / "state"), 64 * MIB, 32 * MIB, 2) as later:
            assert not later.verify(copy.digest)
            assert copy_of(later, raw).digest == copy.digest
            assert later.verify(copy.digest)

    def test_it_is_collected_with_all_that_is_in_it(self, store: Store, raw: Path) -> None:
        copy = copy_of(store, raw)
        files = (one for one in Path(copy.path).parent.iterdir() if not one.is_symlink())
        assert store.usage() >= sum(one.stat().st_size for one in files)
        assert store.collect(()) == (copy.digest,)
        assert not Path(copy.path).parent.exists() and store.usage() == 0

    def test_it_counts_as_a_whole_against_the_limits(self, store: Store, raw: Path) -> None:
        store.configure(64 * MIB, raw.stat().st_size + 1, 2)
        with pytest.raises(Refused, match=r"^too large: \d+ bytes, \d+ are allowed .ImageMax=."):
            copy_of(store, raw)


def test_a_server_that_says_one_thing_first_and_then_another_is_taken_by_what_was_copied(
    store: Store, squashfs: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no leases (NFS, FUSE) only size and times are compared, and those are the server's word, too."""
    monkeypatch.setattr(Lease, "__enter__", lambda self: self)
    monkeypatch.setattr(Lease, "held", lambda self: True)
    one, other = (
        disk(Part(squashfs, label=label), Part(squashfs, label="root_2")) for label in ("root_1", "root_3")
    )
    path = tmp_path / "web_1.4.raw"
    path.write_bytes(one)

    def then_another(fd: int, size: int) -> Image:
        found = probe(fd, size)
        path.write_bytes(other)
        return found

    monkeypatch.setattr(originals, "probe", then_another)
    copy = copy_of(store, path)
    assert copy.digest == digest(path) and copy.format is not None
    with open(copy.path, "rb") as file:
        assert copy.format == probe(file.fileno(), len(other))


def test_names_that_no_look_finds_are_not_waited_for(store: Store, squashfs: bytes, tmp_path: Path) -> None:
    """As of `ExtensionImages=/srv/x.v/web___.img`."""
    directory = tmp_path / "x.v"
    directory.mkdir()
    (directory / "web_1.img").write_bytes(squashfs)
    (directory / "web_1.img.verity").touch()
    declared = sources.declare([(f"{directory}/web___.img", "", False)], [])
    ((found,),) = (picks.candidates for picks in scan.look(declared).picks)
    copied(store, found)


def test_a_full_store_needs_no_room_for_what_it_has(store: Store, raw: Path, tmp_path: Path) -> None:
    """A daemon that starts looks at what it copied before: it is not to say that the store is full."""
    with store.using():
        copy = copy_of(store, raw)
    with Store(str(tmp_path / "state"), store.usage() + (1 << 16), 32 * MIB, 2) as full, full.using():
        again = copy_of(full, raw)
        assert again == copy
        assert [name for name in os.listdir(full.copies) if not name.startswith(".")] == [copy.digest]
        for part, content in (
            (".roothash.p7s", b"0\x01\x00"),
            (".verity", raw.with_suffix(".verity").read_bytes()[:-1] + b"x"),
            (".raw", raw.read_bytes()[:-1] + b"x"),
        ):
            before = raw.with_suffix(part).read_bytes()
            raw.with_suffix(part).write_bytes(content)
            with pytest.raises(StoreFull):
                copy_of(full, raw)
            raw.with_suffix(part).write_bytes(before)


class TestTheSlot:
    @pytest.mark.parametrize("there", [True, False])
    def test_systemd_finds_beside_it_what_lies_beside_the_image_where_it_can_use_that(
        self, store: Store, raw: Path, tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing"))
        with store.using():
            copy = copy_of(store, raw)
            layer = Layer("web.raw", "web", "1.4", copy.digest, Kind.IMAGE, str(raw))
            store.accept("web.service", Stack((layer,)), ())
        slots = tmp_path / "state/units/web.service"
        found = {one.name: one.read_bytes() for one in slots.iterdir() if not one.name.startswith(".")}
        content = inside(copy)
        named = {f"web{one}": content[f"protected{one}"] for one in (".raw", *PARTS)}
        assert found == (named if there else {"web.raw": content["image.raw"]})
        assert (
            Path(copy.protected).name == "protected.raw"
            and not Path(copy.path).with_suffix(".verity").exists()
        )
        assert store.collect(()) == ()
        for one in PARTS:
            raw.with_suffix(one).unlink()
        with store.using():
            plain = copy_of(store, raw)
            assert not plain.protected
            new = Layer("web.raw", "web", "1.4", plain.digest, Kind.IMAGE, "")
            store.accept("web.service", Stack((new,)), ())
        assert sorted(os.listdir(slots)) == [".state.json", "web.raw"]

    @pytest.mark.parametrize("there", [True, False])
    @pytest.mark.parametrize("how", ["accepted again", "at the daemon's start"])
    def test_with_another_kernel_it_is_made_anew(
        self, store: Store, raw: Path, tmp_path: Path, there: bool, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The device mapper has gone, and each start would fail (226); or has come, and systemd is to verify."""
        monkeypatch.setattr(
            device_mapper, "CONTROL", str(tmp_path) if not there else str(tmp_path / "missing")
        )
        with store.using():
            layer = Layer("web.raw", "web", "1.4", copy_of(store, raw).digest, Kind.IMAGE, str(raw))
            store.accept("web.service", Stack((layer,)), ())
            before = store.state("web.service")
            assert renew_slots(store) == (), "they are as they have to be"
            monkeypatch.setattr(
                device_mapper, "CONTROL", str(tmp_path) if there else str(tmp_path / "missing")
            )
            if how == "accepted again":
                store.accept("web.service", Stack((layer,)), ())
            else:
                assert renew_slots(store) == ("web.service",)
        slots = tmp_path / "state/units/web.service"
        beside = [f"web{one}" for one in PARTS] if there else []
        assert sorted(os.listdir(slots)) == [".state.json", *sorted(["web.raw", *beside])]
        assert all((slots / name).is_file() for name in os.listdir(slots))
        assert store.state("web.service").accepted.stack == before.accepted.stack
        assert renew_slots(store) == ()

    def test_a_record_is_made_anew_of_it(self, store: Store, raw: Path, tmp_path: Path) -> None:
        with store.using():
            copy = copy_of(store, raw)
            layer = Layer("web.raw", "web", "", copy.digest, Kind.IMAGE, str(raw))
            store.accept("web.service", Stack((layer,)), ())
        record = tmp_path / "state/units/web.service/.state.json"
        record.write_bytes(b"damaged")
        (again,) = store.state("web.service").accepted.stack.layers
        assert (again.slot, again.digest, again.kind) == ("web.raw", copy.digest, Kind.IMAGE)


class TestTrust:
    @root
    def test_signed(self, store: Store, raw: Path, key: Key, tmp_path: Path) -> None:
        found = trusted(store, copy_of(store, raw), key, tmp_path)
        assert (found.protection, found.signer) == (Protection.SIGNED, "CN=maker")
        assert "by the root hash of the .roothash beside it" in found.how

    @root
    def test_without_a_signature(self, store: Store, raw: Path, key: Key, tmp_path: Path) -> None:
        raw.with_suffix(".roothash.p7s").unlink()
        assert trusted(store, copy_of(store, raw), key, tmp_path).protection is Protection.VERITY

    @root
    @pytest.mark.parametrize("which", [".verity", ".roothash", ".raw", ".roothash.p7s"])
    def test_one_of_another_image(
        self, store: Store, raw: Path, key: Key, tmp_path: Path, which: str
    ) -> None:
        tree = confext(tmp_path / "other", "web", {"etc/large": noise(50_000)})
        (tmp_path / "others").mkdir()
        other = signed(
            tmp_path / "others/web_1.4.raw", padded(image(tree, tmp_path / "o.raw").read_bytes()), key
        )
        shutil.copy(other.with_suffix(which), raw.with_suffix(which))
        if which == ".roothash.p7s":
            found = trusted(store, copy_of(store, raw), key, tmp_path)
            assert found.protection is Protection.VERITY
            assert found.remark == "its signature is not of its root hash: it is of another image, or damaged"
            return
        with pytest.raises(
            Refused, match=r"^(with what lies|the hash tree) beside it.*different images|damaged"
        ):
            trusted(store, copy_of(store, raw), key, tmp_path)


PARTS = (".verity", ".roothash", ".roothash.p7s")


@pytest.mark.parametrize(
    ("there", "awaited"),
    [
        ((".verity",), "web_1.4.roothash"),
        ((".roothash",), "web_1.4.verity"),
        ((".roothash.p7s",), "web_1.4.roothash"),
        ((".verity", ".roothash.p7s"), "web_1.4.roothash"),
        ((".roothash", ".roothash.p7s"), "web_1.4.verity"),
    ],
)
def test_a_part_of_it_awaits_the_rest(store: Store, raw: Path, there: tuple[str, ...], awaited: str) -> None:
    for one in set(PARTS) - set(there):
        raw.with_suffix(one).unlink()
    with pytest.raises(Incomplete, match=f"^incomplete: {awaited} beside it is awaited$"):
        copy_of(store, raw)
    with pytest.raises(Incomplete, match=f"^incomplete: {awaited} beside it is awaited$"):
        examine(str(raw), host(), 32 * MIB)


def cut(path: Path) -> None:
    os.truncate(path.with_suffix(".verity"), 5000)


def written(suffix: str, content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.with_suffix(suffix).write_bytes(content)

    return write


def linked(path: Path) -> None:
    path.with_suffix(".roothash").unlink()
    path.with_suffix(".roothash").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, r"^incomplete: 5000 of \d+ bytes of its verity data are here$"),
        (written(".verity", b""), "^incomplete: 0 of 512 bytes of its verity data"),
        (written(".verity", bytes(9000)), "^incomplete: its verity data begins with nothing but zeros"),
        (written(".verity", b"x" * 9000), "its verity data has no superblock"),
        (written(".roothash", b""), "^incomplete: web_1.4.roothash beside it is empty$"),
        (written(".roothash.p7s", b""), "^incomplete: web_1.4.roothash.p7s beside it is empty$"),
        (written(".roothash", b"00" * 15), "^web_1.4.roothash beside it has a root hash of 15 bytes, 16 is"),
        (written(".roothash", b"\n"), "^web_1.4.roothash beside it has a root hash of 0 bytes"),
        (
            written(".roothash", b"<html>"),
            "^web_1.4.roothash beside it is no root hash in hexadecimal digits$",
        ),
        (written(".roothash", b"0" * 33), "is no root hash in hexadecimal digits$"),
        (written(".roothash", "\u0663".encode() * 32), "is no root hash in hexadecimal digits$"),
        (written(".roothash", bytes(5000)), "^web_1.4.roothash beside it has 5000 bytes, 4096 is the limit$"),
        (
            written(".roothash.p7s", bytes(70_000)),
            "^web_1.4.roothash.p7s beside it has 70000 bytes, 65536 is",
        ),
        (linked, "^web_1.4.roothash beside it: a link that leads nowhere$"),
        (lambda path: os.setxattr(path, sidecars.XATTR, b"zz"), "^user.verity.roothash beside it is no root"),
    ],
)
def test_what_lies_beside_it_and_is_none(
    store: Store, raw: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(raw)
    with pytest.raises(Refused, match=reason):
        copy_of(store, raw)
    with pytest.raises(Refused, match=reason):
        examine(str(raw), host(), 32 * MIB)


def test_a_root_hash_as_people_write_it(store: Store, raw: Path) -> None:
    before = copy_of(store, raw)
    text = raw.with_suffix(".roothash").read_text().strip()
    raw.with_suffix(".roothash").write_text(f" {text[:20].upper()} {text[20:]} \r\nmore\n")
    assert copy_of(store, raw).digest == before.digest


def test_a_file_system_that_goes_on_behind_its_tree(store: Store, raw: Path, squashfs: bytes) -> None:
    tree = make_tree(squashfs, "--data-blocks", len(squashfs) // 4096 - 1)
    raw.with_suffix(".verity").write_bytes(tree.content)
    raw.with_suffix(".roothash").write_text(tree.root_hash.hex())
    with pytest.raises(
        Refused, match=r"^the hash tree beside it covers \d+ bytes, and the file system has \d+"
    ):
        copy_of(store, raw)


class TestADiskImage:
    def test_has_its_tree_in_a_partition(self, store: Store, raw: Path, squashfs: bytes) -> None:
        raw.write_bytes(disk(squashfs))
        with pytest.raises(Refused, match=r"^a disk image with a \.verity beside it"):
            copy_of(store, raw)
        raw.with_suffix(".verity").unlink()
        with pytest.raises(Refused, match=r"^a disk image without verity data, and a root hash beside it"):
            copy_of(store, raw)

    @root
    def test_may_have_root_hash_and_signature_beside_it(
        self, store: Store, raw: Path, squashfs: bytes, key: Key, tmp_path: Path
    ) -> None:
        tree = make_tree(squashfs)
        raw.write_bytes(assembled(squashfs, tree))
        raw.with_suffix(".verity").unlink()
        with pytest.raises(Refused, match=r"^the root hash beside it is not that of the disk image"):
            copy_of(store, raw)
        raw.with_suffix(".roothash").write_text(tree.root_hash.hex())
        raw.with_suffix(".roothash.p7s").write_bytes(sign(tree.root_hash, key))
        copy = copy_of(store, raw)
        assert copy.format is not None and copy.format.name == "disk image with squashfs"
        assert trusted(store, copy, key, tmp_path).protection is Protection.SIGNED
        raw.write_bytes(disk(Part(squashfs)))


def test_one_that_is_still_written_is_busy(store: Store, raw: Path) -> None:
    for one in PARTS:
        with raw.with_suffix(one).open("ab"), pytest.raises(Busy):
            copy_of(store, raw)
    copy_of(store, raw)


def test_one_that_comes_while_the_image_is_copied_is_not_missed(
    store: Store, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = raw.with_suffix(".verity").read_bytes()
    for one in PARTS:
        raw.with_suffix(one).unlink()
    probe = originals.probe

    def late(fd: int, size: int) -> object:
        raw.with_suffix(".verity").write_bytes(tree)
        return probe(fd, size)

    monkeypatch.setattr(originals, "probe", late)
    with pytest.raises(Busy, match="what it is verified by has just come beside it"):
        copied(store, Candidate(str(raw), raw.name, "web", "1.4", Kind.IMAGE))


@root
def test_who_may_write_them_is_asked_as_of_an_image(store: Store, raw: Path) -> None:
    raw.with_suffix(".roothash").chmod(0o666)
    with StrictModes() as modes, pytest.raises(Unsafe, match=r"^web_1\.4\.roothash beside it: ") as unsafe:
        copied(store, candidate(raw), modes=modes)
    assert unsafe.value.path.endswith("web_1.4.roothash")


@root
@loop
def test_check_says_what_the_daemon_does(raw: Path, key: Key, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/maker.crt").write_bytes(key.pem)
    found = examine(str(raw), host(), 32 * MIB, Keys([str(tmp_path / "keys")]))
    assert found.trust.protection is Protection.SIGNED
    raw.with_suffix(".roothash").write_text("00" * 32)
    with pytest.raises(
        Refused, match=r"^with what lies beside it: its root hash is not that of its hash tree"
    ):
        examine(str(raw), host(), 32 * MIB)


def test_a_link_says_of_which_layer_it_is(tmp_path: Path) -> None:
    digest = "a" * 64
    links = {
        "plain.raw": "",
        "web.raw": "/protected.raw",
        "alone.raw": "/image.raw",
        "web.roothash": "/protected.roothash",
    }
    for name, rest in links.items():
        (tmp_path / name).symlink_to(f"../../../store/{digest}{rest}")
    assert bundles.slots(str(tmp_path)) == dict.fromkeys(("plain.raw", "web.raw", "alone.raw"), digest)


def copy_accept_and_collect(state: Path, raw: Path) -> None:
    """All that a store does to the disk with a bundle, in one thread."""
    durable._THREADS = 0
    state.mkdir()
    with Store(str(state), 64 * MIB, 32 * MIB, 2) as store:
        with store.using():
            copy = copied(store, candidate(raw))
            layer = Layer("web.raw", "web", "1.4", copy.digest, Kind.IMAGE, str(raw))
            store.accept("web.service", Stack((layer,)), ())
            store.accept("web.service", Stack(), ())
        store.keep_stacks = 1
        store.collect(())


@root
@pytest.mark.limit(600)
def test_killed_before_any_call_there_is_all_of_it_or_nothing(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path))
    state, layers = tmp_path / "state", []
    for number in itertools.count(1):
        shutil.rmtree(state, ignore_errors=True)
        if not killed_before(number, lambda: copy_accept_and_collect(state, raw)):
            break
        if not state.exists():
            continue
        with Store(str(state), 64 * MIB, 32 * MIB, 2) as store:
            for _ in range(2):
                for one in filter(lambda one: len(one.name) == 64, (state / "store").iterdir()):
                    assert store.verify(one.name), number
                slots = state / "units/web.service"
                found = sorted(one.name for one in slots.iterdir()) if slots.exists() else []
                if "web.raw" in found:
                    assert [one for one in found if (slots / one).read_bytes()] == [
                        ".state.json",
                        *sorted(f"web{one}" for one in (".raw", *PARTS)),
                    ]
                stack = store.accepted("web.service")
                store.collect(())
                assert not [one for one in os.listdir(state / "store") if one.startswith(".tmp")], number
            layers.append(None if stack is None else len(stack.layers))
    assert len(layers) > 50
    assert [count for count, _ in itertools.groupby(layers)] == [None, 1, 0]
