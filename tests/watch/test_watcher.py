# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever changes what a path shows is told to whom it concerns: real directories, real programs, real mounts.

That nothing is told is shown with a fence: one inotify queue keeps its order, so what has not been told when the change
of another directory is, made after it, will not be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
import trio.testing

from support.apart import apart
from support.needs import root, tool, userns
from support.told import Told
from watcher.model import Interest, Scope
from watcher.watch.watcher import Watcher

IMAGES = r"web_.*\.raw"

own_mounts = apart("unshare", "--mount", "--propagation", "private")
own_limits = apart("unshare", "--user", "--map-root-user")
unprivileged = apart(*(("setpriv", "--bounding-set=-all") if os.geteuid() == 0 else ()))


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    directory = tmp_path / "etc/web.raw.v"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "build/web_1.raw"
    path.parent.mkdir()
    path.write_bytes(os.urandom(100_000))
    return path


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


PROGRAMS = {
    "cp": "cp {image} {drop}",
    "mv": "mv {image} {drop}",
    "rsync": "rsync -a {image} {drop}/",
    "rsync --inplace": "rsync -a --inplace {image} {drop}/",
    "rsync --delay-updates": "rsync -a --delay-updates {image} {drop}/",
    "rsync --partial-dir": "rsync -a --partial-dir=.part {image} {drop}/",
    "ln": "ln {image} {drop}/web_1.raw",
    "ln -s": "ln -s {image} {drop}/web_1.raw",
    "ln -sfn": "ln -sfn {image} {drop}/web_1.raw",
    "install": "install -m 644 {image} {drop}/web_1.raw",
    "tar": "tar -C {image.parent} -cf - web_1.raw | tar -C {drop} -xf -",
    "dd": "dd if={image} of={drop}/web_1.raw status=none",
}


@pytest.mark.parametrize("program", [pytest.param(p, marks=tool(p.split()[0])) for p in PROGRAMS])
async def test_a_drop_by_any_program_is_told(told: Told, drop: Path, image: Path, program: str) -> None:
    told.watch(drop, pattern=IMAGES)
    run("sh", "-c", PROGRAMS[program].format(drop=drop, image=image))
    assert await told.keys() == {"web"}


@pytest.mark.parametrize("program", [pytest.param(p, marks=tool(p.split()[0])) for p in PROGRAMS])
async def test_a_second_drop_of_the_same_name_is_told(
    told: Told, drop: Path, image: Path, program: str
) -> None:
    (drop / "web_1.raw").write_bytes(b"the one before")
    told.watch(drop, pattern=IMAGES)
    flags = {"ln": "ln -f", "ln -s": "ln -sf"}
    command = PROGRAMS[program].replace(program, flags.get(program, program), 1)
    run("sh", "-c", command.format(drop=drop, image=image))
    assert await told.keys() == {"web"}


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.rename(file.with_name(".hidden")),
        lambda file: file.rename(file.with_name("web_2.raw")),
        lambda file: file.chmod(0),
        lambda file: os.utime(file, (1, 1)),
        lambda file: file.write_bytes(b"other"),
        lambda file: file.with_name("web_2.raw").mkdir(),
    ],
    ids=["unlink", "rename away", "rename", "chmod", "touch", "write", "mkdir"],
)
async def test_a_change_of_an_image_is_told(told: Told, drop: Path, change: Callable[[Path], object]) -> None:
    (drop / "web_1.raw").write_bytes(b"image")
    told.watch(drop, pattern=IMAGES)
    change(drop / "web_1.raw")
    assert await told.keys() == {"web"}


async def test_the_end_of_a_stalled_upload_is_told(told: Told, drop: Path) -> None:
    told.watch(drop, pattern=IMAGES)
    with (drop / "web_1.raw").open("wb", buffering=0) as upload:
        upload.write(b"half")
        assert await told.keys() == {"web"}
        upload.write(b"half")
        assert await told.keys() == set(), "each write of an upload wakes the daemon"
    assert await told.keys() == {"web"}


async def test_names_that_do_not_matter_are_not_told(told: Told, drop: Path) -> None:
    told.watch(drop, pattern=IMAGES)
    for name in (".web_1.raw.Xa81b", "web_1.raw.part", "web_1.raw~", "readme\nweb_1.raw", "\udcff"):
        (drop / name).write_bytes(b"")
        (drop / name).unlink()
    assert await told.keys() == set()


async def test_a_name_that_is_not_utf8_is_told(told: Told, drop: Path) -> None:
    told.watch(os.fsdecode(os.fsencode(drop) + b"/\xff\n.v"), pattern=IMAGES)
    os.mkdir(os.fsencode(drop) + b"/\xff\n.v")
    assert await told.keys() == {"web"}
    Path(os.fsdecode(os.fsencode(drop) + b"/\xff\n.v/web_\xfe\n.raw")).touch()
    assert await told.keys() == {"web"}


async def test_one_directory_of_many_services_is_one_report(told: Told, drop: Path) -> None:
    for number in range(100):
        told.watch(drop, pattern=rf"(web|app{number % 7})_.*", key=f"{number}")
    (drop / "web_1.raw").touch()
    assert await told.reports() == [frozenset(map(str, range(100)))]


async def test_only_those_whose_pattern_matches_are_told(told: Told, drop: Path) -> None:
    told.watch(drop, pattern=r"web_.*", key="web")
    told.watch(drop, pattern=r"app_.*", key="app")
    (drop / "app_1.raw").touch()
    assert await told.keys() == {"app"}


async def test_new_interests_say_look_again_and_known_ones_do_not(told: Told, drop: Path) -> None:
    here = Interest(str(drop))
    there = Interest(str(drop.parent))
    assert told.watcher.set("web", [here])
    assert not told.watcher.set("web", [here])
    assert told.watcher.set("web", [here, there])
    assert not told.watcher.set("web", [there])
    # Watched by the kernel already, but what happened so far was not told to this one.
    assert told.watcher.set("app", [there])


async def test_what_was_dropped_is_not_told_any_more(told: Told, drop: Path) -> None:
    told.watch(drop)
    told.watch(drop, key="app")
    told.watcher.drop("web")
    told.watcher.drop("never there")
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"app"}
    told.watcher.set("app", [])
    (drop / "web_2.raw").touch()
    assert await told.keys() == set()


async def test_a_rename_of_ones_own_is_told_to_the_others_only(told: Told, drop: Path) -> None:
    told.watch(drop, pattern=IMAGES)
    told.watch(drop, key="app")
    (drop / "web_1+3.raw").touch()
    await told.keys()
    old, new = drop / "web_1+3.raw", drop / "web_1+2-1.raw"
    with told.watcher.renaming("web", str(old), str(new)):
        old.rename(new)
    assert await told.keys() == {"app"}
    new.rename(old)
    assert await told.keys() == {"web", "app"}


async def test_a_rename_of_ones_own_that_failed_hides_no_later_one(told: Told, drop: Path) -> None:
    told.watch(drop, pattern=IMAGES)
    with (
        pytest.raises(FileNotFoundError),
        told.watcher.renaming("web", str(drop / "web_1.raw"), str(drop / "web_2.raw")),
    ):
        (drop / "web_1.raw").rename(drop / "web_2.raw")
    (drop / ".hidden").touch()
    (drop / ".hidden").rename(drop / "web_2.raw")
    assert await told.keys() == {"web"}


def test_a_relative_path_is_a_mistake_of_the_caller(told: Told) -> None:
    with pytest.raises(ValueError, match="not an absolute path: 'etc/web'"):
        told.watch("etc/web")


# Directories that come and go


async def test_a_directory_that_appears_is_told(told: Told, tmp_path: Path) -> None:
    told.watch(tmp_path / "a/b/c")
    (tmp_path / "a/b").mkdir(parents=True)
    assert await told.keys() == set()
    (tmp_path / "a/b/c").mkdir()
    assert await told.keys() == {"web"}
    (tmp_path / "a/b/c/web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_what_was_in_a_directory_before_it_was_watched_is_told_with_its_appearance(
    told: Told, tmp_path: Path
) -> None:
    told.watch(tmp_path / "a/b")
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_directory_removed_and_made_anew_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    drop.rmdir()
    assert await told.keys() == {"web"}
    drop.mkdir()
    assert await told.keys() == {"web"}
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_directory_removed_and_made_anew_at_once_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    drop.rmdir()
    drop.mkdir()
    assert await told.keys() == {"web"}
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_directory_somebody_stands_in_is_told_when_removed(told: Told, drop: Path) -> None:
    told.watch(drop)
    held = os.open(drop, os.O_PATH)
    try:
        shutil.rmtree(drop.parent)
        drop.mkdir(parents=True)
        assert await told.keys() == {"web"}
        (drop / "web_1.raw").touch()
        assert await told.keys() == {"web"}
    finally:
        os.close(held)


async def test_a_directory_renamed_away_and_back_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    away = drop.rename(drop.with_name("away"))
    assert await told.keys() == {"web"}
    (away / "web_1.raw").touch()
    assert await told.keys() == set()
    away.rename(drop)
    assert await told.keys() == {"web"}


async def test_an_ancestor_replaced_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    drop.parent.rename(drop.parent.with_name("etc.old"))
    drop.mkdir(parents=True)
    assert await told.keys() == {"web"}
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_directory_replaced_by_a_link_is_told(told: Told, drop: Path, tmp_path: Path) -> None:
    told.watch(drop)
    drop.rename(tmp_path / "elsewhere")
    drop.symlink_to(tmp_path / "elsewhere")
    assert await told.keys() == {"web"}
    (tmp_path / "elsewhere/web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_directory_replaced_by_a_file_and_back_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    drop.rmdir()
    drop.touch()
    assert await told.keys() == {"web"}
    drop.unlink()
    drop.mkdir()
    assert await told.keys() == {"web"}


# Links on the way


async def test_a_link_pointed_elsewhere_is_told(told: Told, tmp_path: Path) -> None:
    for name in ("v1/web.raw.v", "v2/web.raw.v"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "current").symlink_to("v1")
    told.watch(tmp_path / "current/web.raw.v")
    run("ln", "-sfn", "v2", tmp_path / "current")
    assert await told.keys() == {"web"}
    (tmp_path / "v1/web.raw.v/web_1.raw").touch()
    assert await told.keys() == set()
    (tmp_path / "v2/web.raw.v/web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_every_link_of_a_chain_counts(told: Told, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "x/one").mkdir(parents=True)
    (tmp_path / "x/two").mkdir()
    (tmp_path / "a/first").symlink_to("../second")
    (tmp_path / "second").symlink_to(tmp_path / "x/../x/third")
    (tmp_path / "x/third").symlink_to("one")
    told.watch(tmp_path / "a/first")
    for link, target in (("x/third", "two"), ("second", "x/one"), ("a/first", "../x/two")):
        run("ln", "-sfn", target, tmp_path / link)
        assert await told.keys() == {"web"}, link
    (tmp_path / "x/two/web_1.raw").touch()
    assert await told.keys() == {"web"}


async def test_a_dangling_link_is_told_when_it_leads_somewhere(told: Told, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("to/be/made")
    told.watch(tmp_path / "link")
    (tmp_path / "to/be/made").mkdir(parents=True)
    assert await told.keys() == {"web"}


async def test_links_in_a_circle_are_told_when_broken(told: Told, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    told.watch(tmp_path / "a")
    run("ln", "-sfn", "fence", tmp_path / "b")
    assert await told.keys() == {"web"}


async def test_a_directory_that_a_link_passes_and_leaves_again_counts(told: Told, tmp_path: Path) -> None:
    (tmp_path / "detour").mkdir()
    (tmp_path / "goal").mkdir()
    (tmp_path / "link").symlink_to("detour/../goal")
    told.watch(tmp_path / "link")
    (tmp_path / "detour").rmdir()
    assert await told.keys() == {"web"}


# Trees


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "site/etc/app/conf.d"
    directory.mkdir(parents=True)
    (directory / "a.conf").write_text("a")
    return tmp_path / "site"


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "etc/app/conf.d/a.conf").write_text("b"),
        lambda tree: (tree / "etc/app/conf.d/a.conf").unlink(),
        lambda tree: (tree / "etc/app/conf.d/a.conf").chmod(0o600),
        lambda tree: os.truncate(tree / "etc/app/conf.d/a.conf", 0),
        lambda tree: (tree / "etc/app").chmod(0o700),
        lambda tree: tree.chmod(0o700),
        lambda tree: os.setxattr(tree / "etc/app", "user.x", b"y"),
        lambda tree: shutil.rmtree(tree / "etc/app"),
        lambda tree: (tree / "etc/app").rename(tree / "app"),
        lambda tree: (tree / "new").symlink_to("etc"),
    ],
    ids=[
        "write",
        "unlink",
        "chmod",
        "truncate",
        "chmod dir",
        "chmod top",
        "xattr",
        "rm -r",
        "rename",
        "link",
    ],
)
async def test_a_change_anywhere_in_a_tree_is_told(
    told: Told, tree: Path, change: Callable[[Path], object]
) -> None:
    told.watch(tree, Scope.TREE)
    change(tree)
    assert await told.keys() == {"web"}


@tool("rsync")
async def test_a_tree_that_rsync_brings_is_told_and_watched_to_its_last_directory(
    told: Told, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "drop").mkdir()
    told.watch(tmp_path / "drop", Scope.TREE)
    run("rsync", "-a", f"{tree}/", tmp_path / "drop/")
    assert await told.keys() == {"web"}
    (tmp_path / "drop/etc/app/conf.d/a.conf").write_text("b")
    assert await told.keys() == {"web"}


async def test_a_file_made_in_a_new_directory_before_that_is_watched_is_told(told: Told, tree: Path) -> None:
    told.watch(tree, Scope.TREE)
    deep = tree / "/".join("abcdefghijklmnopqrstuvwxyz")
    deep.mkdir(parents=True)
    (deep / "file").touch()
    assert await told.keys() == {"web"}
    (deep / "file").write_text("x")
    assert await told.keys() == {"web"}


async def test_a_directory_moved_out_of_a_tree_is_not_told_any_more(
    told: Told, tree: Path, tmp_path: Path
) -> None:
    told.watch(tree, Scope.TREE)
    away = (tree / "etc/app").rename(tmp_path / "away")
    assert await told.keys() == {"web"}
    (away / "conf.d/a.conf").write_text("b")
    (away / "conf.d/more").mkdir()
    assert await told.keys() == set()
    away.rename(tree / "etc/app")
    assert await told.keys() == {"web"}
    (tree / "etc/app/conf.d/a.conf").write_text("c")
    assert await told.keys() == {"web"}


async def test_links_in_a_tree_are_not_followed(told: Told, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    told.watch(tree, Scope.TREE)
    (tmp_path / "elsewhere/file").touch()
    assert await told.keys() == set()


async def test_a_tree_within_a_tree_outlives_it(told: Told, tree: Path) -> None:
    told.watch(tree, Scope.TREE, key="outer")
    told.watch(tree / "etc/app", Scope.TREE, key="inner")
    (tree / "etc/app/conf.d/a.conf").write_text("b")
    assert await told.keys() == {"outer", "inner"}
    told.watcher.drop("outer")
    (tree / "etc/file").touch()
    assert await told.keys() == set()
    (tree / "etc/app/conf.d/a.conf").write_text("c")
    assert await told.keys() == {"inner"}


# Permissions


@unprivileged
@tool("setpriv")
async def test_a_directory_made_unreadable_and_readable_again_is_told(told: Told, drop: Path) -> None:
    (drop / "web_1.raw").touch()
    told.watch(drop)
    for mode in (0, 0o755, 0o100, 0o755, 0o600, 0o755):
        drop.chmod(mode)
        assert await told.keys() == {"web"}
    (drop / "web_2.raw").touch()
    assert await told.keys() == {"web"}


@unprivileged
@tool("setpriv")
async def test_an_ancestor_made_impassable_and_passable_again_is_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    for mode in (0, 0o755):
        drop.parent.chmod(mode)
        assert await told.keys() == {"web"}


@unprivileged
@tool("setpriv")
async def test_a_directory_that_was_unreadable_from_the_start_is_told_when_readable(
    told: Told, drop: Path
) -> None:
    for directory in (drop, drop.parent):
        directory.chmod(0)
        told.watch(drop, key=directory.name)
        assert await told.keys() == set()
    drop.parent.chmod(0o755)
    drop.chmod(0o755)
    assert await told.keys() == {drop.name, drop.parent.name}


@unprivileged
@tool("setpriv")
async def test_a_directory_one_may_pass_but_not_read_still_tells_of_its_end(told: Told, drop: Path) -> None:
    drop.parent.chmod(0o100)
    told.watch(drop)
    assert told.watcher.remarks() == ()
    drop.parent.rename(drop.parent.with_name("etc.old"))
    assert await told.keys() == {"web"}


@unprivileged
@tool("setpriv")
async def test_what_may_appear_unseen_in_an_unreadable_directory_is_looked_at_from_time_to_time(
    told: Told, drop: Path, autojump_clock: trio.testing.MockClock
) -> None:
    drop.rmdir()
    drop.parent.chmod(0o100)
    told.watch(drop)
    assert [remark.path for remark in told.watcher.remarks()] == [str(drop)]
    assert "Permission denied" in told.watcher.remarks()[0].text
    assert await told.next() == {"web"}
    drop.parent.chmod(0o755)
    assert await told.keys() == set()
    assert told.watcher.remarks() == ()


# Mounts


def mount(*arguments: str | Path) -> None:
    run("mount", *arguments)


def mount_tmpfs(where: Path) -> None:
    mount("-t", "tmpfs", "-o", "size=1M", "tmpfs", where)


@root
@own_mounts
async def test_a_file_system_unmounted_and_mounted_again_is_told(told: Told, drop: Path) -> None:
    mount_tmpfs(drop.parent)
    drop.mkdir()
    told.watch(drop)
    for _ in range(2):
        run("umount", drop.parent)
        assert await told.keys() == {"web"}
        (drop / "web_1.raw").touch()
        assert await told.keys() == {"web"}
        mount_tmpfs(drop.parent)
        assert await told.keys() == {"web"}
        drop.mkdir()
        assert await told.keys() == {"web"}
        (drop / "web_2.raw").touch()
        assert await told.keys() == {"web"}
    run("umount", drop.parent)


@root
@own_mounts
@pytest.mark.parametrize("when", ["waiting", "busy"])
async def test_a_mount_alone_wakes_up(when: str) -> None:
    drop = Path("/mnt/drop")  # not below /tmp, where other programs' files go and wake us up
    mount_tmpfs(drop.parent)
    drop.mkdir()
    with Watcher() as watcher:
        watcher.set("web", [Interest(str(drop))])
        drop.chmod(0o700)
        async with aclosing(watcher.changes()) as changes:
            assert await anext(changes) == {"web"}
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    if when == "busy":
                        mount_tmpfs(drop)
                    nursery.start_soon(anext, changes)
                    await trio.testing.wait_all_tasks_blocked()
                    if when == "waiting":
                        mount_tmpfs(drop)
    run("umount", "--recursive", drop.parent)


@root
@own_mounts
async def test_a_directory_mounted_over_is_told(told: Told, drop: Path, tmp_path: Path) -> None:
    told.watch(drop)
    (tmp_path / "other").mkdir()
    mount("--bind", tmp_path / "other", drop)
    assert await told.keys() == {"web"}
    (tmp_path / "other/web_1.raw").touch()
    assert await told.keys() == {"web"}
    run("umount", drop)
    assert await told.keys() == {"web"}
    (tmp_path / "other/web_2.raw").touch()
    assert await told.keys() == set()
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}


@root
@own_mounts
async def test_a_file_system_unmounted_while_somebody_holds_it_is_told(told: Told, drop: Path) -> None:
    mount_tmpfs(drop)
    told.watch(drop)
    held = os.open(drop, os.O_PATH)
    try:
        run("umount", "--lazy", drop)
        assert await told.keys() == {"web"}
        (drop / "web_1.raw").touch()
        assert await told.keys() == {"web"}
    finally:
        os.close(held)


@root
@own_mounts
async def test_mounts_that_do_not_matter_are_not_told(told: Told, drop: Path, tmp_path: Path) -> None:
    told.watch(drop, pattern=IMAGES)
    told.watch(drop.parent / "not/there", key="missing")
    for place in (tmp_path / "beside", drop / "other", drop / "web_1.raw/below"):
        place.mkdir(parents=True)
        await told.keys()
        mount_tmpfs(place)
        assert await told.keys() == set(), place
        run("umount", place)
        assert await told.keys() == set(), place


@root
@own_mounts
async def test_what_was_mounted_and_unmounted_again_is_told_to_all_for_they_may_have_looked(
    told: Told, drop: Path
) -> None:
    told.watch(drop)
    await told.keys()
    mount_tmpfs(drop)
    run("umount", drop)
    assert await told.keys() == {"web"}


@root
@own_mounts
async def test_an_ancestor_mounted_over_with_the_same_below_is_not_told(told: Told, drop: Path) -> None:
    told.watch(drop)
    mount("--bind", drop.parent, drop.parent)
    assert await told.keys() == set()
    run("umount", drop.parent)
    assert await told.keys() == set()
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}


@root
@own_mounts
async def test_an_image_mounted_over_is_told(told: Told, drop: Path, tmp_path: Path) -> None:
    for file in (drop / "web_1.raw", tmp_path / "other"):
        file.touch()
    told.watch(drop, pattern=IMAGES)
    mount("--bind", tmp_path / "other", drop / "web_1.raw")
    assert await told.keys() == {"web"}
    run("umount", drop / "web_1.raw")
    assert await told.keys() == {"web"}


@root
@own_mounts
async def test_a_mount_within_a_tree_is_told_and_watched(told: Told, tree: Path) -> None:
    told.watch(tree, Scope.TREE)
    place = tree / "etc/app \\ 2"
    place.mkdir()
    assert await told.keys() == {"web"}
    mount_tmpfs(place)
    assert await told.keys() == {"web"}
    (place / "file").touch()
    assert await told.keys() == {"web"}
    place.chmod(0o700)
    assert await told.keys() == {"web"}
    run("umount", place)
    assert await told.keys() == {"web"}
    (place / "file").touch()
    assert await told.keys() == {"web"}


@root
@own_mounts
async def test_a_directory_mounted_at_two_places_is_told_for_both(
    told: Told, drop: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    mount("--bind", drop, other)
    told.watch(drop, key="web")
    told.watch(other, key="app")
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web", "app"}
    run("umount", other)
    assert await told.keys() == {"app"}
    (drop / "web_2.raw").touch()
    assert await told.keys() == {"web"}


# Limits


@pytest.mark.parametrize("scope", Scope)
@userns
@own_limits
async def test_at_the_watch_limit_it_is_said_once_and_looked_at_from_time_to_time(
    told: Told, drop: Path, scope: Scope, autojump_clock: trio.testing.MockClock
) -> None:
    (drop / "sub").mkdir()
    limit = Path("/proc/sys/user/max_inotify_watches")
    before = limit.read_text()
    limit.write_text("0")
    told.watch(drop, scope)
    (remark,) = told.watcher.remarks()
    assert remark.path == str(drop)
    assert "the limit fs.inotify.max_user_watches is reached" in remark.text
    for _ in range(3):
        assert await told.next() == {"web"}
    limit.write_text(before)
    assert await told.next() == {"web"}
    assert told.watcher.remarks() == ()
    (drop / "web_1.raw").touch()
    assert await told.keys() == {"web"}
    assert await told.next() is None


@userns
@own_limits
async def test_the_watch_limit_reached_while_waiting_is_heeded_too(
    told: Told, drop: Path, autojump_clock: trio.testing.MockClock
) -> None:
    await told.keys()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told.expect, {"web"})
        await trio.testing.wait_all_tasks_blocked()
        Path("/proc/sys/user/max_inotify_watches").write_text("0")
        told.watch(drop)
    Path("/proc/sys/user/max_inotify_watches").write_text("1000")


@userns
@own_limits
async def test_a_tree_leaves_watches_to_the_directories_of_others(drop: Path, tree: Path) -> None:
    """Who may drop trees could otherwise have all of them, and everybody else's drops would be late."""
    limit = Path("/proc/sys/user/max_inotify_watches")
    before = limit.read_text()
    limit.write_text("40")
    for number in range(100):
        (tree / f"{number}").mkdir()
    with Watcher() as watcher:
        watcher.set("trees", [Interest(str(tree), scope=Scope.TREE)])
        (remark,) = watcher.remarks()
        assert "max_user_watches" in remark.text
        watcher.set("others", [Interest(str(drop))])
        assert watcher.remarks() == (remark,)
    limit.write_text(before)


@userns
@own_limits
async def test_at_the_watch_limit_within_a_tree_the_rest_is_watched_later(
    told: Told, tree: Path, autojump_clock: trio.testing.MockClock
) -> None:
    told.watch(tree, Scope.TREE)
    limit = Path("/proc/sys/user/max_inotify_watches")
    before = limit.read_text()
    limit.write_text("0")
    (tree / "more/and/more").mkdir(parents=True)
    assert await told.keys() == {"web"}
    assert [remark.path for remark in told.watcher.remarks()] == [str(tree)]
    limit.write_text(before)
    assert await told.next() == {"web"}
    assert told.watcher.remarks() == ()
    (tree / "more/and/more/file").touch()
    assert await told.keys() == {"web"}


@userns
@own_limits
async def test_without_an_inotify_instance_the_setting_is_named() -> None:
    Path("/proc/sys/user/max_inotify_instances").write_text("0")
    with pytest.raises(OSError, match=r"fs\.inotify\.max_user_instances"):
        Watcher()


async def test_when_the_queue_overflows_everything_is_told_and_found_again(
    told: Told, drop: Path, tree: Path
) -> None:
    told.watch(drop, pattern=IMAGES)
    told.watch(tree, Scope.TREE, key="tree")
    told.watch(drop.parent / "not/there", key="missing")
    events = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(events // 2 + 1):
        (drop / "x").mkdir()
        (drop / "x").rmdir()
    # Lost: all that says that these are others now.
    shutil.rmtree(drop)
    drop.mkdir()
    (tree / "etc/app").rename(tree / "etc/away")
    (tree / "etc/app").mkdir()
    assert await told.keys() == {"web", "tree", "missing"}
    for path, key in (
        (drop / "web_1.raw", "web"),
        (tree / "etc/app/x", "tree"),
        (tree / "etc/away/x", "tree"),
    ):
        path.touch()
        assert await told.keys() == {key}


# What it costs


async def test_while_nothing_happens_nothing_wakes_up(
    told: Told, drop: Path, tree: Path, autojump_clock: trio.testing.MockClock
) -> None:
    told.watch(drop, pattern=IMAGES)
    told.watch(tree, Scope.TREE, key="tree")
    told.watch(tree / "not/there", key="missing")
    (drop / "web_1.raw").touch()
    await told.keys()
    assert await told.next() is None


@root
@own_mounts
async def test_what_is_watched_can_be_unmounted(told: Told, drop: Path) -> None:
    mount_tmpfs(drop)
    (drop / "a/b").mkdir(parents=True)
    told.watch(drop / "a/b")
    told.watch(drop, Scope.TREE, key="tree")
    (drop / "a/b/file").touch()
    await told.keys()
    run("umount", drop)  # would be "target is busy"


def test_at_the_end_nothing_stays_open(drop: Path, tree: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with Watcher() as watcher:
        watcher.set("web", [Interest(str(drop)), Interest(str(tree), Scope.TREE)])
        assert len(os.listdir("/proc/self/fd")) > len(before)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_nobody_is_interested_in_is_not_watched_any_more(drop: Path, tree: Path) -> None:
    def watches() -> int:
        infos = [
            Path(f"/proc/self/fdinfo/{fd}").read_text() for fd in os.listdir("/proc/self/fd") if inotify(fd)
        ]
        return sum(info.count("inotify wd:") for info in infos)

    def inotify(fd: str) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify"
        except FileNotFoundError:
            return False

    with Watcher() as watcher:
        watcher.set("web", [Interest(str(drop.parent))])
        before = watches()
        for number in range(3):
            watcher.set(
                f"{number}", [Interest(str(drop)), Interest(str(tree), Scope.TREE), Interest("/no/such")]
            )
        assert watches() > before
        for number in range(3):
            watcher.drop(f"{number}")
        assert watches() == before
