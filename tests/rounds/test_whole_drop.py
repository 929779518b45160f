# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an image waits for that may still come beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.images import FORMATS
from watcher.images.formats.image import Image
from watcher.images.formats.squashfs import SQUASHFS
from watcher.model import (
    Candidate,
    Copy,
    Entry,
    Incomplete,
    Kind,
    Layer,
    Look,
    Picks,
    Protection,
    Refused,
    Setting,
    Stack,
    Trust,
)
from watcher.rounds.whole_drop import WholeDrop
from watcher.settings.image_policy import demand

DIGEST = "d" * 64
BARE = Copy("e" * 64, "/store/e", 4096, Kind.IMAGE, FORMATS["squashfs"])
PARTITION = Copy("e" * 64, "/store/e", 4096, Kind.IMAGE, Image(SQUASHFS, 90_000, 40_960, 4096))
TREE = Copy("e" * 64, "/store/e", 4096, Kind.DIRECTORY)
ALL = ("web_2.verity", "web_2.roothash", "web_2.roothash.p7s")


def candidate(version: str, *beside: str, kind: Kind = Kind.IMAGE) -> Candidate:
    name = f"web_{version}.raw"
    return Candidate(f"/srv/web.raw.v/{name}", name, "web", version, kind, sidecars=beside)


def whole_drop(
    tmp_path: Path,
    *policies: str,
    before: str = "",
    protected: bool = True,
    signed: bool = False,
    there: bool = True,
) -> WholeDrop:
    """With an accepted version `before`."""
    (tmp_path / DIGEST).mkdir()
    (tmp_path / DIGEST / "image.raw").touch()
    if protected:
        (tmp_path / DIGEST / "protected.verity").touch()
    if signed:
        (tmp_path / DIGEST / "protected.roothash.p7s").touch()
    source = candidate(before).path if before else "/elsewhere"
    accepted = Stack((Layer("web.raw", "web", before, DIGEST, Kind.IMAGE, source),))
    entry = Entry("web.raw", "/srv/web.raw.v", Kind.IMAGE)
    candidates = [candidate("2"), *([candidate(before)] if before and there else [])]
    look = Look((Picks(entry, tuple(candidates)),), ())
    demands = [demand(Setting("ImagePolicy", one, "/f:1")) for one in policies]
    return WholeDrop(look, accepted, str(tmp_path), demands)


def test_with_an_open_policy_and_nothing_before_it_gets_in(tmp_path: Path) -> None:
    whole_drop(tmp_path).require(candidate("2"), BARE)


def test_it_waits_where_the_one_before_had_a_tree(tmp_path: Path) -> None:
    judge = whole_drop(tmp_path, before="1")
    with pytest.raises(
        Incomplete,
        match=r"^incomplete: web_2\.verity, web_2\.roothash beside it awaited, since web_1\.raw before it",
    ):
        judge.require(candidate("2"), BARE)
    judge.require(candidate("2", *ALL), replace(BARE, trust=Trust(Protection.SIGNED)))
    judge.require(candidate("2", *ALL[:2]), replace(BARE, trust=Trust(Protection.VERITY)))
    judge.require(candidate("2"), PARTITION)  # nothing beside it would help
    judge.require(candidate("2", kind=Kind.DIRECTORY), TREE)


def test_a_signature_is_awaited_where_the_one_before_had_one(tmp_path: Path) -> None:
    with pytest.raises(
        Incomplete, match=r"^incomplete: web_2\.verity, web_2\.roothash, web_2\.roothash\.p7s beside"
    ):
        whole_drop(tmp_path, before="1", signed=True).require(candidate("2"), BARE)


def test_not_where_the_one_before_had_none_or_is_gone_or_was_replaced(tmp_path: Path) -> None:
    for number, options in enumerate(
        ({"before": "1", "protected": False}, {"before": "1", "there": False}, {"before": "2"})
    ):
        (tmp_path / str(number)).mkdir()
        whole_drop(tmp_path / str(number), **options).require(candidate("2"), BARE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "beside", "trust", "said"),
    [
        (
            "signed",
            (),
            Protection.UNPROTECTED,
            "incomplete: web_2.verity, web_2.roothash, web_2.roothash.p7s beside",
        ),
        (
            "verity",
            (),
            Protection.UNPROTECTED,
            "incomplete: web_2.verity, web_2.roothash beside it awaited: ",
        ),
        ("signed", ALL[:2], Protection.VERITY, "incomplete: web_2.roothash.p7s beside it awaited: "),
        ("signed", ALL, Protection.VERITY, "it is "),
        ("root=signed+erofs", (), Protection.UNPROTECTED, "it is "),
    ],
)
def test_it_waits_where_what_may_come_would_let_it_in(
    tmp_path: Path, policy: str, beside: tuple[str, ...], trust: Protection, said: str
) -> None:
    with pytest.raises(Refused) as refused:
        whole_drop(tmp_path, policy).require(candidate("2", *beside), replace(BARE, trust=Trust(trust)))
    assert str(refused.value).startswith(said)
    assert isinstance(refused.value, Incomplete) == said.startswith("incomplete")


def test_a_disk_image_and_a_tree_do_not_wait(tmp_path: Path) -> None:
    judge = whole_drop(tmp_path, "signed")
    for one in (PARTITION, TREE):
        with pytest.raises(Refused) as refused:
            judge.require(candidate("2", kind=one.kind), one)
        assert not isinstance(refused.value, Incomplete)
