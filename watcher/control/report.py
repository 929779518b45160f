# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report of `plan --debug`: all that a look has found, and the step that it comes to.

It is for a bug report. `tests/support/from_report.py` reads it and makes a test of it.
"""

from __future__ import annotations

import json

from watcher import __version__
from watcher.records.schema import to_dict
from watcher.rounds.decide import Step
from watcher.rounds.facts import Facts


def report(service: str, facts: Facts, step: Step) -> str:
    """A JSON object, indented, in ASCII: `program`, `service`, `step` (by the name of its class) and `facts`.

    Names that are not UTF-8 are in it exactly: JSON escapes their surrogates.
    """
    content = {
        "program": f"confext-watcher {__version__}",
        "service": service,
        "step": {type(step).__name__: to_dict(step, text=str)},
        "facts": to_dict(facts, text=str),
    }
    return json.dumps(content, indent=2)
