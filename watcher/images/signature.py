# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signature of a root hash: what the signature partition of a disk image says, and whose it is.

What is signed are the hexadecimal digits of the root hash in lower case, without a newline: PKCS#7, detached. systemd
calls PKCS7_verify() with PKCS7_NOINTERN and PKCS7_NOVERIFY, and so does `openssl smime` as it is called here. Not
`openssl cms`: that takes a signer by key id, which systemd cannot even parse. Never without `-nointern`: a certificate
that the image brings itself would do.
"""

from __future__ import annotations

import base64
import json
from typing import NamedTuple

from watcher.images import openssl
from watcher.images.certificates import Certificate, Ring, certificate
from watcher.model import Refused, shown

PARTITION_MAX = 4 << 20
"""Bytes. systemd refuses a signature partition that is larger."""
SIGNATURE_MAX = 64 << 10
"""Bytes of a signature, or of the JSON around it. systemd-repart writes 3 KiB; systemd reads 4 MiB."""
_HASH_MIN = 16
_SUBJECT_MAX = 100

# SEQUENCE, and the lengths of DER: short, long, and the indefinite one of BER.
_SEQUENCE = 0x30
_LONG = 0x80


class Signed(NamedTuple):
    """
    Attributes:
        root_hash: what the signature is said to be made for.
        signature: PKCS#7, DER.
    """

    root_hash: bytes
    signature: bytes


class Signer(NamedTuple):
    """Who has signed.

    Attributes:
        certificate: of the ring, None where it is none of these.
        remark: why not, "" otherwise.
    """

    certificate: Certificate | None
    remark: str = ""


def parse(content: bytes) -> Signed:
    """The content of a signature partition, by the rules of dissected_image_load_verity_sig_partition().

    Raises:
        Refused: with it systemd would not start a service.
    """
    text = content.rstrip(b"\0")
    if len(text) > SIGNATURE_MAX:
        raise Refused(f"its signature partition has {len(text)} bytes, {SIGNATURE_MAX} is the limit")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once)
        hash, signature = found["rootHash"], found["signature"]
        made = Signed(bytes.fromhex(hash), base64.b64decode(signature, validate=True))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "is empty" if not text else "is no JSON object with rootHash and signature"
        raise Refused(f"its signature partition {reason}") from error
    if not made.root_hash or not made.signature:
        raise Refused("its signature partition has an empty rootHash or signature")
    if len(made.root_hash) < _HASH_MIN:
        raise Refused(f"its signature partition has a rootHash of {len(made.root_hash)} bytes")
    require_form(made.signature)
    return made


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object, of which systemd takes the first of what is there twice, and Python the last. Raises Refused."""
    names = [name for name, _ in pairs]
    for name in ("rootHash", "signature"):
        if names.count(name) > 1:
            raise Refused(f"its signature partition has {name} twice")
    return dict(pairs)


def require_form(signature: bytes) -> None:
    """Refuse what is not one DER object, as far as its first bytes tell. Raises Refused."""
    if not signature:
        raise Refused("its signature is empty")
    if len(signature) > SIGNATURE_MAX:
        raise Refused(f"its signature has {len(signature)} bytes, {SIGNATURE_MAX} is the limit")
    if signature.startswith(b"-----BEGIN"):
        raise Refused("its signature is PEM and has to be DER: openssl smime -sign -outform DER")
    if signature[0] != _SEQUENCE or len(signature) < 2:
        raise Refused("its signature is not PKCS#7 in DER")
    length, header = signature[1], 2
    if length == _LONG:
        return
    if length > _LONG:
        header += length - _LONG
        length = int.from_bytes(signature[2:header], "big")
    if len(signature) < header + length:
        raise Refused(f"its signature is cut off: {len(signature)} of {header + length} bytes are here")
    if trailing := len(signature) - header - length:
        raise Refused(f"its signature has {trailing} bytes behind its end")


def signer(signature: bytes, root_hash: bytes, ring: Ring) -> Signer:
    """Whose signature it is. Blocks while openssl runs.

    Raises:
        Refused: it is none that systemd could read.
        Later: openssl is missing, or gives no answer.
    """
    content = root_hash.hex().encode()
    done = _smime(signature, content, ring)
    if done.status == 0:
        # A signature may have several signers, which then are all in the ring; the first stands for them.
        found = certificate(done.output)
        for one in ring.certificates:
            if found is not None and one.fingerprint == found.fingerprint:
                return Signer(one)
        return Signer(None, "signed by nobody: its signature has no signer")
    if "Error reading S/MIME message" in done.errors:
        raise Refused(_unreadable(signature))
    if "signer certificate not found" in done.errors:
        return Signer(None, _unknown(signature, ring))
    if (
        "bad signature" in done.errors
        or "signature failure" in done.errors
        or "digest failure" in done.errors
    ):
        return Signer(None, _other_content(signature, content, ring))
    return Signer(None, f"its signature does not check out: {_reason(done.errors)}")


def _smime(signature: bytes, content: bytes, ring: Ring) -> openssl.Done:
    words = ["smime", "-verify", "-binary", "-inform", "DER", "-in", "{signature}", "-content", "{content}"]
    contents = {"signature": signature, "content": content}
    if ring.certificates:
        words += ["-certfile", "{ring}"]
        contents["ring"] = ring.pem
    words += ["-nointern", "-noverify", "-out", "/dev/null", "-signer", "/dev/stdout"]
    return openssl.run(*words, **contents)


def _unreadable(signature: bytes) -> str:
    """Why systemd cannot read it. `openssl cms` can read more."""
    done = openssl.run(
        "cms", "-cmsout", "-noout", "-inform", "DER", "-in", "{signature}", signature=signature
    )
    if done.status == 0:
        return (
            "its signature names its signer by a key id (CMS), which systemd cannot read: sign with openssl smime, or"
            " without -keyid"
        )
    return "its signature is not PKCS#7 in DER"


def _unknown(signature: bytes, ring: Ring) -> str:
    done = openssl.run(
        "pkcs7", "-inform", "DER", "-in", "{signature}", "-print_certs", signature=signature
    )  # fmt: skip
    brought = certificate(done.output)
    if brought is None:
        claim = ""
    else:
        subject = (
            brought.subject
            if len(brought.subject) <= _SUBJECT_MAX
            else brought.subject[:_SUBJECT_MAX] + "..."
        )
        claim = f" (the certificate that it brings itself does not count: {shown(subject)})"
    there = "" if ring.certificates else ", as there is no certificate in verity.d"
    return f"signed by an unknown key{claim}{there}"


def _other_content(signature: bytes, content: bytes, ring: Ring) -> str:
    """What a key of the ring has signed, if that is a usual mistake."""
    for other, mistake in (
        (content + b"\n", "with a newline at its end: sign it without (printf %s)"),
        (content.upper(), "in upper case: sign it in lower case"),
        (bytes.fromhex(content.decode()), "as bytes: sign its hexadecimal digits in lower case"),
    ):
        if _smime(signature, other, ring).status == 0:
            return f"its signature is of the root hash {mistake}"
    return "its signature is not of its root hash: it is of another image, or damaged"


def _reason(errors: str) -> str:
    """The last reason that openssl gives, "wrong content type"; it is after the fifth colon."""
    reasons = [parts[5] for line in errors.splitlines() if len(parts := line.split(":")) > 5]
    return shown(reasons[-1]) if reasons else "openssl gives no reason"
