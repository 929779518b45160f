# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settled means: nobody is writing any more, it is whole, the burst is over. With the programs that people use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from scenarios.place import Place, Service, image, shell, tree
from support import images
from support.needs import tool

images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)

# {0}: an image or tree, {1}: the same among others in a directory, {2}: where it is to be, {3}: a directory for links.
FILES = {
    "cp": "cp {0} {2}",
    "cp --reflink": "cp --reflink=auto --remove-destination {0} {2}",
    "mv": "cp {0} {3}/moved; mv {3}/moved {2}",
    "install": "install -m 0644 {0} {2}",
    "dd": "dd status=none bs=512 if={0} of={2}",
    "a shell": "cat < {0} > {2}",
    "ln": "rm -f {3}/linked; cp {0} {3}/linked; ln -f {3}/linked {2}",
    "ln -s": "cp {0} {3}/aimed_at-$$; ln -sf {3}/aimed_at-$$ {2}",
    "ln -sfn": "mkdir {3}/releases-$$; cp {0} {3}/releases-$$; ln -sfn {3}/releases-$$/$(basename {0}) {2}",
    "chmod": "umask 077; cp {0} {2}; chmod 0644 {2}",
    "rsync": "rsync {0} {2}",
    "rsync --inplace": "rsync --inplace {0} {2}",
    "rsync --delay-updates": "rsync --delay-updates {0} {2}",
    "rsync --partial-dir": "rsync --partial-dir=.part {0} {2}",
    "rsync -a of a directory": "rsync -a {1}/ $(dirname {2})",
    "tar x": "tar c -C {1} . | tar x -C $(dirname {2})",
}
needs_rsync = tool("rsync")
NEEDED = {"rsync": tool("rsync"), "tar": tool("tar")}
TREES = {
    "cp": "cp -r {0} {2}",
    "mv": "cp -r {0} {3}/moved; mv {3}/moved {2}",
    "ln -s": "cp -r {0} {3}/aimed_at-$$; ln -sfn {3}/aimed_at-$$ {2}",
    "rsync -a": "rsync -a {0}/ {2}",
    "rsync -a of a directory": "rsync -a {1}/ $(dirname {2})",
    "rsync -a --delay-updates": "rsync -a --delay-updates {0}/ {2}",
    "rsync -a --inplace": "rsync -a --inplace {0}/ {2}",
    "tar x": "tar c -C {1} . | tar x -C $(dirname {2})",
}


def cases(commands: dict[str, str]) -> list[object]:
    return [
        pytest.param(command, id=name, marks=[mark for word, mark in NEEDED.items() if word in command])
        for name, command in commands.items()
    ]


def upload(service: Service, command: str, version: str) -> None:
    """Bring a version by a command line."""
    place = service.place
    aside = place.path / f"aside-{next(place.numbers)}"
    batch = aside / "batch"
    batch.mkdir(parents=True)
    target = service.versions / f"web_{version}{place.suffix}"
    place.bring(place.confext(version), batch / target.name)
    place.bring(place.confext(version), aside / target.name)
    shell(command, aside / target.name, batch, target, aside)


@images_only
@pytest.mark.parametrize("command", cases(FILES))
def test_an_image_is_applied_once_it_is_whole(service: Service, command: str) -> None:
    upload(service, command, "1.3")
    service.reloaded("1.3")
    upload(service, command, "1.4")
    service.reloaded("1.4")
    service.put("9")
    service.reloaded("9")
    assert service.heard == ["1.3", "1.4", "9"]
    assert not [line for line in service.log_lines() if "refused" in line or "incomplete" in line]


@trees_only
@pytest.mark.parametrize("command", cases(TREES))
def test_a_tree_is_applied_once_it_is_whole(service: Service, command: str) -> None:
    upload(service, command, "1.3")
    service.reloaded("1.3")
    upload(service, command, "1.4")
    service.reloaded("1.4")
    assert (service.etc("extension-release.d/extension-release.web")).exists()


@images_only
@pytest.mark.parametrize(
    "command", cases({name: FILES[name] for name in ("cp", "rsync", "rsync --inplace", "mv", "tar x")})
)
def test_the_same_name_with_other_content(service: Service, command: str) -> None:
    target = service.put("1.3")
    service.reloaded("1.3")
    other = image("web_1.3", "other")
    aside = service.place.path / f"aside-{next(service.place.numbers)}"
    batch = aside / "batch"
    batch.mkdir(parents=True)
    shutil.copy(other, batch / target.name)
    fresh = aside / target.name
    shutil.copy(other, fresh)
    for copied in (fresh, batch / target.name):  # as it is when both were made at another time than just now
        os.utime(copied, (1, 1))
    shell(command, fresh, batch, target, aside)
    service.reloaded("other")
    service.logged("web 1.3 with new content, applied")
    assert service.heard == ["1.3", "other"]


@images_only
def test_the_same_bytes_again_are_nothing_new(service: Service) -> None:
    target = service.put("1.3")
    service.reloaded("1.3")
    shell(
        "cp {0} {1}; touch {1}; chmod 0600 {1}; rsync --ignore-times {0} {1}", image("web_1.3", "1.3"), target
    )
    service.put("1.4")
    service.reloaded("1.4")
    assert service.heard == ["1.3", "1.4"]


@images_only
def test_a_connection_that_dropped_and_came_back(service: Service) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    made = image("web_1.4", "1.4")
    target = service.versions / "web_1.4.raw"
    shell("head -c 1500 {0} > {1}", made, target)
    line = service.logged("web_1.4.raw incomplete: 1500 of [0-9]+ bytes are here", "it keeps web 1.3")
    assert "level=warning" in line
    shell("tail -c +1501 {0} >> {1}", made, target)
    service.reloaded("1.4")
    assert service.heard == ["1.3", "1.4"]


@images_only
def test_two_uploads_at_once_to_one_name(service: Service, tmp_path: Path) -> None:
    """While one of them writes nothing happens; what is mixed cannot be unpacked; one of them again is applied."""
    service.put("1.3")
    service.reloaded("1.3")
    contents = []
    for value in ("one", "two"):
        lines = "".join(f"{value} {number * len(value)}\n" for number in range(100_000)).encode()
        files = {"etc/web.conf": f"{value}\n".encode(), "etc/web.d/lines": lines}
        made = images.image(images.confext(tmp_path / value, "web", files), tmp_path / f"{value}.raw")
        contents.append(made.read_bytes())
    target = service.versions / "web_1.4.raw"
    with target.open("wb", buffering=0) as second:
        with target.open("wb", buffering=0) as first:
            for offset in range(0, max(map(len, contents)), 4096):
                pairs = list(zip((first, second), contents, strict=True))
                for file, content in pairs if offset % 8192 else reversed(pairs):
                    file.write(content[offset : offset + 4096])
        service.put("1.3", value="again")
        service.reloaded("again")
    service.logged("web_1.4.raw refused: ", "it keeps web 1.3")
    shutil.copy(tmp_path / "two.raw", target)
    service.reloaded("two")
    assert service.heard == ["1.3", "again", "two"]


@images_only
@needs_rsync
def test_two_uploads_at_once_that_rename_into_place_are_never_mixed(service: Service, tmp_path: Path) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    values = ("one", "two")
    for value in values:
        files = {"etc/web.conf": f"{value}\n".encode(), "etc/web.d/more": images.noise(2_000_000)}
        images.image(images.confext(tmp_path / value, "web", files), tmp_path / f"{value}.raw")
    target = service.versions / "web_1.4.raw"
    uploads = " & ".join(f"rsync --bwlimit=20M {tmp_path}/{value}.raw {{0}}" for value in values)
    shell(f"{uploads} & wait", target)
    service.put("1.5", value="last")
    service.reloaded("last")
    assert set(service.heard) <= {"1.3", *values, "last"}
    assert not [line for line in service.log_lines() if "refused" in line or "incomplete" in line]


@images_only
@pytest.mark.parametrize(
    "harm",
    [
        "truncate -s 100 {0}",
        ": > {0}",
        "dd status=none bs=4k count=1 conv=notrunc if=/dev/urandom of={0}",
    ],
)
def test_what_happens_to_the_file_afterwards_does_no_harm(service: Service, harm: str) -> None:
    """The store's copy is what is mounted."""
    target = service.put("1.3")
    service.reloaded("1.3")
    shell(harm, target)
    service.logged("web_1.3.raw (refused|incomplete)", "it keeps web 1.3")
    assert service.has("1.3")


@images_only
def test_the_next_start_too_is_on_the_copy(shared: Place) -> None:
    service = shared.start()
    service.kill()
    target = service.put("1.3")
    service.logged("web 1.3 added, accepted")
    shell(": > {0}", target)
    service.logged("web_1.3.raw refused: empty", "it keeps web 1.3")
    assert shared.start(name=service.name).heard == ["1.3"]


def live_tree(service: Service) -> Path:
    """A directory tree in use, to be edited."""
    live = service.drops / "www"
    service.place.bring(tree("www", "one", name="www", extra="etc/web.conf"), live)
    service.reloaded("one")
    return live


@trees_only
@pytest.mark.parametrize(
    "edit",
    [
        "echo two > {0}/etc/web.conf",
        "echo two > {0}/etc/.new; mv {0}/etc/.new {0}/etc/web.conf",
        "sed -i s/one/two/ {0}/etc/web.conf",
        "rm {0}/etc/web.conf; echo two > {0}/etc/web.conf",
        "mkdir {0}/etc/deep; echo two > {0}/etc/deep/file; ln -sf deep/file {0}/etc/web.conf",
    ],
)
def test_an_edit_of_a_live_tree_is_a_drop(service: Service, edit: str) -> None:
    live = live_tree(service)
    shell(edit, live)
    service.reloaded("two")
    service.logged("www with new content, applied")


@trees_only
@pytest.mark.parametrize(
    "leave",
    [
        "echo swap > {0}/etc/.web.conf.swp; rm {0}/etc/.web.conf.swp",
        "echo x > {0}/etc/4913; rm {0}/etc/4913; cp {0}/etc/web.conf {0}/etc/web.conf~",
        "ln -s me@host.1 {0}/etc/.#web.conf; echo x > '{0}/etc/#web.conf#'",
        "mkdir {0}/.git; echo x > {0}/.git/FETCH_HEAD; echo x > {0}/README; mkdir {0}/build; echo x > {0}/build/x",
    ],
)
def test_what_editors_and_git_leave_is_no_drop(service: Service, leave: str) -> None:
    live = live_tree(service)
    heard = len(service.heard)
    shell(leave, live)
    service.put("7")
    service.reloaded("one")
    service.logged("web 0 -> 7 applied")
    (live / "etc/web.conf").write_text("two\n")
    service.reloaded("two")
    assert service.heard[heard:] == ["one", "two"]
    names = {".web.conf.swp", "4913", "web.conf~", ".#web.conf", "#web.conf#"}
    assert not names & set(os.listdir(service.etc(".")))


@trees_only
def test_an_edit_is_seen_when_it_is_settled(service: Service) -> None:
    live = live_tree(service)
    with open(live / "etc/web.conf", "w") as editor:
        editor.write("tw")
        editor.flush()
        (live / "etc/www.conf").write_text("two\n")
        service.put("7")  # another entry is applied meanwhile, and this one is as it was
        service.logged("web 0 -> 7 applied")
        assert service.has("one", "www.conf")
        editor.write("o\n")
    service.logged("www with new content")
    assert service.has("two", "www.conf")


@trees_only
def test_a_file_removed_from_a_live_tree_is_gone(service: Service) -> None:
    live = live_tree(service)
    (live / "etc/www.conf").unlink()
    service.logged("www with new content")
    assert not service.etc("www.conf").exists()
    assert service.has("one")


@trees_only
def test_a_tree_without_its_release_file_is_not_complete_yet(service: Service) -> None:
    growing = service.drops / "www"
    (growing / "etc").mkdir(parents=True)
    (growing / "etc/web.conf").write_text("one\n")
    service.logged("www incomplete: .*etc/extension-release.d")
    release = growing / "etc/extension-release.d"
    release.mkdir()
    (release / "extension-release.www").write_text("ID=_any\n")
    service.reloaded("one")
