# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run found comes back from its file as it was; nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import result
from bench.report import figure
from bench.result import NoResult, Result

DROP = figure("drop.handler", "rename to handler", "ms", ([3.0, 1.0, 2.0], [0.5], [0.8]), "3 ms")
WAKEUPS = figure("idle.wakeups", "wake-ups", "", ([4], [0]))
SECURITY = figure("exposure", "exposure", "", ([3.1],))
FOUND = Result(
    date="2026-11-29T11:41:00+00:00",
    commit="474653c4cc0b3b5d51b1d7d2a7c7a7a9a7c7a7a9",
    dirty=True,
    quick=False,
    parts={"drops": ("drop.handler",), "idle": ("idle.wakeups", "exposure")},
    machine={"processor": "one", "cores": "2"},
    load=(0.5, 1.5),
    figures={one.key: one for one in (DROP, WAKEUPS, SECURITY)},
)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / FOUND.file_name()
    path.write_text(FOUND.to_json())
    assert result.read(path) == FOUND


def test_the_json_has_each_figure_with_its_floor_and_ratio() -> None:
    found = json.loads(FOUND.to_json())
    assert found["commit"] == FOUND.commit and found["dirty"] is True
    assert found["machine"] == FOUND.machine and found["date"] == FOUND.date
    assert list(found["figures"]) == ["drop.handler", "idle.wakeups", "exposure"]
    assert found["figures"]["drop.handler"] == {
        "what": "rename to handler",
        "unit": "ms",
        "ours": {"count": 3, "median": 2.0, "p99": 3.0},
        "floor": {"count": 1, "median": 0.5, "p99": 0.5},
        "needed": {"count": 1, "median": 0.8, "p99": 0.8},
        "aim": "3 ms",
        "ratio": 4.0,
        "of needed": 2.5,
    }


def test_a_result_from_before_there_was_what_python_needs_is_read() -> None:
    found = json.loads(FOUND.to_json())
    del found["figures"]["drop.handler"]["needed"]
    assert result.parse(json.dumps(found)).figures["drop.handler"].needed is None


def test_there_is_no_ratio_to_nothing() -> None:
    assert WAKEUPS.floor is not None and WAKEUPS.ratio is None
    assert SECURITY.floor is None and SECURITY.ratio is None


def test_the_99th_percentile_is_the_largest_of_few_and_one_below_the_largest_of_a_hundred() -> None:
    assert figure("", "", "", (range(99),)).ours.p99 == 98
    assert figure("", "", "", (range(101),)).ours.p99 == 99


def test_the_file_says_when_and_what_was_measured() -> None:
    assert FOUND.file_name() == "20261129T114100-474653c4cc0b-dirty.json"


def _without(*path: str) -> str:
    found = json.loads(FOUND.to_json())
    place = found
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return json.dumps(found)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"format": "another"}',
        json.dumps(json.loads(FOUND.to_json()) | {"figures": []}),
        json.dumps(json.loads(FOUND.to_json()) | {"figures": {"drop.handler": 1}}),
        json.dumps(json.loads(FOUND.to_json()) | {"load": [1]}),
        json.dumps(json.loads(FOUND.to_json()) | {"machine": None}),
        _without("commit"),
        _without("figures", "drop.handler", "unit"),
        _without("figures", "drop.handler", "ours", "median"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(NoResult) as refused:
        result.read(path)
    assert str(refused.value).startswith(f"{path}: no result of `make bench`: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(content)
    with pytest.raises(NoResult):
        result.read(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoResult, match=r"none\.json: No such file or directory"):
        result.read(tmp_path / "none.json")


def test_the_machine_and_the_commit_are_told() -> None:
    machine = result.machine("ext4 somewhere")
    assert list(machine) == ["processor", "cores", "kernel", "python", "file system"]
    assert all(machine.values())
    commit, dirty = result.commit()
    assert len(commit) in (0, 40) and isinstance(dirty, bool)
