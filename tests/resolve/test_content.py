# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people keep beside their configuration, and what editors leave in it, is no content."""

from __future__ import annotations

import re

import pytest

from watcher.resolve.content import MARKER, TOP, is_content

RELEASE = ("etc", "extension-release.d", "extension-release.web")


@pytest.mark.parametrize(
    "path",
    ["etc", "etc/web.conf", "etc/.htaccess", "etc/a.d/.env", "etc/4913.conf", "etc/a.new.conf", "etc/swp"],
)
def test_content(path: str) -> None:
    assert is_content(tuple(path.split("/")))


def test_what_tells_an_extension_is_content() -> None:
    for path in (RELEASE, ("usr", *RELEASE), ("usr", "lib", *RELEASE[1:])):
        assert is_content(path) is (path[:2] != ("usr", "etc"))


@pytest.mark.parametrize(
    "name",
    """
    .web.conf.swp .web.conf.swo .web.conf.swx 4913 web.conf~ #web.conf# .#web.conf .goutputstream-A1B2C3
    web.conf.bak web.conf.old web.conf.new web.conf.ignore lost+found
    web.conf.rpmsave web.conf.rpmnew web.conf.rpmorig web.conf.dpkg-dist web.conf.ucf-old
    """.split(),
)
def test_what_editors_and_packages_leave_is_not(name: str) -> None:
    assert not is_content(("etc", name))
    assert not is_content(("etc", "deep", name))


@pytest.mark.parametrize(
    "name", [".git", "README.md", "build", "Makefile", "etc_1", "usr/share", "usr/lib/app"]
)
def test_nor_is_what_lies_beside_etc(name: str) -> None:
    assert not is_content(tuple(name.split("/")))


def test_the_names_to_watch_are_those_that_count() -> None:
    for name in ("etc", "usr", MARKER, ".git", "etc_1", "README"):
        assert bool(re.fullmatch(TOP, name)) is is_content((name,))
