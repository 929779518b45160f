# SPDX-License-Identifier: LGPL-2.1-or-later
"""Certificates are found where systemd finds them (verity.d): each there is trusted, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.needs import tool
from support.signed import Key, make_key
from watcher.images.certificates import DIRECTORIES, Keys, certificate
from watcher.model import Later
from watcher.records import journal

pytestmark = tool("openssl")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Key]:
    directory = tmp_path_factory.mktemp("keys")
    return [make_key(directory, name) for name in ("one", "two", "three")]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(journal.log, "warning", lines.append)
    return lines


def fingerprints(keys: Keys) -> list[str]:
    return [one.fingerprint for one in keys.ring().certificates]


def test_they_lie_where_systemd_looks() -> None:
    assert DIRECTORIES == ("/etc/verity.d", "/run/verity.d", "/usr/local/lib/verity.d", "/usr/lib/verity.d")


def test_an_earlier_directory_hides_or_masks_a_name_of_a_later_one(
    keys: list[Key], tmp_path: Path, said: list[str]
) -> None:
    one, two, three = keys
    etc, run, lib = (tmp_path / name for name in ("etc", "run", "lib"))
    etc.mkdir()
    lib.mkdir()
    (lib / "b.crt").write_bytes(one.pem)
    (lib / "a.crt").write_bytes(two.pem)
    (lib / "empty.crt").write_bytes(three.pem)
    (lib / "null.crt").write_bytes(three.pem)
    (lib / "other.pem").write_bytes(three.pem)
    (etc / "b.crt").write_bytes(three.pem)
    (etc / "empty.crt").touch()
    (etc / "null.crt").symlink_to("/dev/null")
    found = Keys([str(etc), str(run), str(lib)])  # there is no `run`
    assert fingerprints(found) == [two.fingerprint, three.fingerprint]  # by name
    assert said == []


def test_a_change_is_noticed_and_no_change_reads_nothing(
    keys: list[Key], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, _ = keys
    found = Keys([str(tmp_path)])
    assert fingerprints(found) == []
    (tmp_path / "a.crt").write_bytes(one.pem)
    assert fingerprints(found) == [one.fingerprint]
    before = found.ring().id
    monkeypatch.setattr("watcher.images.openssl.run", pytest.fail)
    assert found.ring().id == before
    monkeypatch.undo()
    os.utime(tmp_path / "a.crt")
    assert found.ring().id == before  # another time, and the same certificate
    (tmp_path / "a.crt").write_bytes(two.pem)
    assert fingerprints(found) == [two.fingerprint]
    assert found.ring().id != before
    (tmp_path / "a.crt").unlink()
    assert fingerprints(found) == []


def test_what_cannot_be_read_counts_for_nothing_and_is_said_once(
    keys: list[Key], tmp_path: Path, said: list[str]
) -> None:
    bad = keys[0].pem.replace(b"M", b"N", 1)
    for name, content in (("text", b"hello\n"), ("bad", bad), ("key", keys[0].private.read_bytes())):
        (tmp_path / f"{name}.crt").write_bytes(content)
    (tmp_path / "nowhere.crt").symlink_to("missing")
    (tmp_path / "directory.crt").mkdir()
    os.mkfifo(tmp_path / "fifo.crt")
    (tmp_path / "good.crt").write_bytes(b"a comment\n" + keys[0].pem + keys[1].pem)
    found = Keys([str(tmp_path)])
    for _ in range(2):
        assert fingerprints(found) == [keys[0].fingerprint]  # the first in a file, as for systemd
        os.utime(tmp_path / "good.crt")
    assert sorted(said) == [
        f"{tmp_path}/bad.crt: no certificate in PEM, so nothing is trusted by it",
        f"{tmp_path}/key.crt: no certificate in PEM, so nothing is trusted by it",
        f"{tmp_path}/nowhere.crt: no certificate: No such file or directory",
        f"{tmp_path}/text.crt: no certificate in PEM, so nothing is trusted by it",
    ]


def test_a_subject_is_one_line_for_people(tmp_path: Path) -> None:
    made = make_key(tmp_path, subject="/C=DE/O=Müller, Söhne/CN=a\nb=c")
    found = certificate(made.pem, "/x")
    assert found is not None and found.path == "/x" and found.fingerprint == made.fingerprint
    assert found.subject == r"C=DE, O=Müller\, Söhne, CN=a\0Ab=c"


def test_without_openssl_it_has_to_wait(
    keys: list[Key], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.crt").write_bytes(keys[0].pem)
    found = Keys([str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Later, match=r"the program openssl is not installed \(package openssl\)"):
        found.ring()
    monkeypatch.undo()
    assert fingerprints(found) == [keys[0].fingerprint]
