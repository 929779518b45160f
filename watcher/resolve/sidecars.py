# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files beside an image that it is verified by, as systemd finds them: the image's path without ".raw", and a suffix.

    web_1.4.raw  web_1.4.verity  web_1.4.roothash  web_1.4.roothash.p7s

Pure: by names alone. Of a link, they lie beside the link (verity_settings_load() of systemd). Among versions, counters
do not count: those of an image change with each attempt (tries.py), and its sidecars keep their names.
"""

from __future__ import annotations

VERITY = ".verity"
"""The verity superblock and the hash tree."""
ROOT_HASH = ".roothash"
"""The root hash of that, in hexadecimal digits."""
SIGNATURE = ".roothash.p7s"
"""The signature of the root hash, PKCS#7 in DER."""
SUFFIXES = (VERITY, ROOT_HASH, SIGNATURE)
_IMAGE = ".raw"


def stem(filename: str) -> str:
    """What the names of an image and of its sidecars have in common."""
    return filename.removesuffix(_IMAGE)


def suffix(name: str) -> str:
    """By which suffix a name is that of a sidecar, "" if it is none."""
    return next((one for one in SUFFIXES if name.endswith(one) and name != one), "")


def image_of(name: str) -> str:
    """The name of the image that a sidecar lies beside, "" if it is none."""
    found = suffix(name)
    return name.removesuffix(found) + _IMAGE if found else ""


def names(filename: str) -> tuple[str, ...]:
    """What the sidecars of an image are called, whether they are there or not."""
    return tuple(stem(filename) + one for one in SUFFIXES)


def meant(name: str) -> str:
    """How a sidecar should be called whose name has ".raw" in it ("web.raw.roothash"), "" for all other names.

    systemd never looks at such a file, and so does not verify the image, in silence.
    """
    found = suffix(name)
    inner = name.removesuffix(found) if found else ""
    return stem(inner) + found if inner.endswith(_IMAGE) and inner != _IMAGE else ""
