# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two programs that upload to one name at once: neither counts, until one of them alone has written the file.

That is `watch/writers.py`, with the programs that people use. What they leave here can be read: only who wrote tells.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from scenarios.place import Place, Service, shell
from support import images
from support.needs import root, tool
from support.writer import Writer

pytestmark = [root, tool("mksquashfs")]
shared_images = pytest.mark.parametrize("shared", ["images"], indirect=True)
images_only = pytest.mark.parametrize("place", ["images"], indirect=True)

SFTP_SERVER = Path("/usr/lib/openssh/sftp-server")


def made(directory: Path, value: str) -> Path:
    """An image of 200 KiB that can be read, too, when parts of another one like it are in it."""
    lines = "".join(f"{value} {number:06d}\n" for number in range(20_000)).encode()
    tree = images.confext(
        directory / value, "web", {"etc/web.conf": f"{value}\n".encode(), "etc/web.d/lines": lines}
    )
    target = directory / f"{value}.raw"
    plain = ("-noI", "-noD", "-noF", "-noX", "-all-time", "0", "-mkfs-time", "0")
    subprocess.run(["mksquashfs", tree, target, "-quiet", "-no-progress", "-noappend", *plain], check=True)
    return target


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("sources")
    return made(directory, "one"), made(directory, "two")


def blend(target: Path, one: Path, two: Path) -> tuple[int, int]:
    """Write both at once; the PIDs."""
    with Writer(target, one) as first, Writer(target, two) as second:
        first("ot")
        second("ot")
        first("w")
        second("w")
        second("w")
        second("c")
        first("w")
        first("c")
        assert target.read_bytes() not in (one.read_bytes(), two.read_bytes())
        return first.pid, second.pid


@shared_images
@pytest.mark.parametrize(
    "again", ["cp {1} {0}", "rsync --ignore-times {1} {0}", "cp {1} {0}.new && mv {0}.new {0}"]
)
def test_what_two_programs_wrote_at_once_does_not_count_until_one_has_written_alone(
    service: Service, sources: tuple[Path, Path], again: str
) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    target = service.versions / "web_1.4.raw"
    first, second = blend(target, *sources)
    line = service.logged("web_1.4.raw refused: two programs wrote to it at once", "copy it again")
    assert f"python3 {second}" in line or f" {second}" in line
    assert str(first) in line and "it keeps web 1.3" in line
    shell(again, target, sources[1])
    service.reloaded("two")
    assert service.heard == ["1.3", "two"]


@shared_images
def test_wait_and_status_say_that_it_has_to_be_copied_again(
    service: Service, sources: tuple[Path, Path]
) -> None:
    target = service.versions / "web_1.4.raw"
    blend(target, *sources)
    done = service.place.run("wait", "--timeout=60", service.name, str(target), check=False)
    assert done.returncode == 1
    assert "two programs wrote to it at once" in done.stdout + done.stderr
    assert "copy it again" in done.stdout + done.stderr


@shared_images
def test_a_file_that_was_there_before_is_overwritten_by_two(
    service: Service, sources: tuple[Path, Path]
) -> None:
    """No name comes or goes: all that tells of the first one is that it opens the file."""
    target = service.versions / "web_1.4.raw"
    shutil.copy(sources[0], target)
    service.reloaded("one")
    blend(target, *sources)
    service.logged("web_1.4.raw refused: two programs wrote to it at once")
    shell("cp {1} {0}", target, sources[1])
    service.reloaded("two")


@shared_images
def test_who_knows_that_it_is_whole_touches_it(service: Service, sources: tuple[Path, Path]) -> None:
    """The same was uploaded twice: it is whole, and may be let in without another upload."""
    target = service.versions / "web_1.4.raw"
    with Writer(target, sources[0]) as first, Writer(target, sources[0]) as second:
        first("otw")
        second("oww")
        first("wc")
        second("c")
    service.logged("web_1.4.raw refused: two programs wrote to it at once")
    shell("touch {0}", target)
    service.reloaded("one")


@shared_images
def test_while_either_writes_it_is_said_who(service: Service, sources: tuple[Path, Path]) -> None:
    target = service.versions / "web_1.4.raw"
    with Writer(target, sources[0]) as first:
        first("otw")
        done = service.place.run("wait", "--timeout=1", service.name, str(target), check=False)
        assert done.returncode == 4
        assert "open for writing by python" in done.stdout + done.stderr
        assert f"(pid {first.pid}, user root)" in done.stdout + done.stderr
        first("wc")
    service.reloaded("one")


# What one program does, or two do one after the other. {0}: the target, {1}: an image, {2}: another.
ALONE = {
    "cp over it": "cp {2} {0}; cp {1} {0}",
    "dd in a loop": (
        "for at in $(seq 0 20); do dd status=none bs=16k conv=notrunc skip=$at seek=$at if={1} of={0}; done"
    ),
    "rsync --append": "head -c 100000 {1} > {0}; rsync --append {1} {0}",
    "rsync --inplace": "cp {2} {0}; rsync --inplace --ignore-times {1} {0}",
    "a shell and its children": "exec 3> {0}; (head -c 50000 >&3; cat >&3) < {1}",
    "a child that closes it later": "(cat {1}; sleep 0.1) > {0} & wait",
    "preallocated": "fallocate -l $(stat -c %s {1}) {0}; dd status=none conv=notrunc if={1} of={0}",
    "with readers": "tail -f {0} & cat {1} > {0}; cat {0} > /dev/null; kill $!",
}


@shared_images
@pytest.mark.parametrize("command", ALONE.values(), ids=ALONE)
def test_one_program_is_one_writer(service: Service, sources: tuple[Path, Path], command: str) -> None:
    target = service.versions / "web_1.4.raw"
    if "tail" in command:
        target.touch()
    shell(command, target, sources[0], sources[1])
    service.reloaded("one")
    assert not [line for line in service.log_lines() if "two programs" in line]


@shared_images
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(("otwcowc",), id="opened for each part"),
        pytest.param(("ootwwcc",), id="two handles"),
        pytest.param(("oo", "twwc", "c"), id="two handles, closed one after the other"),
    ],
)
def test_a_process_that_opens_it_several_times_is_one(
    service: Service, sources: tuple[Path, Path], steps: tuple[str, ...]
) -> None:
    target = service.versions / "web_1.4.raw"
    with Writer(target, sources[0]) as writer:
        for step in steps:
            writer(step)
    service.reloaded("one")
    assert not [line for line in service.log_lines() if "two programs" in line]


@shared_images
@tool("sftp")
@pytest.mark.skipif(not SFTP_SERVER.exists(), reason="needs openssh-sftp-server")
def test_an_sftp_server_is_one_writer(service: Service, sources: tuple[Path, Path]) -> None:
    target = service.versions / "web_1.4.raw"
    shell(
        f"printf 'put {{1}} {{0}}\\nreput {{1}} {{0}}\\n' | sftp -q -D {SFTP_SERVER} >/dev/null",
        target,
        sources[0],
    )
    service.reloaded("one")
    assert not [line for line in service.log_lines() if "two programs" in line]


@images_only
def test_the_next_daemon_knows_it_too(place: Place, sources: tuple[Path, Path]) -> None:
    place.start_daemon()
    service = place.start()
    target = service.versions / "web_1.4.raw"
    blend(target, *sources)
    service.logged("web_1.4.raw refused: two programs wrote to it at once")
    assert place.daemon is not None
    place.daemon.stop()
    place.start_daemon()
    service.logged("web_1.4.raw refused: two programs wrote to it at once")
    target.chmod(0o600)
    service.put("1.3")
    service.reloaded("1.3")
    shell("cp {1} {0}", target, sources[1])
    service.reloaded("two")
    assert service.heard == ["nothing", "1.3", "two"]


@images_only
def test_who_still_writes_when_the_daemon_comes_is_found(place: Place, sources: tuple[Path, Path]) -> None:
    place.start_daemon()
    service = place.start()
    assert place.daemon is not None
    place.daemon.stop()
    target = service.versions / "web_1.4.raw"
    with Writer(target, sources[0]) as first, Writer(target, sources[1]) as second:
        first("otw")
        place.start_daemon()
        service.put("1.3")
        service.reloaded("1.3")
        second("owwc")
        first("wc")
        service.logged(
            "web_1.4.raw refused: two programs wrote to it at once", str(first.pid), str(second.pid)
        )
