# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which extension is made for which host (os-release(5), systemd-sysext(8)); covers settings/os_release.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.model import Kind, Refused
from watcher.resolve import release
from watcher.settings.os_release import parse_os_release

DEBIAN = {"ID": "debian", "VERSION_ID": "13"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ID=debian\nVERSION_ID=13\n", DEBIAN),
        ("ID=\"debian\"\nVERSION_ID='13'", DEBIAN),
        ("# c\n\n  ID=debian  \n; c\nnonsense\n=x\n1A=2\nVERSION_ID=13", DEBIAN),
        ("ID=x\nID=debian\nVERSION_ID=13", DEBIAN),
        ("ID=de\"bi\"'an'\nVERSION_ID=1\\3", DEBIAN),
        ('A="a \\"b\\" \\$c \\\\ \\d"', {"A": 'a "b" $c \\ \\d'}),
        ('A="two\nlines"\nB=1', {"A": "two\nlines", "B": "1"}),
        ('A="open\nID=debian', {"A": '"open', "ID": "debian"}),
        ("A=one\\\ntwo", {"A": "onetwo"}),
        ("A=\nB=  c d  \n", {"A": "", "B": "c d"}),
        ("A=\\", {"A": "\\"}),
        ("ID\udcff=x\nA=\udcff", {"A": "\udcff"}),
        ("", {}),
    ],
)
def test_the_syntax(text: str, found: dict[str, str]) -> None:
    assert parse_os_release(text) == found


@given(st.text("A=\"'\\ \n#x"))
def test_no_text_makes_it_fail(text: str) -> None:
    for key, value in parse_os_release(text).items():
        assert key and isinstance(value, str)


@pytest.mark.parametrize(
    ("filename", "kind", "name", "base"),
    [
        ("web_1.4.raw", Kind.IMAGE, "web_1.4", "web"),
        ("web.confext.raw", Kind.IMAGE, "web", "web"),
        ("web_1.4+3-0.confext.raw", Kind.IMAGE, "web_1.4+3-0", "web"),
        ("web.raw.img", Kind.IMAGE, "web", "web"),
        ("web.raw", Kind.DIRECTORY, "web.raw", "web.raw"),
        ("tree_2", Kind.DIRECTORY, "tree_2", "tree"),
    ],
)
def test_the_name_of_an_extension(filename: str, kind: Kind, name: str, base: str) -> None:
    assert (release.image_name(filename, kind), release.base_name(filename, kind)) == (name, base)


def files(*names: str) -> list[str]:
    return [f"extension-release.{name}" for name in names]


@pytest.mark.parametrize(
    ("there", "strict_false", "chosen"),
    [
        (["web_1.4"], [], "web_1.4"),
        (["web"], [], "web"),
        (["web", "web_1.4", "other"], ["other"], "web_1.4"),
        (["web", "other"], [], "web"),
        (["other"], ["other"], "other"),
        (["other", "third"], ["third"], "third"),
        (["web", ".#web", "we\nb", "we\udcffb"], [".#web", "we\nb", "we\udcffb"], "web"),
    ],
)
def test_the_release_file_that_counts(there: list[str], strict_false: list[str], chosen: str) -> None:
    found = release.choose_release_file("web_1.4.raw", files(*there), set(files(*strict_false)))
    assert found == f"extension-release.{chosen}"


@pytest.mark.parametrize(
    ("there", "strict_false", "reason"),
    [
        (["web", "other"], ["other"], "has 2 extension-release files that fit"),
        (["other", "third"], ["other", "third"], "has 2 extension-release files that fit"),
        (
            ["other"],
            [],
            "extension-release.other, but must have extension-release.web_1.4 or extension-release.web ",
        ),
        ([], [], "has nothing, but must have"),
        (["we\nb"], ["we\nb"], r"we\\nb, but"),
        (["web_1.3"], [], "must have"),
    ],
)
def test_none_or_two_that_fit_are_refused(there: list[str], strict_false: list[str], reason: str) -> None:
    with pytest.raises(Refused) as refused:
        release.choose_release_file("web_1.4.raw", files(*there), set(files(*strict_false)))
    assert reason.replace(r"\\", "\\") in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_file_name_that_no_release_file_can_have_is_refused() -> None:
    with pytest.raises(
        Refused, match=r"must have extension-release.we\\xffb_1 or extension-release.we\\xffb "
    ):
        release.choose_release_file("we\udcffb_1.raw", files("we\udcffb"))


@pytest.mark.parametrize(
    ("extension", "host"),
    [
        ({"ID": "debian", "VERSION_ID": "13"}, DEBIAN),
        ({"ID": "_any"}, DEBIAN),
        ({"ID": "_any"}, {}),
        ({"ID": "_any", "ARCHITECTURE": "_any"}, DEBIAN),
        ({"ID": "_any", "ARCHITECTURE": ""}, DEBIAN),
        ({"ID": "_any", "ARCHITECTURE": "x86-64"}, DEBIAN),
        ({"ID": "debian"}, {"ID": "debian"}),
        ({"ID": "arch", "VERSION_ID": "1"}, {"ID": "arch"}),
        (
            {"ID": "debian", "VERSION_ID": "24"},
            {"ID": "ubuntu", "ID_LIKE": "mint debian", "VERSION_ID": "24"},
        ),
        ({"ID": "debian", "CONFEXT_LEVEL": "2"}, {**DEBIAN, "CONFEXT_LEVEL": "2"}),
        ({"ID": "debian", "CONFEXT_LEVEL": "2", "VERSION_ID": "12"}, {**DEBIAN, "CONFEXT_LEVEL": "2"}),
        ({"ID": "debian", "VERSION_ID": "13"}, {**DEBIAN, "CONFEXT_LEVEL": "2"}),
        ({"ID": "debian", "CONFEXT_LEVEL": "2", "VERSION_ID": "13"}, DEBIAN),
        ({"ID": "debian"}, {"ID": "debian", "CONFEXT_LEVEL": "2"}),
        ({"ID": "_any", "CONFEXT_SCOPE": "portable"}, DEBIAN),
        ({"ID": "linux"}, {}),
    ],
)
def test_made_for_this_host(extension: dict[str, str], host: dict[str, str]) -> None:
    release.match(extension, host, "x86-64")


@pytest.mark.parametrize(
    ("extension", "host", "reason"),
    [
        ({}, DEBIAN, "no ID=, which must be debian or _any"),
        ({"ID": "fedora"}, DEBIAN, "made for ID=fedora, and here it is ID=debian"),
        ({"ID": "de"}, {"ID": "x", "ID_LIKE": "debian"}, "made for ID=de,"),
        ({"ID": "debian"}, DEBIAN, "no VERSION_ID=, which must be 13"),
        (
            {"ID": "debian", "VERSION_ID": "12"},
            DEBIAN,
            "made for VERSION_ID=12, and here it is VERSION_ID=13",
        ),
        (
            {"ID": "debian", "CONFEXT_LEVEL": "1", "VERSION_ID": "13"},
            {**DEBIAN, "CONFEXT_LEVEL": "2"},
            "CONFEXT_LEVEL=1",
        ),
        (
            {"ID": "_any", "ARCHITECTURE": "arm64"},
            DEBIAN,
            "made for ARCHITECTURE=arm64, and here it is .*=x86-64",
        ),
        (
            {"ID": "_any", "ARCHITECTURE": "x86_64"},
            DEBIAN,
            r"made for ARCHITECTURE=x86_64, .* \(systemd calls x86_64 x86-64: write that\)",
        ),
        ({"ID": "_any", "ARCHITECTURE": "armada"}, DEBIAN, "here it is ARCHITECTURE=x86-64$"),
        ({"ID": "\n\udcff"}, DEBIAN, r"made for ID=\\n\\xff,"),
    ],
)
def test_made_for_something_else(extension: dict[str, str], host: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        release.match(extension, host, "x86-64")


WEB = ("web@a.service", "alias.service")


@pytest.mark.parametrize(
    ("restart", "reload", "asked"),
    [
        ("web@a.service", "", "restart"),
        ("other.service\tweb@a.service\n", "", "restart"),
        ("alias.service", "", "restart"),
        ("", " other.service  web@a.service ", "reload-or-restart"),
        ("web@a.service", "web@a.service", "restart"),
        ("other.service", "web@a.service", "reload-or-restart"),
        ("web@.service web@*.service web@b.service web web@a web.service *", "web@A.service", ""),
        ("web@a.service,other.service", "", ""),
        ("", "", ""),
    ],
)
def test_what_an_extension_asks_for(restart: str, reload: str, asked: str) -> None:
    keys = {"EXTENSION_RESTART_UNITS": restart, "EXTENSION_RELOAD_OR_RESTART_UNITS": reload}
    assert release.asks_for(keys, WEB) == asked
    assert release.asks_for(keys, ()) == release.asks_for({}, WEB) == ""


def test_words_that_are_no_units_are_told() -> None:
    keys = {
        "EXTENSION_RESTART_UNITS": "a.service web@*.service x/y",
        "EXTENSION_RELOAD_OR_RESTART_UNITS": "web@.service",
    }
    assert release.no_units(keys) == [
        "EXTENSION_RESTART_UNITS= in it has web@*.service, which is no unit's name: it is passed over",
        "EXTENSION_RESTART_UNITS= in it has x/y, which is no unit's name: it is passed over",
        "EXTENSION_RELOAD_OR_RESTART_UNITS= in it has web@.service, which is no unit's name: it is passed over",
    ]
    assert release.no_units({"ID": "a b/c"}) == []
