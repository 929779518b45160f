# SPDX-License-Identifier: LGPL-2.1-or-later
"""The certificates whose keys may sign images: `verity.d/*.crt`, where systemd looks for them, too.

As in systemd (conf_files_list() with CONF_FILES_REGULAR and CONF_FILES_FILTER_MASKED; PEM_read_X509()) there is one
certificate (PEM) in a file. A name in an earlier directory hides the same name in later ones; an empty file or a link
to /dev/null masks it. A file that cannot be read counts for nothing, which is said once.

That a certificate lies there is all that makes it trusted, as for systemd: neither chain nor purpose is looked at, nor
the time that it is made for.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from watcher.images import openssl
from watcher.images.files import stat_key
from watcher.model import printable, shown
from watcher.records import journal

DIRECTORIES = tuple(f"{top}/verity.d" for top in ("/etc", "/run", "/usr/local/lib", "/usr/lib"))
_SUFFIX = ".crt"
_SIZE_MAX = 1 << 20
"""Bytes of a certificate's file."""
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s*?\n([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")
# As `openssl x509` prints names, and for people: one line, UTF-8 as it is, all else that is special escaped.
_NAME_OPTIONS = "esc_2253,esc_ctrl,utf8,dump_nostr,dump_der,sep_comma_plus_space,sname"


class Certificate(NamedTuple):
    """
    Attributes:
        path: of its file, "" for one that is not from a file.
        pem: it alone, in PEM.
        fingerprint: SHA-256 of its DER, 64 hexadecimal digits.
        subject: for people, on one line.
    """

    path: str
    pem: bytes
    fingerprint: str
    subject: str


class Ring(NamedTuple):
    """
    Attributes:
        certificates: in the order in which systemd looks at them.
        id: stands for which certificates there are, and their order.
    """

    certificates: tuple[Certificate, ...]
    id: str

    @property
    def pem(self) -> bytes:
        """All of them, for `-certfile`."""
        return b"".join(one.pem for one in self.certificates)


class Keys:
    """The certificates of a host. Threads may share it.

    Args:
        directories: highest precedence first; they need not exist.
    """

    def __init__(self, directories: Sequence[str] = DIRECTORIES) -> None:
        self._directories = tuple(directories)
        self._lock = threading.Lock()
        self._seen: object = None
        self._ring = Ring((), "")
        self._said: set[str] = set()

    def ring(self) -> Ring:
        """All certificates, read anew where one has changed, come or gone. That costs a few `stat` otherwise.

        Raises:
            Later: openssl, which reads them, is missing.
        """
        with self._lock:
            found = tuple(self._files())
            if found != self._seen:
                certificates = tuple(one for path, _ in found if (one := self._certificate(path)))
                whole = "".join(one.fingerprint for one in certificates)
                self._ring = Ring(certificates, hashlib.sha256(whole.encode()).hexdigest())
                self._seen = found
            return self._ring

    def _files(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The files that count, by name, each with its `stat_key()`."""
        paths: dict[str, str] = {}
        for directory in self._directories:
            try:
                names = os.listdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._say(directory, f"cannot be read, so no certificate there counts: {error.strerror}")
                continue
            for name in names:
                if name.endswith(_SUFFIX) and not name.startswith("."):
                    paths.setdefault(name, f"{directory}/{name}")
        for _, path in sorted(paths.items(), key=lambda pair: os.fsencode(pair[0])):
            try:
                found = os.stat(path)
            except OSError as error:
                self._say(path, f"no certificate: {error.strerror}")
                continue
            if stat.S_ISREG(found.st_mode) and found.st_size:
                yield path, stat_key(found)

    def _certificate(self, path: str) -> Certificate | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                found = certificate(file.read(_SIZE_MAX), path)
        except OSError as error:
            self._say(path, f"a certificate that cannot be read: {error.strerror}")
            return None
        if found is None:
            self._say(path, "no certificate in PEM, so nothing is trusted by it")
        return found

    def _say(self, path: str, text: str) -> None:
        line = f"{shown(path)}: {text}"
        if line not in self._said:
            self._said.add(line)
            journal.log.warning(line)


def certificate(content: bytes, path: str = "") -> Certificate | None:
    """The first certificate in a text, None without a good one. Blocks. Raises Later as `openssl.run()`."""
    match = _PEM.search(content)
    if match is None:
        return None
    try:
        der = base64.b64decode(match[1])
    except ValueError:
        return None
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
    done = openssl.run(
        "x509", "-in", "{pem}", "-noout", "-subject", "-nameopt", _NAME_OPTIONS, pem=pem
    )  # fmt: skip
    if done.status:
        return None
    subject = done.output.decode(errors="replace").strip().removeprefix("subject=").strip()
    return Certificate(path, pem, hashlib.sha256(der).hexdigest(), printable(subject))
