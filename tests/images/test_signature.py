# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signatures made by openssl, right and wrong in each way: of images/signature.py and images/openssl.py.

What is refused is what systemd could not start a service with. For the rest it is told why it proves nothing.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.needs import tool
from support.signed import Key, make_key, openssl, sign, signature_json
from watcher.images import openssl as openssl_module
from watcher.images.certificates import Keys, Ring
from watcher.images.signature import SIGNATURE_MAX, Signer, parse, require_form, signer
from watcher.model import Later, Refused

pytestmark = tool("openssl")

ROOT_HASH = bytes(range(32))


class Known(NamedTuple):
    """A key that is trusted, one that is not, and the ring with the first (and one more)."""

    key: Key
    stranger: Key
    ring: Ring


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    directory = tmp_path_factory.mktemp("keys")
    verity_d = directory / "verity.d"
    verity_d.mkdir()
    key = make_key(directory, "maker")
    (verity_d / "maker.crt").write_bytes(key.pem)
    (verity_d / "another.crt").write_bytes(make_key(directory, "another").pem)
    return Known(key, make_key(directory, "stranger"), Keys([str(verity_d)]).ring())


def judged(signature: bytes, known: Known, root_hash: bytes = ROOT_HASH) -> Signer:
    require_form(signature)
    return signer(signature, root_hash, known.ring)


@pytest.mark.parametrize(
    "options", [(), ("-nocerts",), ("-md", "sha512"), ("-nodetach",), ("-outform", "DER")], ids=" ".join
)
def test_the_signer_is_found(known: Known, options: tuple[str, ...]) -> None:
    found = judged(sign(ROOT_HASH, known.key, *options), known)
    assert found.remark == ""
    assert found.certificate is not None
    assert (found.certificate.subject, found.certificate.fingerprint) == ("CN=maker", known.key.fingerprint)


def test_an_expired_certificate_is_one_as_it_is_for_systemd(known: Known, tmp_path: Path) -> None:
    old = make_key(tmp_path, "old", days=-1)
    (tmp_path / "verity.d").mkdir()
    (tmp_path / "verity.d/old.crt").write_bytes(old.pem)
    found = signer(sign(ROOT_HASH, old), ROOT_HASH, Keys([str(tmp_path / "verity.d")]).ring())
    assert found.certificate is not None and found.certificate.subject == "CN=old"


def test_an_unknown_signer(known: Known) -> None:
    found = judged(sign(ROOT_HASH, known.stranger, "-nocerts"), known)
    assert found == Signer(None, "signed by an unknown key")


def test_a_certificate_that_comes_with_it_does_not_count(known: Known) -> None:
    found = judged(sign(ROOT_HASH, known.stranger), known)
    assert found == Signer(
        None, "signed by an unknown key (the certificate that it brings itself does not count: CN=stranger)"
    )


def test_where_no_certificate_is_trusted_that_is_said(known: Known) -> None:
    found = signer(sign(ROOT_HASH, known.key, "-nocerts"), ROOT_HASH, Ring((), ""))
    assert found.remark == "signed by an unknown key, as there is no certificate in verity.d"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            ROOT_HASH.hex() + "\n",
            r"of the root hash with a newline at its end: sign it without \(printf %s\)",
        ),
        (ROOT_HASH.hex().upper(), "of the root hash in upper case: sign it in lower case"),
        (bytes(32).hex(), "not of its root hash: it is of another image, or damaged"),
        ("", "not of its root hash"),
    ],
)
def test_other_content_than_its_root_hash(known: Known, content: str, words: str) -> None:
    found = judged(sign(ROOT_HASH, known.key, content=content.encode()), known)
    assert found.certificate is None
    assert re.match(f"its signature is {words}", found.remark)


def test_the_bytes_of_the_root_hash(known: Known) -> None:
    found = judged(sign(ROOT_HASH, known.key, content=ROOT_HASH), known)
    assert "of the root hash as bytes: sign its hexadecimal digits" in found.remark


def test_a_flipped_bit_anywhere_proves_nothing(known: Known) -> None:
    good = sign(ROOT_HASH, known.key, "-nocerts")
    for offset in range(0, len(good), 23):
        changed = bytearray(good)
        changed[offset] ^= 1 << offset % 8
        try:
            found = judged(bytes(changed), known)
        except Refused as refused:
            assert str(refused).startswith("its signature ")
        else:
            assert found.certificate is None or _means_the_same(bytes(changed), good), offset
            assert bool(found.remark) == (found.certificate is None)


def _means_the_same(changed: bytes, good: bytes) -> bool:
    """A bit in a version or in an algorithm's name may not matter: the signature itself is as it was."""
    return changed[-256:] == good[-256:]


def test_a_signer_by_key_id_which_systemd_cannot_read(known: Known) -> None:
    with pytest.raises(
        Refused, match=r"^its signature names its signer by a key id .CMS., which systemd cannot read"
    ):
        judged(sign(ROOT_HASH, known.key, "-keyid", program="cms"), known)


def test_encrypted_is_not_signed(known: Known) -> None:
    made = openssl("smime", "-encrypt", "-binary", "-outform", "DER", known.key.certificate, stdin=b"x")
    assert judged(made, known).remark == "its signature does not check out: wrong content type"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda good: b"", "^its signature is empty$"),
        (lambda good: good + b"x", "^its signature has 1 bytes behind its end$"),
        (lambda good: good[:-1], r"^its signature is cut off: \d+ of \d+ bytes are here$"),
        (lambda good: good[:1], "is not PKCS#7 in DER"),
        (lambda good: good[:3], "is cut off: 3 of"),
        (lambda good: b"hello", "is not PKCS#7 in DER"),
        (lambda good: b"0\x03\x02\x01\x01", "is not PKCS#7 in DER"),
        (lambda good: b"0\x00", "is not PKCS#7 in DER"),
        (lambda good: b"0\x80" + bytes(50), "is not PKCS#7 in DER"),
        (lambda good: b"0\xff" + b"\xff" * 200, "is cut off"),
        (lambda good: b"-----BEGIN PKCS7-----\n", "is PEM and has to be DER"),
        (lambda good: b"0" * (SIGNATURE_MAX + 1), "has 65537 bytes, 65536 is the limit"),
    ],
)
def test_what_is_no_signature_at_all(known: Known, change: object, words: str) -> None:
    assert callable(change)
    with pytest.raises(Refused, match=words):
        judged(change(sign(ROOT_HASH, known.key)), known)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 255))
def test_whatever_a_signature_is_there_is_a_verdict(known: Known, rest: bytes, length: int) -> None:
    for content in (
        rest,
        b"0" + bytes([len(rest) % 128]) + rest[: len(rest) % 128],
        bytes([0x30, length]) + rest,
    ):
        try:
            found = judged(content, known)
        except Refused as refused:
            assert str(refused).isprintable()
        else:
            assert found.certificate is None and found.remark.isprintable()


# --- openssl ---


def test_without_openssl_it_has_to_wait(
    known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = sign(ROOT_HASH, known.key)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Later, match=r"^signed, and the program openssl is not installed \(package openssl\)"):
        judged(made, known)


def test_an_openssl_that_hangs_is_waited_for_once(
    known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A look may have many images with signatures to read, and each service has a look of its own."""
    made = sign(ROOT_HASH, known.key)
    program, called = tmp_path / "openssl", tmp_path / "called"
    program.write_text(f"#!/bin/sh\necho >>{called}\nexec /bin/sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(openssl_module, "_silence", [])
    monkeypatch.setattr(openssl_module, "_TIMEOUT_SEC", 0.5)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        for said in ("is something wrong with this machine", "it is tried again in a minute", "in a minute"):
            with pytest.raises(
                Later, match=f"^openssl, which verifies signatures, has given no answer.*{said}"
            ):
                judged(made, known)
        assert called.read_text() == "\n"
    monkeypatch.setattr(openssl_module, "_PAUSE_SEC", 0)
    assert judged(made, known).certificate is not None
    monkeypatch.setattr(openssl_module, "_PAUSE_SEC", 60)
    assert judged(made, known).certificate is not None, "it has answered since"


@pytest.mark.parametrize(
    ("script", "words"),
    [("kill -KILL $$", "SIGKILL"), ("exit 127", "status 127"), ("exit 126", "status 126")],
)
def test_an_openssl_that_cannot_run_says_nothing_of_signatures_and_certificates(
    known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    """Killed for want of memory, or a library of it is just being replaced: what it would say is not made up."""
    made = sign(ROOT_HASH, known.key)
    program = tmp_path / "openssl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (tmp_path / "maker.crt").write_bytes(known.key.pem)
    keys = Keys([str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(Later, match=f"^openssl .*{words}: its signature cannot be verified$"):
            judged(made, known)
        with pytest.raises(Later, match=words):
            keys.ring()
    assert [one.subject for one in keys.ring().certificates] == ["CN=maker"]


# --- the signature partition ---

SIGNED = signature_json(ROOT_HASH, b"0\x00")


def test_what_a_signature_partition_says(known: Known) -> None:
    made = sign(ROOT_HASH, known.key)
    found = parse(signature_json(ROOT_HASH, made).ljust(16384, b"\0"))
    assert found == (ROOT_HASH, made)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (bytes(5000), "is empty"),
        (b"{}", "is no JSON object with rootHash and signature"),
        (b"[1]", "is no JSON object"),
        (b'"rootHash signature"', "is no JSON object"),
        (b"\xff", "is no JSON object"),
        (SIGNED + b"\0x", "is no JSON object"),
        (SIGNED + b"x", "is no JSON object"),
        (SIGNED[:-1], "is no JSON object"),
        (SIGNED.replace(b"0001", b"x001"), "is no JSON object"),
        (SIGNED.replace(b"MAA=", b"MA"), "is no JSON object"),
        (SIGNED.replace(b"MAA=", b""), "has an empty rootHash or signature"),
        (SIGNED.replace(ROOT_HASH.hex().encode(), b""), "has an empty rootHash or signature"),
        (SIGNED.replace(ROOT_HASH.hex().encode(), b"00" * 15), "has a rootHash of 15 bytes"),
        (b'{"rootHash": 1, "signature": "MAA="}', "is no JSON object"),
        (b'{"rootHash": null, "signature": "MAA="}', "is no JSON object"),
        (b"[" * 60_000, "is no JSON object"),
        (b"9" * 60_000, "is no JSON object"),
        (SIGNED[:-1] + b', "rootHash": "' + b"00" * 32 + b'"}', "has rootHash twice"),
        (b'{"signature": "MAA=", ' + SIGNED[1:], "has signature twice"),
        (SIGNED + b" " * (5 << 20), r"has \d+ bytes, 65536 is the limit"),
    ],
)
def test_a_signature_partition_with_which_systemd_would_not_start_is_refused(
    content: bytes, reason: str
) -> None:
    with pytest.raises(Refused, match=f"^its signature partition {reason}"):
        parse(content)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([ROOT_HASH.hex(), "MAA="]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["rootHash", "signature", "x"]), inner),
    max_leaves=8,
)


@given(_json.map(json.dumps).map(str.encode) | st.binary(max_size=200), st.integers(0, 8))
def test_whatever_a_signature_partition_says_there_is_a_verdict(content: bytes, padding: int) -> None:
    try:
        found = parse(content + bytes(padding))
    except Refused as refused:
        assert str(refused).isprintable()
    else:
        said = json.loads(content.rstrip(b"\0"))
        assert found.root_hash.hex() == "".join(said["rootHash"].split()).lower()
        assert base64.b64encode(found.signature).decode() == said["signature"]
