# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `init` and `remove` plan, and how they say it; what they do is done in beds/test_systemd_init.py."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from support.needs import root
from watcher.cli import main, show_init, show_remove
from watcher.records.schema import Failed
from watcher.settings.config import Settings
from watcher.setup import drop_in, init, remove
from watcher.setup.init import Plan, Wish

RECIPE = (
    "[Recipe]\nUnits=web.service\nFrom=/etc/passwd\nNote=Know this.\n[X-Confext]\nCheck=/no/such/web -t\n"
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Units `web` and `other`; a recipe for `web`."""
    for module in (init, remove):
        monkeypatch.setattr(module, "UNIT_PATHS", (str(tmp_path / "units"),))
    for name in ("web.service", "other.service", "my_app@.service", "off.service"):
        (tmp_path / "units").mkdir(exist_ok=True)
        (tmp_path / "units" / name).write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / "units/off.service").write_text("[Service]\nExecStart=/bin/true\n[X-Confext]\nEnabled=no\n")
    (tmp_path / "units/alias.service").symlink_to("web.service")
    (tmp_path / "units/masked.service").symlink_to("/dev/null")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/web.conf").write_text(RECIPE)
    return tmp_path


def settings(host: Path) -> Settings:
    return Settings(configuration_directory=str(host), state_directory=str(host / "state"))


def plan(host: Path, service: str, *sources: str, **more: str) -> Plan:
    return init.plan(Wish(service, sources, **more), settings(host), str(host / "units"))


def test_a_plan_by_a_recipe_under_any_of_the_units_names(host: Path) -> None:
    before = sorted(host.rglob("*"))
    for name in ("web", "web.service", "alias.service"):
        found = plan(host, name)
        assert found.image == f"{host}/units/web.service.confext.d/web.raw.v/web_0.raw"
        assert found.sources == ("/etc/passwd",) and found.taken.files == ["/etc/passwd"]
        assert "Check=/no/such/web -t" in found.content and not found.nothing
    said = "\n".join(show_init.planned(found))
    assert f"by the recipe {host}/recipes/web.conf" in said and "Note: Know this." in said
    assert "/no/such/web is in a command of the recipe, and not here" in said
    assert sorted(host.rglob("*")) == before


def test_without_a_recipe_it_says_that_nothing_tries_what_is_dropped(host: Path) -> None:
    with pytest.raises(Failed, match=r"no recipe is for other\.service.*--from"):
        plan(host, "other")
    said = "\n".join(show_init.planned(plan(host, "other", "/etc/passwd")))
    assert "without a recipe" in said and "add Check= to" in said
    assert "Check=/no" in plan(host, "other", recipe="web").content
    assert plan(host, "web", "/etc/passwd", recipe="none").recipe is None


def test_a_name_has_nothing_behind_which_a_version_would_begin(host: Path) -> None:
    assert plan(host, "my_app@a.service", "/etc/passwd").name == "my-app"
    assert plan(host, "my_app@.service", "/etc/passwd", name="x.y").name == "x.y"
    for name in ("a_b", "a/b", ".a", "a+1", "a b"):
        with pytest.raises(Failed, match="--name"):
            plan(host, "web", name=name)


@pytest.mark.parametrize(
    ("service", "sources", "problem"),
    [
        ("none", (), "no such unit, or it is masked"),
        ("ohter", (), "did you mean other.service?"),
        ("masked", (), "no such unit, or it is masked"),
        ("off", (), "Enabled=no"),
        ("web.socket", (), "is no service unit"),
        ("web", ("/usr",), "is no path below /etc"),
        ("web", ("/etc",), "is no path below /etc"),
        ("web", ("etc/passwd",), "is no path below /etc"),
        ("web", ("/etc/x/../passwd",), "is not written plainly"),
        ("web", ("/etc/none-such",), "there is nothing in /etc/none-such"),
    ],
)
def test_what_cannot_be_is_one_clear_line(
    host: Path, service: str, sources: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(Failed) as raised:
        plan(host, service, *sources)
    assert problem in str(raised.value)


def test_only_what_is_missing_is_planned(host: Path) -> None:
    first = plan(host, "web")
    os.makedirs(first.directory)
    assert plan(host, "web").image == first.image, "the empty directory that `enable` makes"
    Path(first.image).touch()
    os.mkdir(os.path.dirname(first.drop_in))
    drop_in.write(first.drop_in, first.content)
    again = plan(host, "web")
    assert again.nothing and show_init.planned(again)[0] == "web.service is set up already"
    (host / "recipes/web.conf").write_text(RECIPE.replace("web -t", "web -tt"))
    newer = plan(host, "web")
    assert not newer.image and "web -tt" in newer.content
    assert any(line.startswith("  renew ") for line in show_init.planned(newer))
    with open(first.drop_in, "a") as file:
        file.write("CheckSec=9\n")
    assert plan(host, "web").nothing
    assert any("was changed by hand, and stays" in line for line in show_init.planned(plan(host, "web")))


def test_where_there_is_nothing_yet_the_directory_is_made_all_the_same(host: Path) -> None:
    (host / "recipes/web.conf").write_text(RECIPE.replace("/etc/passwd", "/etc/none-such"))
    found = plan(host, "web")
    assert found.makes and not found.image and not found.nothing
    said = "\n".join(show_init.planned(found))
    assert (
        f"make   {found.directory}/" in said
        and "No first version, for nothing is there: /etc/none-such" in said
    )


@root
def test_where_there_is_no_room_nothing_is_planned(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4K", "none", host / "small"], check=True)
    try:
        for variable in ("TMPDIR", "TEMP", "TMP"):
            monkeypatch.setenv(variable, f"{host}/small")
        monkeypatch.setattr(tempfile, "tempdir", None)
        with pytest.raises(
            Failed, match=rf"^{host}/small has no room for a first version: [0-9]+ bytes are needed"
        ):
            plan(host, "web")
    finally:
        subprocess.run(["umount", host / "small"], check=True)


def test_an_image_that_is_no_squashfs_is_told_with_the_reason(host: Path) -> None:
    found = plan(host, "web")
    assert "erofs" not in "\n".join(show_init.planned(found))
    found.taken.listed.append("/etc/passwd")
    said = "The image is an erofs, which can hold the access control lists of /etc/passwd"
    assert said in show_init.planned(found)


def test_remove_takes_what_init_made_and_names_what_stays(host: Path) -> None:
    def removal(name: str = "alias", *, everything: bool = False) -> remove.Plan:
        return remove.plan(name, settings(host), everything=everything, place=str(host / "units"))

    assert removal().nothing and removal("never-was").nothing
    made = plan(host, "web", name="site")
    os.makedirs(made.directory)
    os.makedirs(f"{made.top}/aaa.raw.v")
    os.mkdir(os.path.dirname(made.drop_in))
    drop_in.write(made.drop_in, made.content)
    found = removal()
    assert (found.entries, found.stays, found.ends) == (("site.raw.v",), ("aaa.raw.v",), False)
    assert any("aaa.raw.v" in line and "--all" in line for line in show_remove.planned(found))
    found = removal(everything=True)
    assert (found.entries, found.stays, found.ends) == (("aaa.raw.v", "site.raw.v"), (), True)
    drop_in.write(made.drop_in, "[X-Confext]\n")
    assert removal().there is None, "a person's own stays"
    (host / "units/web.service").write_text("[Service]\nExtensionImages=/srv/web.raw\n")
    found = removal(everything=True)
    assert found.still == (f"{host}/units/web.service",) and not found.ends
    assert any("goes on taking part" in line for line in show_remove.planned(found))


def test_where_nothing_can_be_written_it_says_what_to_do(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(host, "web")

    def read_only(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    before = sorted(host.rglob("*"))
    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(Failed, match=r"web\.service\.d cannot be made, its file system is read-only"):
        init.carry_out(found, settings(host))
    assert sorted(host.rglob("*")) == before


@pytest.mark.parametrize("command", ["init", "remove", "enable"])
def test_without_systemd_it_is_said_that_there_are_no_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Not that this one is mistyped, or takes no part: a program that `exec` started may be called like it."""
    is_there = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path != "/run/systemd/system" and is_there(path))
    dry = [] if command == "enable" else ["--dry-run"]
    assert main.main([command, "web", *dry]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "systemd does not run here" in said.err and "confext-watcher exec" in said.err


def test_a_mistyped_unit_that_has_nothing_to_remove_is_told_with_the_one_that_is_like_it(host: Path) -> None:
    mistyped = remove.plan("wbe", settings(host), place=str(host / "units"))
    assert list(show_remove.planned(mistyped)) == [
        "wbe.service takes no part: there is nothing to remove; did you mean web.service?"
    ]
    there = remove.plan("web", settings(host), place=str(host / "units"))
    assert list(show_remove.planned(there)) == ["web.service takes no part: there is nothing to remove"]


def test_one_file_is_one(host: Path) -> None:
    assert "1 file of /etc/passwd," in "\n".join(show_init.planned(plan(host, "web")))
