# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which images the policies of a service let in: all of them have to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from support.images import confext
from watcher.images.admission import Admission
from watcher.images.formats.erofs import EROFS
from watcher.images.formats.image import Image
from watcher.images.made_for import host
from watcher.images.store import Store
from watcher.model import Copy, Declared, Kind, Layer, Protection, Refused, Setting, Stack, Trust
from watcher.mounts.workers import MountWorkers
from watcher.rounds.desired import Desired, Given, find
from watcher.rounds.image_policies import demands, not_allowed, require_allowed
from watcher.settings.config import ServiceSettings, Settings

UNIT = "web.service"
OTHER = Setting("Other", "signed", "/f:1")
MIB = 1 << 20
UNPROTECTED, VERITY, SIGNED = (Trust(one) for one in Protection)


def given(
    own: str = "", watcher: str = "", unit: str = ""
) -> tuple[Settings, ServiceSettings, Setting | None]:
    """Settings as they are when these policies are written; "": none is."""
    key = "ImagePolicy"
    return (
        Settings(
            written=(Setting(key, watcher, "/watcher.conf:2"), Setting("LogLevel", "debug", "/f:1"))[
                not watcher :
            ]
        ),
        ServiceSettings(written=(Setting(key, own, "/own:3"), Setting("Reload", "none", "/f:1"))[not own :]),
        Setting("ExtensionImagePolicy", unit, "/unit:4") if unit else None,
    )


@pytest.mark.parametrize(
    ("own", "watcher", "unit", "allowed", "said"),
    [
        ("", "", "", (UNPROTECTED, VERITY, SIGNED), ""),
        ("any", "", "", (UNPROTECTED, VERITY, SIGNED), ""),
        ("any", "signed", "", (SIGNED,), "/watcher.conf:2"),
        ("signed", "any", "", (SIGNED,), "/own:3"),
        ("verity", "signed", "", (SIGNED,), "/own:3"),
        ("", "", "root=signed", (SIGNED,), "/unit:4"),
        ("any", "any", "root=verity+signed", (VERITY, SIGNED), "/unit:4"),
        ("verity", "", "root=unprotected", (VERITY, SIGNED), "/own:3"),
        ("root=signed", "", "root=encrypted", (), "/own:3"),
        ("nonsense", "", "", (), "/own:3"),
        ("", "nonsense", "", (), "/watcher.conf:2"),
        ("", "", "signed", (), "/unit:4"),
    ],
)
def test_the_stricter_wins(own: str, watcher: str, unit: str, allowed: tuple[Trust, ...], said: str) -> None:
    policies = demands(*given(own, watcher, unit))

    def refused(trust: Trust) -> str:
        copy = Copy("a" * 64, "/store/a", 1, Kind.IMAGE, Image(EROFS, 1), trust)
        try:
            require_allowed(policies, copy)
        except Refused as why:
            return str(why)
        return ""

    assert tuple(one for one in (UNPROTECTED, VERITY, SIGNED) if not refused(one)) == allowed
    assert said in refused(UNPROTECTED)


class Judging(Admission):
    """Takes what is said of a tree, by its name, for proved."""

    def __init__(self, store: Store, verdicts: dict[str, Trust]) -> None:
        super().__init__(store, cast(MountWorkers, None))  # trees need none
        self._verdicts = verdicts

    def trust(self, copy: Copy) -> Trust:
        names = {path.name.removesuffix(".conf") for path in Path(copy.path, "etc").glob("*.conf")}
        return next((trust for name, trust in self._verdicts.items() if name in names), Trust())


TREE = Layer("base", "base", "2", "b" * 64, Kind.DIRECTORY, "/srv/base_2")
IMAGE = Layer("web.raw", "web", "1", "a" * 64, Kind.IMAGE, "/srv/web_1.raw", SIGNED, "erofs")
OLD = replace(IMAGE, trust=Trust(), file_system="")


@pytest.mark.parametrize(
    ("own", "unit", "layers", "said"),
    [
        ("signed", "", (IMAGE,), []),
        ("any", "", (TREE, OLD), []),
        (
            "signed",
            "",
            (TREE, IMAGE),
            ["/srv/base_2 stays, but would not get in now: a directory tree is unprotected"],
        ),
        (
            "root=squashfs",
            "",
            (TREE, IMAGE),
            ["/srv/web_1.raw stays, but would not get in now: it is erofs, and"],
        ),
        ("root=squashfs", "", (OLD,), []),
        (
            *("", "root=verity", (TREE, OLD)),
            [
                "/srv/base_2 stays, but would not get in now: a directory tree is unprotected",
                "/srv/web_1.raw stays, but would not get in now, and systemd will not start the unit on it: it is un",
            ],
        ),
        (
            "nonsense",
            "",
            (IMAGE,),
            ["/srv/web_1.raw stays, but would not get in now: nothing new gets in, "],
        ),
    ],
)
def test_what_stays_and_would_not_get_in(
    own: str, unit: str, layers: tuple[Layer, ...], said: list[str]
) -> None:
    found = not_allowed(demands(*given(own, unit=unit)), Stack(layers))
    assert len(found) == len(said)
    for remark, words in zip(found, said, strict=True):
        assert f"{remark.path} {remark.text}".startswith(words)


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Desired]:
    """Looks by policies at a `.confext.d/`, with what is proved of each version, and accepts what it finds."""
    store = Store(str(tmp_path / "state"), 64 * MIB, 64 * MIB, 3)
    (tmp_path / "drops").mkdir()

    def look(policies: tuple[Settings, ServiceSettings, Setting | None], **verdicts: Trust) -> Desired:
        declared = Declared(confext_dirs=(str(tmp_path / "drops"),))
        with store.using():
            state = store.state(UNIT)
            asked = Given(UNIT, declared, host(), state, policies=demands(*policies))
            found = find(store, Judging(store, verdicts), asked)
            store.accept(UNIT, found.wanted, found.entries)
        return found

    return look


def put(tmp_path: Path, name: str, version: str) -> None:
    directory = tmp_path / "drops" / f"{name}.v"
    directory.mkdir(exist_ok=True)
    confext(directory / f"{name}_{version}", name, {f"etc/{name}{version}.conf": version.encode()})


def labels(found: Desired) -> list[str]:
    return [layer.label for layer in found.wanted.layers]


def test_of_several_only_the_one_that_lacks_something_is_refused_and_its_predecessor_stays(
    look: Callable[..., Desired], tmp_path: Path
) -> None:
    signed = given("signed")
    for name in ("a", "b", "c"):
        put(tmp_path, name, "1")
    all_signed = {f"{name}1": SIGNED for name in "abc"}
    assert labels(look(signed, **all_signed)) == ["a 1", "b 1", "c 1"]
    for name in ("a", "b", "c"):
        put(tmp_path, name, "2")
    unknown = replace(VERITY, remark="signed by an unknown key")
    found = look(signed, **all_signed, a2=SIGNED, b2=unknown, c2=SIGNED)
    assert labels(found) == ["a 2", "b 1", "c 2"]
    (passed,) = found.passed
    assert passed.candidate.filename == "b_2"
    assert "signed by an unknown key" in str(passed.reason)


def test_what_is_accepted_stays_under_a_stricter_policy_and_nothing_new_gets_in(
    look: Callable[..., Desired], tmp_path: Path
) -> None:
    put(tmp_path, "a", "1")
    assert labels(look(given())) == ["a 1"]
    put(tmp_path, "b", "1")
    put(tmp_path, "a", "2")
    for policy in ("signed", "nonsense", "~"):
        found = look(given(policy))
        assert labels(found) == ["a 1"]
        assert {one.candidate.filename for one in found.passed} == {"a_2", "b_1"}
        (stays,) = [
            one for one in found.look.remarks if one.text.startswith("stays, but would not get in now: ")
        ]
        assert stays.path.endswith("a_1")
    assert labels(look(given("any"))) == ["a 2", "b 1"]


def test_a_signature_that_nobody_asks_for_and_that_does_not_check_out_is_one_warning(
    look: Callable[..., Desired], tmp_path: Path
) -> None:
    put(tmp_path, "a", "1")
    unknown = replace(VERITY, remark="signed by an unknown key")
    found = look(given("verity"), a1=unknown)
    assert labels(found) == ["a 1"] and found.wanted.layers[0].trust == unknown
    (said,) = [one for one in found.look.remarks if "unknown key" in one.text]
    assert said.text == "signed by an unknown key; let in, since no policy asks for more (ImagePolicy=)"
    assert not [one for one in look(given("verity"), a1=unknown).look.remarks if "unknown key" in one.text]


def test_what_is_proved_later_of_the_same_content_is_recorded(
    look: Callable[..., Desired], tmp_path: Path
) -> None:
    put(tmp_path, "a", "1")
    before = look(given(), a1=VERITY).wanted
    after = look(given("signed"), a1=SIGNED)
    assert after.wanted.id == before.id and after.wanted.layers[0].trust == SIGNED
    assert not [one for one in after.look.remarks if "stays" in one.text]
