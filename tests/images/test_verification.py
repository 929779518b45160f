# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is proved of whole disk images, and that it is proved once: images/verification.py, images/formats/image.py."""

from __future__ import annotations

import random
import tempfile
import uuid
from pathlib import Path

import pytest

from support.disks import SIGNATURE, VERITY, Part, disk
from support.images import confext, image, noise
from support.needs import tool
from support.signed import Key, assembled, make_key, make_tree, padded, protected, sign, signature_json
from watcher.images import hash_tree
from watcher.images.certificates import Keys
from watcher.images.formats.probe import probe
from watcher.images.verification import Proofs, verify
from watcher.model import Incomplete, Later, Protection, Refused, Trust

pytestmark = [tool("mksquashfs"), tool("veritysetup"), tool("openssl")]


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    top = tmp_path_factory.mktemp("squashfs")
    files = {"etc/web.conf": b"x = 1\n", "etc/large": noise(300_000)}
    return image(confext(top / "tree", "web", files), top / "web.raw").read_bytes()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return make_key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def keys(key: Key, tmp_path: Path) -> Keys:
    (tmp_path / "verity.d").mkdir()
    (tmp_path / "verity.d/maker.crt").write_bytes(key.pem)
    return Keys([str(tmp_path / "verity.d")])


def proved(content: bytes, keys: Keys) -> Trust:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content)).verity(file.fileno())
        return Trust() if found is None else verify(found, keys)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_signed_image(squashfs: bytes, key: Key, keys: Keys, sector: int, tmp_path: Path) -> None:
    root_hash = make_tree(padded(squashfs), "--salt", "00").root_hash
    assert proved(protected(squashfs, key, "--salt", "00", sector=sector), keys) == Trust(
        Protection.SIGNED,
        "CN=maker",
        key.fingerprint,
        root_hash.hex(),
        "its hash tree was verified over the store's copy, by the root hash of its signature,"
        f" its signature by {tmp_path}/verity.d/maker.crt",
    )


def test_without_a_signature_the_root_hash_is_in_the_partitions_uuids(squashfs: bytes, keys: Keys) -> None:
    found = proved(protected(squashfs), keys)
    assert (found.protection, found.signer, found.fingerprint, found.remark) == (
        Protection.VERITY,
        "",
        "",
        "",
    )
    assert found.how == (
        "its hash tree was verified over the store's copy, by the root hash of the UUIDs of its partitions (where"
        " systemd 257 and older look for none, and see it as unprotected)"
    )


def test_without_verity_nothing_is_proved(squashfs: bytes, keys: Keys) -> None:
    assert proved(disk(squashfs), keys) == proved(squashfs, keys) == Trust()


def test_a_signature_by_a_stranger_proves_no_more_than_the_tree(
    squashfs: bytes, keys: Keys, tmp_path: Path
) -> None:
    found = proved(protected(squashfs, make_key(tmp_path, "stranger")), keys)
    assert (found.protection, found.signer, found.fingerprint) == (Protection.VERITY, "", "")
    assert found.remark.startswith("signed by an unknown key")


def test_one_flipped_bit_anywhere_is_refused_or_is_in_what_nobody_reads(
    squashfs: bytes, key: Key, keys: Keys
) -> None:
    content = protected(squashfs, key)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content))
    assert found.brought is not None and found.brought.signature is not None
    rng = random.Random(3)
    data = range(found.offset, found.offset + found.size)
    tree = range(found.brought.offset + 4096, found.brought.offset + found.brought.size)
    for offset in [*rng.sample(data, 20), *rng.sample(tree, 10), data[-1], tree[0]]:
        changed = bytearray(content)
        changed[offset] ^= 1 << rng.randrange(8)
        with pytest.raises(Refused):
            proved(bytes(changed), keys)


def test_a_signature_of_another_image(squashfs: bytes, key: Key, keys: Keys) -> None:
    data = padded(squashfs)
    tree, other = make_tree(data), make_tree(data)
    for root_hash in (tree.root_hash, other.root_hash):
        content = assembled(data, tree, signature_json(other.root_hash, sign(root_hash, key)))
        with pytest.raises(
            Refused, match=r"^its root hash is not that of its hash tree: they are of different"
        ):
            proved(content, keys)
    found = proved(assembled(data, tree, signature_json(tree.root_hash, sign(other.root_hash, key))), keys)
    assert found.protection is Protection.VERITY
    assert found.remark == "its signature is not of its root hash: it is of another image, or damaged"


def test_uuids_that_are_not_its_root_hash(squashfs: bytes, keys: Keys) -> None:
    tree = make_tree(padded(squashfs))
    made = Part(tree.content, VERITY, "verity", id=uuid.UUID(int=7))
    with pytest.raises(Refused, match="its root hash is not that of its hash tree"):
        proved(disk(padded(squashfs), made), keys)


def test_a_signature_partition_that_systemd_would_not_read(squashfs: bytes, keys: Keys) -> None:
    tree = Part(make_tree(padded(squashfs)).content, VERITY, "verity")
    with pytest.raises(Refused, match=r"^its signature partition has 4194816 bytes, 4194304 is the limit"):
        proved(disk(padded(squashfs), tree, Part(b"{}".ljust((4 << 20) + 512, b"\0"), SIGNATURE, "s")), keys)
    with pytest.raises(Refused, match=r"^its signature partition is no JSON object"):
        proved(disk(padded(squashfs), tree, Part(b"{}".ljust(4 << 20, b"\0"), SIGNATURE, "s")), keys)


def test_a_file_system_that_goes_on_behind_its_tree_is_refused(squashfs: bytes, keys: Keys) -> None:
    """What the tree does not cover is proved by nothing, and must not be mounted."""
    data = padded(squashfs)
    tree = make_tree(data, "--data-blocks", len(data) // 4096 - 1)
    with pytest.raises(
        Refused, match=r"^its root partition \(number 1\): incomplete: \d+ of \d+ bytes"
    ) as refused:
        proved(assembled(data, tree), keys)
    assert not isinstance(refused.value, Incomplete)


def test_what_lies_behind_the_data_of_the_tree_is_not_mounted(squashfs: bytes, keys: Keys) -> None:
    data = padded(squashfs)
    tree = make_tree(data)
    content = assembled(data + noise(8192), tree)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        assert probe(file.fileno(), len(content)).size == len(data)
    assert proved(content, keys).protection is Protection.VERITY


# --- remembered ---


def test_all_is_read_once_and_the_signature_again_with_other_certificates(
    squashfs: bytes, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = protected(squashfs, key)
    proofs = Proofs(Keys([str(tmp_path)]))
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content)).verity(file.fileno())
        assert found is not None
        assert proofs.trust("d", found).remark == (
            "signed by an unknown key (the certificate that it brings itself does not count: CN=maker), as there is no"
            " certificate in verity.d"
        )
        monkeypatch.setattr(hash_tree, "verify", pytest.fail)
        (tmp_path / "maker.crt").write_bytes(key.pem)
        assert proofs.trust("d", found).protection is Protection.SIGNED
        monkeypatch.setattr("watcher.images.openssl.run", pytest.fail)
        assert proofs.trust("d", found).signer == "CN=maker"
        (tmp_path / "maker.crt").unlink()
        monkeypatch.undo()
        assert proofs.trust("d", found).protection is Protection.VERITY


def test_a_damaged_one_is_read_once_too(
    squashfs: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(protected(squashfs))
    content[60_000] ^= 1
    proofs = Proofs(Keys([str(tmp_path)]))
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content)).verity(file.fileno())
        assert found is not None
        for _ in range(2):
            with pytest.raises(Refused, match="its file system is damaged at byte"):
                proofs.trust("d", found)
            monkeypatch.setattr(hash_tree, "verify", pytest.fail)
        monkeypatch.undo()
        proofs.forget(("d",))
        with pytest.raises(Refused, match="its file system is damaged at byte"):
            proofs.trust("d", found)


def test_what_the_machine_lacks_is_not_remembered(
    squashfs: bytes, key: Key, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = protected(squashfs, key)
    proofs = Proofs(keys)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content)).verity(file.fileno())
        assert found is not None
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(Later, match="openssl is not installed"):
            proofs.trust("d", found)
        monkeypatch.undo()
        assert proofs.trust("d", found).protection is Protection.SIGNED


def test_verity_data_without_any_root_hash_proves_nothing(squashfs: bytes, keys: Keys) -> None:
    with tempfile.TemporaryFile() as file:
        content = protected(squashfs)
        file.write(content)
        file.flush()
        found = probe(file.fileno(), len(content)).verity(file.fileno())
        assert found is not None
        with pytest.raises(Refused, match="it has verity data and no root hash"):
            verify(found._replace(root_hash=None), keys)
