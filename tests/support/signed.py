# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that can be verified, by the real tools: hash trees by veritysetup, signatures by openssl."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from support.disks import SIGNATURE, VERITY, Part, disk
from support.needs import which


@dataclass(frozen=True)
class Key:
    """A private key and the certificate of it, in files."""

    private: Path
    certificate: Path

    @property
    def pem(self) -> bytes:
        return self.certificate.read_bytes()

    @property
    def fingerprint(self) -> str:
        """As openssl has it."""
        said = openssl("x509", "-in", self.certificate, "-noout", "-fingerprint", "-sha256").decode()
        return said.partition("=")[2].strip().replace(":", "").lower()


@dataclass(frozen=True)
class Tree:
    """What `veritysetup format` makes: the superblock and the hash tree, and its root hash."""

    content: bytes
    root_hash: bytes


def openssl(*words: object, stdin: bytes = b"") -> bytes:
    return subprocess.run(
        ["openssl", *map(str, words)], input=stdin, check=True, capture_output=True
    ).stdout  # fmt: skip


def veritysetup(*words: object) -> subprocess.CompletedProcess[str]:
    program = which("veritysetup")
    assert program is not None, "veritysetup is missing: mark the test"
    return subprocess.run([program, *map(str, words)], check=False, capture_output=True, text=True)


def make_key(directory: Path, name: str = "maker", subject: str = "", days: int = 9) -> Key:
    """A new key; its certificate is valid for some days, below 0: was."""
    private, certificate = directory / f"{name}.key", directory / f"{name}.crt"
    openssl(
        *("req", "-new", "-x509", "-newkey", "rsa:2048", "-nodes", "-utf8", "-days", max(days, 1)),
        *("-subj", subject or f"/CN={name}", "-keyout", private, "-out", certificate),
    )
    if days < 0:
        made = openssl("x509", "-in", certificate, "-signkey", private, "-days", days)
        certificate.write_bytes(made)
    return Key(private, certificate)


def make_tree(data: bytes, *options: object) -> Tree:
    """The hash tree of some data; `options` for `veritysetup format`."""
    with tempfile.TemporaryDirectory() as directory:
        image, tree = Path(directory, "data"), Path(directory, "tree")
        image.write_bytes(data)
        done = veritysetup("format", image, tree, *options)
        assert done.returncode == 0, done.stderr
        (root,) = (line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash"))
        return Tree(tree.read_bytes(), bytes.fromhex(root))


def sign(
    root_hash: bytes, key: Key, *options: str, content: bytes | None = None, program: str = "smime"
) -> bytes:
    """PKCS#7 in DER over a root hash, as systemd-repart makes it. `content`: sign that instead."""
    words = (
        "-sign",
        "-binary",
        "-noattr",
        "-outform",
        "DER",
        "-signer",
        key.certificate,
        "-inkey",
        key.private,
    )
    return openssl(program, *words, *options, stdin=root_hash.hex().encode() if content is None else content)


def signature_json(root_hash: bytes, signature: bytes) -> bytes:
    """The content of a signature partition."""
    made = {"rootHash": root_hash.hex(), "signature": base64.b64encode(signature).decode()}
    return json.dumps(made).encode()


def padded(content: bytes, size: int = 4096) -> bytes:
    return content.ljust(-(-len(content) // size) * size, b"\0")


def protected(content: bytes, key: Key | None = None, *options: object, sector: int = 512) -> bytes:
    """A disk image with a file system, its hash tree, and a signature where there is a key."""
    content = padded(content)
    tree = make_tree(content, *options)
    signature = None if key is None else signature_json(tree.root_hash, sign(tree.root_hash, key))
    return assembled(content, tree, signature, sector=sector)


def assembled(content: bytes, tree: Tree, signature: bytes | None = None, sector: int = 512) -> bytes:
    """A disk image of what may not belong together."""
    root_id, tree_id = (uuid.UUID(bytes=half) for half in (tree.root_hash[:16], tree.root_hash[-16:]))
    parts = [Part(content, id=root_id), Part(tree.content, VERITY, "verity", id=tree_id)]
    if signature is not None:
        parts.append(replace(Part(signature, SIGNATURE, "signature"), id=uuid.uuid4()))
    return disk(*parts, sector=sector)


@contextmanager
def trusted(key: Key) -> Iterator[None]:
    """This host trusts the key for a while: its certificate lies where the watcher and systemd look for it."""
    directory = Path("/run/verity.d")
    made = directory / f"confext-watcher-test-{os.getpid()}-{key.fingerprint[:8]}.crt"
    directory.mkdir(mode=0o755, exist_ok=True)
    made.write_bytes(key.pem)
    try:
        yield
    finally:
        made.unlink()
