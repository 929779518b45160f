# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mistyped service or image: every command that takes one says which was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.place import Place

MEANT = "confext-watcher: no service ngnix.service takes part; did you mean nginx.service?\n"
ASKS = ("status", "history", "plan", "rollback", "rollback --forget", "origin", "diff")


def said(place: Place, *words: str) -> str:
    done = place.run(*words, check=False)
    assert (done.returncode, done.stdout) == (2 if words[0] == "diff" else 1, "")
    return done.stderr


@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_which_service_was_meant(place: Place) -> None:
    service = place.start(name="nginx.service")
    for command in ("status", "origin", "diff"):
        assert said(place, command, "ngnix.service").endswith(MEANT), command
    place.start_daemon()
    for command in ASKS:
        assert said(place, *command.split(), "ngnix.service") == MEANT, command
    assert said(place, "wait", "ngnix.service", "web_1") == MEANT
    assert said(place, "status", "ngnix*").endswith("did you mean nginx.service?\n")
    # Its history is asked for by people who know that it is no service any more.
    assert place.run("history", service.name).returncode == 0


@pytest.mark.parametrize("place", ["trees"], indirect=True)
def test_which_image_was_meant(place: Place, tmp_path: Path) -> None:
    place.start_daemon()
    service = place.start(name="nginx.service")
    there = service.put("1.4")
    service.logged("web 1.4 added")
    mistyped = str(there.with_name("wbe_1.4"))
    for words in (
        ("wait", service.name, mistyped),
        ("wait", service.name, "wbe_1.4"),
        ("check", mistyped),
    ):
        assert f"did you mean {there.name}?" in place.run(*words, check=False).stdout, words
    assert f"did you mean {there.name}?" in said(place, "diff", service.name, "--to", mistyped)
    assert "did you mean" not in place.run("check", str(tmp_path / "no/such_1"), check=False).stdout
