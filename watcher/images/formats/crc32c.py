# SPDX-License-Identifier: LGPL-2.1-or-later
"""CRC-32C (Castagnoli), the checksum in superblocks. zlib has another polynomial, and a library is not worth 4 KiB."""

from __future__ import annotations


def crc32c(data: bytes) -> int:
    """As the kernel's crc32c(~0, data): not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _table()
