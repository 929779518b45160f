# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher check`: would an image be admitted here?"""

from __future__ import annotations

import argparse

from watcher.cli import show
from watcher.cli.answers import answer, meant
from watcher.images.image_check import Examined, examine
from watcher.images.made_for import Host, host
from watcher.model import Busy, Refused
from watcher.records.schema import ExitStatus, to_dict
from watcher.settings.config import Settings


def run(settings: Settings, options: argparse.Namespace) -> ExitStatus:
    made_for = host()
    results = [_checked(path, made_for, settings.image_max) for path in options.images]
    answer(options, {"images": results}, show.checked(results))
    return ExitStatus.DONE if all(result["admitted"] for result in results) else ExitStatus.FAILED


def _checked(path: str, made_for: Host, image_max: int) -> dict[str, object]:
    result: dict[str, object] = {"image": path, "admitted": False, "reason": ""}
    try:
        return result | described(examine(path, made_for, image_max))
    except (Refused, Busy) as error:
        return result | {"reason": str(error)}
    except OSError as error:
        return result | {"reason": (error.strerror or str(error)) + meant(path)}


def described(examined: Examined) -> dict[str, object]:
    """What is printed of an image that is good."""
    candidate, copy, trust, effects = examined
    return {
        "admitted": True,
        "name": candidate.name,
        "version": candidate.version,
        "format": copy.format.name if copy.format else "directory",
        "size": copy.size,
        "digest": copy.digest,
        "trust": to_dict(trust),
        "effects": effects,
    }
