# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fuzz targets in `make test`: every input that is kept, and a few hundred new ones each."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.steps import TooManySteps, counted
from fuzz.targets import CORPUS, TARGETS, Target, grown

SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
named = pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Words of the target and arbitrary bytes in any order; what is kept, with a piece of it replaced."""
    pieces = st.one_of(st.sampled_from(target.words), st.binary(max_size=8))
    made = st.lists(pieces, max_size=24).map(b"".join)
    kept = [path.read_bytes()[:8192] for path in target.corpus()]
    changed = st.builds(replaced, st.sampled_from(kept), st.integers(0, 8192), st.integers(0, 16), pieces)
    return st.one_of(made, changed)


def replaced(kept: bytes, at: int, length: int, piece: bytes) -> bytes:
    at %= len(kept) + 1
    return kept[:at] + piece + kept[at + length :]


@named
def test_every_input_that_is_kept(target: Target) -> None:
    paths = target.corpus()
    assert paths, f"{target.name} has no corpus: `make fuzz TARGET={target.name}` makes one"
    for path in paths:
        counted(target.run, path.read_bytes())


@named
def test_inputs_made_up(target: Target) -> None:
    @settings(max_examples=100, suppress_health_check=SUPPRESSED)
    @given(inputs(target))
    def run(data: bytes) -> None:
        counted(target.run, data)

    run()


@named
def test_the_work_is_linear(target: Target) -> None:
    """A few bytes over and over: what is quadratic takes many times the steps that are allowed."""

    @settings(max_examples=15, suppress_health_check=SUPPRESSED)
    @given(st.lists(st.sampled_from(target.words), min_size=1, max_size=4).map(b"".join))
    def run(data: bytes) -> None:
        counted(target.run, grown(data))

    run()


def test_a_corpus_is_that_of_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def test_the_kept_inputs_are_small() -> None:
    sizes = {str(path.relative_to(CORPUS)): path.stat().st_size for path in CORPUS.glob("*/*")}
    assert not {name: size for name, size in sizes.items() if size > 16384}
    assert sum(sizes.values()) < 1 << 20


def test_work_that_is_not_linear_is_found() -> None:
    from watcher.resolve import version

    def quadratic(data: bytes) -> None:
        for _ in data:
            version.compare(data.decode(), data.decode())

    with pytest.raises(TooManySteps):
        counted(quadratic, b"1." * 500)
