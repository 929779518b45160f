# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens to the directories that are watched: whatever it is, the next good drop is applied."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scenarios.place import Place, Service, shell
from support.needs import root
from support.place import eventually
from watcher.rounds.facts import AFTERGLOW_USEC

trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)
images_only = pytest.mark.parametrize("place", ["images"], indirect=True)


def aside(service: Service) -> Path:
    return service.place.path / f"aside-{next(service.place.numbers)}"


@pytest.mark.parametrize("what", ["versions", "drops"])
def test_a_directory_deleted_and_made_again(service: Service, what: str) -> None:
    directory: Path = getattr(service, what)
    shutil.rmtree(directory)
    service.reloaded("nothing")
    service.logged("web 0 removed, applied")
    service.versions.mkdir(parents=True)
    service.put("1.4")
    service.reloaded("1.4")
    service.put("1.5")
    service.reloaded("1.5")


@pytest.mark.parametrize("what", ["versions", "drops"])
def test_a_directory_renamed_and_renamed_back(service: Service, what: str) -> None:
    directory: Path = getattr(service, what)
    away = aside(service)
    directory.rename(away)
    service.reloaded("nothing")
    away.rename(directory)
    service.logged("web 0 added, applied")
    service.put("1.5")
    service.reloaded("1.5")


@pytest.mark.parametrize("what", ["versions", "drops"])
def test_a_directory_replaced_at_once_by_another(service: Service, what: str) -> None:
    """Settled: the service never goes without."""
    directory: Path = getattr(service, what)
    fresh = aside(service)
    (fresh / service.versions.name if what == "drops" else fresh).mkdir(parents=True)
    service.put("1.5", at=fresh / service.versions.name if what == "drops" else fresh)
    directory.rename(aside(service))
    fresh.rename(directory)
    service.reloaded("1.5")
    service.put("1.6")
    service.reloaded("1.6")
    assert service.heard[-2:] == ["1.5", "1.6"]


@pytest.mark.parametrize("what", ["versions", "drops"])
def test_a_directory_replaced_by_a_link(service: Service, what: str) -> None:
    directory: Path = getattr(service, what)
    real = aside(service)
    shutil.copytree(directory, real, symlinks=True)
    shell("mv {0} {1}; ln -s {2} {0}", directory, aside(service), real)
    service.put("1.5", at=real / service.versions.name if what == "drops" else real)
    service.reloaded("1.5")
    directory.unlink()
    directory.symlink_to("nowhere")
    service.reloaded("nothing")
    directory.unlink()
    directory.symlink_to(real)
    service.reloaded("1.5")


@trees_only
def test_a_directory_replaced_by_a_file(service: Service) -> None:
    away = aside(service)
    service.drops.rename(away)
    service.drops.write_text("in the way")
    service.logged("ignored: Not a directory")
    service.reloaded("nothing")
    service.drops.unlink()
    away.rename(service.drops)
    service.logged("web 0 added")


@trees_only
def test_a_directory_that_appears_late_with_all_that_leads_to_it(shared: Place) -> None:
    top = shared.path / f"late-{next(shared.numbers)}"
    versions = top / "a/b/web.confext.d/web.v"
    service = shared.start("--confext-dir", str(versions.parent), "--reload-signal", "HUP", declared=False)
    versions.mkdir(parents=True)
    service.put("1.3", at=versions)
    service.reloaded("1.3")


@root
@pytest.mark.parametrize("what", ["versions", "drops"])
@images_only
def test_a_directory_made_unreadable_changes_nothing(place: Place, what: str) -> None:
    """Nobody removed anything. A daemon without the right to read everything notices."""
    place.start_daemon("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
    service = place.start("--reload-signal", "SIGHUP", "--set", "TrustedUsers=1000")
    service.put("1.3")
    service.reloaded("1.3")
    directory: Path = getattr(service, what)
    os.chown(directory, 1000, 1000)
    directory.chmod(0o700)
    service.logged(f"{re.escape(str(directory))}: cannot be read, .* stays.*: Permission denied")
    service.put("1.4")
    assert service.has("1.3")
    directory.chmod(0o755)
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


@root
@images_only
def test_an_unreadable_image_is_refused(place: Place) -> None:
    place.start_daemon("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")
    service = place.start("--reload-signal", "SIGHUP", "--set", "TrustedUsers=1000")
    service.put("1.3")
    service.reloaded("1.3")
    path = aside(service)
    place.bring(place.confext("1.4"), path)
    os.chown(path, 1000, 1000)
    path.chmod(0o600)
    path.rename(service.versions / "web_1.4.raw")
    service.logged("web_1.4.raw refused: cannot be read: Permission denied; it keeps web 1.3")
    (service.versions / "web_1.4.raw").chmod(0o644)
    service.reloaded("1.4")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    point = tmp_path / "mounted"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "drops", point], check=True)
    yield point
    while subprocess.run(["umount", "--lazy", point], capture_output=True, check=False).returncode == 0:
        pass


def unmount(where: Path) -> None:
    """It may be in use for a moment, while a round comes to its end."""
    words = ["umount", where]
    eventually(lambda: subprocess.run(words, capture_output=True, check=False).returncode == 0)


@root
@images_only
def test_the_file_system_is_unmounted(place: Place, mounted: Path) -> None:
    """Nobody removed anything: what it brought stays, until it is there again and says otherwise."""
    place.start_daemon()
    drops = mounted / "web.confext.d"
    versions = drops / "web.raw.v"
    versions.mkdir(parents=True)
    service = place.start("--confext-dir", str(drops), "--reload-signal", "HUP", declared=False)
    service.put("1.3", at=versions)
    service.reloaded("1.3")
    unmount(mounted)
    service.logged(f"{mounted}: its file system is gone, what was accepted from it stays")
    assert service.has("1.3")
    subprocess.run(["mount", "-t", "tmpfs", "drops", mounted], check=True)
    versions.mkdir(parents=True)
    service.put("1.4", at=versions)
    service.reloaded("1.4")
    assert service.heard == ["nothing", "1.3", "1.4"]


@root
@images_only
def test_unmounted_while_nobody_looks_it_takes_nothing_away(place: Place, mounted: Path) -> None:
    """Not from a daemon that starts later, as after a reboot, nor from a service that does."""
    drops = mounted / "web.confext.d"
    versions = drops / "web.raw.v"
    versions.mkdir(parents=True)
    options = ("--confext-dir", str(drops), "--reload-signal", "HUP")
    more = ("--extension-image", str(place.path / "more.raw"))
    place.start_daemon()
    service = place.start(*options, *more, name="web.service", declared=False)
    service.put("1.3", at=versions)
    service.reloaded("1.3")
    service.logged("web 1.3 added")
    assert place.daemon is not None
    place.daemon.stop()
    unmount(mounted)

    place.start_daemon()
    service.logged(f"{mounted}: its file system is gone, what was accepted from it stays")

    time.sleep(AFTERGLOW_USEC / 1e6)  # else its end would speak against the image
    service.stop()
    place.services.remove(service)
    again = place.start(*options, *more, name="web.service", declared=False)
    assert again.heard == ["1.3"]
    place.bring(place.confext("1", name="more"), place.path / "more.raw")
    again.logged("more added")
    again.reloaded("1.3")
    subprocess.run(["mount", "-t", "tmpfs", "drops", mounted], check=True)
    again.reloaded("nothing")


@root
@images_only
def test_what_is_dropped_beneath_an_unmounted_file_system_is_applied(place: Place, mounted: Path) -> None:
    place.start_daemon()
    service = place.start(
        "--extension-image", str(mounted / "web.raw.v"), "--reload-signal", "HUP", declared=False
    )
    (mounted / "web.raw.v").mkdir()
    service.put("1.3", at=mounted / "web.raw.v")
    service.reloaded("1.3")
    unmount(mounted)
    service.logged("its file system is gone, what was accepted from it stays")
    (mounted / "web.raw.v").mkdir()
    service.put("1.4", at=mounted / "web.raw.v")
    service.reloaded("1.4")


@root
@images_only
def test_a_file_system_mounted_over_a_directory(place: Place, tmp_path: Path) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.reloaded("1.3")
    subprocess.run(["mount", "-t", "tmpfs", "over", service.drops], check=True)
    try:
        service.versions.mkdir()
        service.put("1.4")
        service.reloaded("1.4")
    finally:
        subprocess.run(["umount", service.drops], check=True)
    service.reloaded("1.3")
