# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd itself says (262, of policies also 257): thousands of generated questions with the real tools' answers.

`make oracle` asks again (root and a network, or root file systems with systemd needed), the tests only read.
Each file is JSON, one value a line, compressed: first who answered, then the cases. Names that are not UTF-8 are there
as Python has them, with surrogates.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEAST = 10_000
"""Cases in each file."""


def path(name: str) -> Path:
    """ "versions", "vpick", "policies" or "policies-257"."""
    return HERE / f"{name}.jsonl.xz"


def load(name: str) -> tuple[dict[str, Any], Iterator[Any]]:
    """Who answered, and the cases one by one."""
    lines = iter(lzma.decompress(path(name).read_bytes()).decode("ascii").splitlines())
    return json.loads(next(lines)), map(json.loads, lines)


def save(name: str, header: dict[str, Any], cases: Iterable[Any]) -> None:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (header, *cases))
    path(name).write_bytes(lzma.compress(text.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))
