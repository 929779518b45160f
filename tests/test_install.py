# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make install` puts down what is needed to run, read and type, and `make uninstall` takes all of it away."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import CHECKOUT
from watcher.records.schema import ExitStatus

INSTALLER = CHECKOUT / "contrib/packaging/install.py"


def run(destdir: Path, prefix: str, *options: str) -> None:
    words: list[str | Path] = [
        sys.executable,
        INSTALLER,
        "--destdir",
        destdir,
        "--prefix",
        prefix,
        "--python",
        sys.executable,
    ]
    subprocess.run([*words, *options], check=True)


def files(destdir: Path) -> set[str]:
    return {str(path.relative_to(destdir)) for path in destdir.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("prefix", ["/usr", "/usr/local"])
def test_installed_it_runs_and_uninstalled_it_is_gone(tmp_path: Path, prefix: str) -> None:
    run(tmp_path, prefix, "--no-compile")
    found = files(tmp_path / prefix[1:])
    assert {
        "bin/confext-watcher",
        "lib/systemd/system/confext-watcher.service",
        "lib/sysusers.d/confext-watcher.conf",
        "share/bash-completion/completions/confext-watcher",
        "share/fish/vendor_completions.d/confext-watcher.fish",
    } <= found
    assert any(name.startswith("share/zsh/") for name in found)
    pages = {path.name for path in (CHECKOUT / "contrib/man").iterdir()}
    assert {name.rpartition("/")[2] for name in found if name.startswith("share/man/")} == pages
    recipes = {path.name for path in (CHECKOUT / "contrib/recipes").iterdir()}
    assert {name.rpartition("/")[2] for name in found if "/confext-watcher/recipes/" in name} == recipes
    wrapper = (tmp_path / prefix[1:] / "bin/confext-watcher").read_text()
    assert f'"{prefix}/lib/confext-watcher"' in wrapper
    run(tmp_path, prefix, "--uninstall")
    assert files(tmp_path) == set()


UNIT = (CHECKOUT / "units/confext-watcher.service.in").read_text()


def test_the_unit_is_not_restarted_where_nothing_helps() -> None:
    assert f"\nRestartPreventExitStatus={ExitStatus.UNSUPPORTED}\n" in UNIT


def test_the_unit_has_descriptors_for_more_services_than_a_host_has() -> None:
    found = re.search(r"^LimitNOFILE=(\d+)$", UNIT, re.MULTILINE)
    assert found and int(found[1]) >= 16 * 1024


def test_every_capability_of_the_unit_has_its_reason() -> None:
    explained = UNIT[UNIT.index("# What it does:") : UNIT.index("CapabilityBoundingSet=")]
    reasons = set(re.findall(r"\b[A-Z_]{4,}\b", explained))
    allowed = re.findall(r"CAP_(\w+)", UNIT)
    assert set(allowed) == reasons
