# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make fuzz`: every target in turn under atheris, for a while; then a table of what was run, reached and found.

What the fuzzer learns is kept in `.fuzz/`, and is where the next run begins. An input that a target fails on is written
to `tests/corpus/TARGET/crash-*`, named in the table, and fails `make test` from then on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz.steps import lines_of
from fuzz.targets import CORPUS, TARGETS, Target

WORK = Path(".fuzz")
LEAST_SEC = 2
INPUT_MAX = 4096
"""Bytes of one input."""
HANG_SEC, MEMORY_MB = 25, 2048
"""What a run may take: more is a finding."""
_FINDINGS = "crash-*", "timeout-*", "oom-*", "leak-*"


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        coverage: edges of the control flow of this package, and of the packages that it parses with.
        findings: files, or one line where there is none.
    """

    target: str
    executions: int
    coverage: int
    inputs: int
    findings: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--keep", action="store_true", help="add to tests/corpus/ what reaches further lines")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)}")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    chosen = [TARGETS[name] for name in options.targets or TARGETS]
    seconds = max(LEAST_SEC, options.seconds // len(chosen))
    reports = []
    for target in chosen:
        print(f"== {target.name}, {seconds} s", flush=True)
        reports.append(fuzz(target, seconds))
        if options.keep:
            keep(target)
    print_table(reports)
    return int(any(report.findings for report in reports))


def fuzz(target: Target, seconds: int) -> Report:
    work, kept = WORK / target.name, CORPUS / target.name
    work.mkdir(parents=True, exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    words = WORK / f"{target.name}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in dict.fromkeys(target.words)))
    before = findings(target)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fuzz.one", target.name),
            *(f"-max_total_time={seconds}", f"-max_len={INPUT_MAX}", f"-timeout={HANG_SEC}"),
            *(f"-rss_limit_mb={MEMORY_MB}", f"-dict={words}", f"-artifact_prefix={kept}/"),
            *("-print_final_stats=1", "-verbosity=1", str(work), str(kept)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode(errors="replace")
    found = [str(path) for path in findings(target) if path not in before]
    if done.returncode:
        print(said[-8000:])
        found = found or [f"ended with status {done.returncode}, see above"]
    return Report(
        target.name,
        max((int(number) for number in re.findall(r"number_of_executed_units: (\d+)", said)), default=0),
        max((int(number) for number in re.findall(r"\bcov: (\d+)", said)), default=0),
        len(target.corpus()),
        tuple(found),
    )


def findings(target: Target) -> list[Path]:
    return sorted(path for pattern in _FINDINGS for path in (CORPUS / target.name).glob(pattern))


def keep(target: Target) -> None:
    """The smallest inputs that reach what no smaller one does; findings stay, whatever they reach."""
    reached: set[tuple[str, int]] = set()
    for path in findings(target):
        reached |= _lines(target, path)
    seeds = [path for path in target.corpus() if path not in findings(target)]
    learnt = sorted((WORK / target.name).iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in [*seeds, *learnt]:
        lines = _lines(target, path)
        if path not in seeds and not lines <= reached:
            shutil.copyfile(path, CORPUS / target.name / path.name[:12])
        reached |= lines


def _lines(target: Target, path: Path) -> set[tuple[str, int]]:
    try:
        return lines_of(target.run, path.read_bytes())
    except Exception:  # noqa: BLE001 -- a finding, which the fuzzer has reported
        return set()


def print_table(reports: Sequence[Report]) -> None:
    print(f"\n{'target':<16}{'executions':>12}{'coverage':>10}{'corpus':>8}  findings")
    for report in reports:
        said = ", ".join(report.findings) or "none"
        print(
            f"{report.target:<16}{report.executions:>12,}{report.coverage:>10}{report.inputs:>8}  {said}".rstrip()
        )
    found = sum(len(report.findings) for report in reports)
    print(f"{'all':<16}{sum(report.executions for report in reports):>12,}{'':>18}  {found or 'none'}")


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main(sys.argv[1:]))
