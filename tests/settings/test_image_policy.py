# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policies mean what systemd 257 and 262 say they mean; and what a policy says of an image."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from watcher.model import Protection, Setting, Trust
from watcher.settings.image_policy import (
    FILE_SYSTEMS,
    IGNORE,
    USE,
    Policy,
    demand,
    in_unit,
    parse,
    systemds,
    unit_refusal,
)

UNPROTECTED, VERITY, SIGNED = (Trust(one) for one in Protection)


def cells(policy: Policy, designator: str, *, old: bool) -> list[str]:
    """A line of the table of `systemd-analyze image-policy`."""
    known = USE - {"encryptedwithintegrity"} if old else USE
    # It does not spell out there what a default without words means.
    plain = designator == "default"
    words = policy.default if plain else policy.effective(designator)
    use = words & known
    modes = {known: "open", IGNORE: "ignore"}
    order = ("verity", "signed", "encrypted", "encryptedwithintegrity", "unprotected", "unused", "absent")
    found = [modes.get(use) or "+".join(word for word in order if word in use) or "-"]
    for on, off in (("read-only-on", "read-only-off"), ("growfs-on", "growfs-off")):
        found.append("-" if (on in words) == (off in words) else "yes" if on in words else "no")
    return found if old else [*found, "+".join(sorted(words & FILE_SYSTEMS)) or "-"]


def disagrees(case: Any, *, old: bool) -> bool:
    text, wanted = case
    try:
        policy = systemds(text, old=old)
    except ValueError:
        return wanted is not None
    return wanted is None or {name: cells(policy, name, old=old) for name in wanted} != wanted


@pytest.mark.parametrize(("name", "old"), [("policies", False), ("policies-257", True)])
def test_policies_are_systemds(name: str, old: bool) -> None:
    header, cases = oracle.load(name)
    assert header["tool"].startswith("systemd 257 " if old else "systemd 262 ")
    found = list(cases)
    assert header["cases"] >= oracle.LEAST
    assert sum(case[1] is not None for case in found) > 1000
    assert [case for case in found if disagrees(case, old=old)] == []


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("any", (UNPROTECTED, VERITY, SIGNED)),
        ("verity", (VERITY, SIGNED)),
        ("signed", (SIGNED,)),
        ("*", (UNPROTECTED, VERITY, SIGNED)),
        ("-", ()),
        ("~", ()),
        ("root=signed", (SIGNED,)),
        ("root=signed+absent:=absent", (SIGNED,)),
        ("root=verity", (VERITY, SIGNED)),
        ("root=unprotected", (UNPROTECTED, VERITY, SIGNED)),
        ("root=verity+signed+encrypted+unprotected+absent:usr=signed:=unused+absent", (UNPROTECTED, VERITY, SIGNED)),
        ("root=encrypted", ()),
        ("root=ignore", ()),
        ("root=absent", ()),
        ("root=", (UNPROTECTED, VERITY, SIGNED)),
        ("=signed", (SIGNED,)),
        ("usr=signed", ()),
        ("usr=signed:=open", (UNPROTECTED, VERITY, SIGNED)),
    ],
)  # fmt: skip
def test_what_a_policy_lets_in(text: str, allowed: tuple[Trust, ...]) -> None:
    policy = parse(text)
    assert tuple(trust for trust in (UNPROTECTED, VERITY, SIGNED) if policy.allows(trust, "erofs")) == allowed


@pytest.mark.parametrize(
    ("text", "trust", "file_system", "lacks"),
    [
        ("signed", UNPROTECTED, "", "signed"),
        ("root=signed+verity+absent", UNPROTECTED, "erofs", "signed verity"),
        ("root=squashfs+erofs", UNPROTECTED, "ext4", "erofs squashfs"),
        ("root=signed+squashfs", SIGNED, "erofs", "squashfs"),
        ("root=signed+squashfs", SIGNED, "squashfs", None),
        ("=squashfs:root=signed", SIGNED, "erofs", None),
        ("*", UNPROTECTED, "minix", "btrfs erofs ext4 f2fs squashfs vfat xfs"),
        ("root=erofs", UNPROTECTED, "", None),
        ("-", SIGNED, "erofs", ""),
    ],
)
def test_what_an_image_lacks(text: str, trust: Trust, file_system: str, lacks: str | None) -> None:
    found = parse(text).lacks(trust, file_system)
    assert found == (None if lacks is None else frozenset(lacks.split()))


READ_ONLY, GROWFS = 1 << 60, 1 << 59
BARE: tuple[tuple[str, int], ...] = ()
HASHED = (("root", READ_ONLY), ("root-verity", READ_ONLY))
WITH_SIGNATURE = (*HASHED, ("root-verity-sig", READ_ONLY))


@pytest.mark.parametrize(
    ("text", "parts", "why"),
    [
        ("*", WITH_SIGNATURE, ""),
        ("root=signed", WITH_SIGNATURE, ""),
        ("root=verity", WITH_SIGNATURE, ""),
        (
            "root=verity:=open",
            WITH_SIGNATURE,
            "does not allow a partition that is signed, as systemd takes it",
        ),
        ("root=unprotected", WITH_SIGNATURE, ""),
        ("root=unprotected:=absent", HASHED, "wants no partition root-verity"),
        ("root=verity:=absent", WITH_SIGNATURE, "wants no partition root-verity-sig"),
        ("root=signed:=absent", WITH_SIGNATURE, ""),
        ("root=open+read-only-on", BARE, "does not allow a partition root with read-only-off"),
        ("root=open+read-only-on", HASHED, ""),
        ("root=open+growfs-on", HASHED, "does not allow a partition root with growfs-off"),
        (
            "root=open:root-verity=read-only-off",
            HASHED,
            "does not allow a partition root-verity with read-only-on",
        ),
        ("root=signed", BARE, ""),
        ("=signed", BARE, ""),
        ("=verity", HASHED, "wants a partition esp"),
        ("root=verity+signed:=absent", HASHED, "wants a partition root-verity-sig"),
        ("root=verity+signed", WITH_SIGNATURE, ""),
        ("root=verity:root-verity=unused", HASHED, "does not allow a partition that is encrypted,"),
    ],
)
def test_on_which_partitions_systemd_would_not_start_a_unit(
    text: str, parts: tuple[tuple[str, int], ...], why: str
) -> None:
    found = parse(text).mismatch(parts)
    assert found.startswith(why) and bool(found) == bool(why)
    said = unit_refusal(demand(Setting("ExtensionImagePolicy", text, "/u:7")), parts)
    assert bool(said) == bool(why)
    assert unit_refusal(demand(Setting("ImagePolicy", text, "/u:7")), parts) == ""


UNKNOWN = Trust(Protection.VERITY, remark="signed by an unknown key")
SIGN = (
    "sign it with a key whose certificate is in /etc/verity.d (systemd-repart --make-ddi=confext --private-key="
    " --certificate=)"
)


@pytest.mark.parametrize(
    ("key", "text", "trust", "file_system", "words"),
    [
        ("ImagePolicy", "any", UNPROTECTED, "", ""),
        (
            *("ImagePolicy", "signed", UNPROTECTED, "erofs"),
            f"it is unprotected, and ImagePolicy=signed (/u:7) asks for signed: {SIGN}, or change the policy",
        ),
        (
            *("ImagePolicy", "signed", UNPROTECTED, ""),
            f"a directory tree is unprotected, and ImagePolicy=signed (/u:7) asks for signed: {SIGN}, or change the"
            " policy",
        ),
        (
            *("ExtensionImagePolicy", "root=signed", UNKNOWN, "erofs"),
            "it is verity (signed by an unknown key), and ExtensionImagePolicy=root=signed (/u:7) asks for signed:"
            f" {SIGN}, or change the policy",
        ),
        (
            *("ImagePolicy", "verity", UNPROTECTED, "squashfs"),
            "it is unprotected, and ImagePolicy=verity (/u:7) asks for signed or verity: build it with a hash tree"
            " (systemd-repart --make-ddi=confext), or change the policy",
        ),
        (
            *("ImagePolicy", "root=encrypted", SIGNED, "squashfs"),
            "it is signed, and ImagePolicy=root=encrypted (/u:7) asks for encrypted: confexts are none of these, or"
            " change the policy",
        ),
        (
            *("ImagePolicy", "root=erofs", SIGNED, "squashfs"),
            "it is squashfs, and ImagePolicy=root=erofs (/u:7) asks for erofs: build it so, or change the policy",
        ),
        ("ImagePolicy", "~", SIGNED, "erofs", "ImagePolicy=~ (/u:7) lets no image in at all: change that"),
        (
            *("ImagePolicy", "singed", SIGNED, "erofs"),
            "nothing new gets in, ImagePolicy= (/u:7) is no policy: singed has no = (systemd.image-policy(7)): mend"
            " that line",
        ),
        (
            *("ExtensionImagePolicy", "signed", SIGNED, "erofs"),
            "nothing new gets in, ExtensionImagePolicy= (/u:7) is no policy: signed has no = (systemd.image-policy(7)):"
            " mend that line",
        ),
    ],
)
def test_a_refusal_says_which_policy_where_and_what_to_do(
    key: str, text: str, trust: Trust, file_system: str, words: str
) -> None:
    assert demand(Setting(key, text, "/u:7")).refusal(trust, file_system, tree=not file_system) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("singed", "no policy: singed has no = (systemd.image-policy(7))"),
        ("Signed", "no policy: Signed has no = (systemd.image-policy(7))"),
        ("root=singed", "no policy: singed is no word of it (systemd.image-policy(7))"),
        ("roof=signed", "no policy: there is no partition roof"),
        ("root=signed:root=verity", "no policy: two rules for root"),
        ("=signed:=verity", "no policy: two rules for all others"),
        ("root=signed\\", "no policy: root=signed\\\\ ends with a backslash"),
    ],
)
def test_what_is_no_policy_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert str(caught.value) == words


def test_in_unit_files_unknown_words_are_passed_over_unless_nothing_would_be_left() -> None:
    assert in_unit("root=signed+ntfs:roof=verity") == parse("root=signed")
    assert in_unit("root=") == parse("root=")
    with pytest.raises(ValueError, match="has no word that is known, and would allow everything"):
        in_unit("root=singed")
    for text in ("root=signed+erofs", "root=encryptedwithintegrity", "roof=verity:root=signed"):
        assert in_unit(text)
        with pytest.raises(ValueError):
            systemds(text, old=True)
    for word in ("any", "verity", "signed"):  # of ours
        with pytest.raises(ValueError, match="has no ="):
            in_unit(word)


@given(st.text("rotus=:+-*~\\ \t%") | st.text())
def test_any_text_is_a_policy_or_is_refused_in_one_line(text: str) -> None:
    for read in (parse, in_unit):
        try:
            policy = read(text)
        except ValueError as error:
            assert str(error).isprintable()
        else:
            assert policy.effective("root")
