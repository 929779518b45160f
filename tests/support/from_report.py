# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a report of `confext-watcher plan --debug` (control/report.py), and makes a test of it:

    PYTHONPATH=tests .venv/bin/python -m support.from_report FILE

prints a row for the table in tests/rounds/test_decide.py.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support import CHECKOUT
from watcher.records.schema import from_dict
from watcher.rounds import decide
from watcher.rounds.decide import Step
from watcher.rounds.facts import Facts

_STEPS = {step.__name__: step for step in typing.get_args(decide.Step)}


def from_report(text: str) -> tuple[Facts, Step]:
    """What a look had found, and the step that it came to.

    Args:
        text: what `plan --debug` printed, with or without `--json`; other lines may stand before and after it.

    Raises:
        ValueError: there is no such report in it, or one of another version.
    """
    content = _content(text)
    ((name, fields),) = content["step"].items()
    if name not in _STEPS:
        raise ValueError(f"there is no such step: {name}")
    return from_dict(Facts, content["facts"]), from_dict(_STEPS[name], fields)


def row(text: str) -> str:
    """A report as a row of a table of tests: Python code."""
    content, (facts, step) = _content(text), from_report(text)
    comment = f"# {content['program']} came to this step. Is it wrong? Write the right one here."
    made = f"pytest.param(\n{code(facts)},\n{comment}\n{code(step)},\nid={code(content['service'])},\n)"
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "-"]
    done = subprocess.run(ruff, cwd=CHECKOUT, input=made, capture_output=True, text=True, check=True)
    return f"{done.stdout.rstrip()},"


def code(value: Any) -> str:
    """A value as Python code, on one line: data classes by their constructors, without what is the default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(f'{name}={code(item)}' for name, item in _given(value))})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(code, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{code(key)}: {code(item)}' for key, item in value.items())}}}"
    return ascii(value)


def _content(text: str) -> dict[str, Any]:
    """The JSON object of a report."""
    start = re.search(r"^\{", text, re.MULTILINE)
    if start is None:
        raise ValueError("there is no JSON object in it")
    content, _ = json.JSONDecoder().raw_decode(text, start.start())
    if content.get("changes"):  # of `--json`
        content = json.loads(content["changes"][0].get("report") or "{}")
    missing = {"program", "service", "step", "facts"} - content.keys()
    if missing:
        raise ValueError(f"not a report: without {', '.join(sorted(missing))}")
    return dict(content)


def _given(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a data class that are not what they are without being given."""
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or item != default:
            yield field.name, item


def main(words: list[str]) -> int:
    if len(words) != 1:
        print("usage: PYTHONPATH=tests python -m support.from_report FILE", file=sys.stderr)
        return 2
    try:
        print(row(Path(words[0]).read_text(encoding="utf-8", errors="replace")))
    except (OSError, ValueError) as error:
        print(f"{words[0]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
