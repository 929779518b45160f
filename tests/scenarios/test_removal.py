# SPDX-License-Identifier: LGPL-2.1-or-later
"""Back to the version before, back to the original `/etc`; what the sandbox mounted below it stays, all the time."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from scenarios.place import PYTHON, Place, Service, until

# Something that every /etc has: a file and a directory with something in it.
FILE = next(name for name in ("hostname", "hosts", "passwd") if Path("/etc", name).is_file())
DIRECTORY = next(path.name for path in sorted(Path("/etc").iterdir()) if path.is_dir() and os.listdir(path))

SANDBOX = f"""
mount --bind $1 /etc/{FILE}
mount -t tmpfs sandbox /etc/{DIRECTORY}
echo kept > /etc/{DIRECTORY}/inside
shift
exec "$@"
"""


def stacks_on_etc(service: Service) -> int:
    rows = Path(f"/proc/{service.pid}/mountinfo").read_text().splitlines()
    return sum(row.split()[4] == "/etc" for row in rows)


def test_without_the_newest_version_the_one_before_is_back(service: Service) -> None:
    service.put("1.3")
    service.reloaded("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    service.remove("1.4")
    service.reloaded("1.3")
    service.logged("web 1.4 -> 1.3 applied in")


@pytest.mark.parametrize("how", ["the file", "the .v directory", "the .confext.d directory"])
def test_without_anything_the_original_etc_is_back(service: Service, how: str) -> None:
    before = Path("/etc", FILE).read_text()
    match how:
        case "the file":
            service.remove("0")
        case "the .v directory":
            shutil.rmtree(service.versions)
        case _:
            shutil.rmtree(service.drops)
    service.reloaded("nothing")
    service.logged("web 0 removed, applied in")
    assert stacks_on_etc(service) == 0
    assert sorted(os.listdir(service.etc())) == sorted(os.listdir("/etc"))
    assert service.etc(FILE).read_text() == before


def test_what_is_removed_while_nobody_looks_is_gone(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1.3")
    service.put("1.4")
    service.reloaded("1.4")
    assert place.daemon is not None
    place.daemon.stop()
    service.remove("1.4")
    place.start_daemon()
    service.reloaded("1.3")


def sandboxed(place: Place) -> Service:
    """A service that mounts things below `/etc` before it becomes what it is."""
    secret = place.path / "secret"
    secret.write_text("hidden\n")
    return place.start(program=("sh", "-ec", SANDBOX, "sh", str(secret), *PYTHON))


def assert_sandbox(service: Service) -> None:
    assert service.etc(FILE).read_text() == "hidden\n"
    assert os.listdir(service.etc(DIRECTORY)) == ["inside"]
    assert service.etc(f"{DIRECTORY}/inside").read_text() == "kept\n"


def test_sandbox_mounts_survive_every_swap_in_both_directions(shared: Place) -> None:
    service = sandboxed(shared)
    assert_sandbox(service)
    for step, version, value in (
        (service.put, "1.3", "1.3"),
        (service.put, "1.4", "1.4"),
        (service.remove, "1.4", "1.3"),
        (service.remove, "1.3", "nothing"),
        (service.put, "1.5", "1.5"),
    ):
        step(version)
        service.reloaded(value)
        assert_sandbox(service)


def test_sandbox_mounts_made_on_a_stack_survive_it(shared: Place) -> None:
    first = shared.start()
    first.kill()
    first.put("1.3")
    first.logged("web 1.3 added, accepted")
    secret = shared.path / "secret"
    secret.write_text("hidden\n")
    service = shared.start(name=first.name, program=("sh", "-ec", SANDBOX, "sh", str(secret), *PYTHON))
    assert service.heard == ["1.3"]
    assert_sandbox(service)
    service.put("1.4")
    service.reloaded("1.4")
    assert_sandbox(service)
    service.remove("1.4")
    service.remove("1.3")
    service.reloaded("nothing")
    assert_sandbox(service)
    service.put("1.5")
    service.reloaded("1.5")
    assert_sandbox(service)


def test_a_mount_on_what_only_a_stack_has_comes_through(shared: Place) -> None:
    """Its place vanishes with the stack, and the mount stays."""
    first = shared.start()
    first.kill()
    first.put("1.3")
    first.logged("web 1.3 added, accepted")
    secret = shared.path / "secret"
    secret.write_text("hidden\n")
    mounted = ("sh", "-ec", 'mount --bind "$1" /etc/web.large; shift; exec "$@"', "sh", str(secret), *PYTHON)
    service = shared.start(name=first.name, program=mounted)
    other = service.drops / ("other" + shared.suffix)
    shared.bring(shared.confext("1", name="other"), other)
    service.logged("other added")
    service.remove("1.3")
    service.reloaded("nothing")
    assert service.etc("web.large").read_text() == "hidden\n"
    service.put("1.4")
    service.reloaded("1.4")
    assert service.etc("web.large").read_text() == "hidden\n"


def test_what_a_service_had_that_is_gone_leaves_the_store(place: Place) -> None:
    """Gone is one that takes no part any more, and whose next start would get nothing: its last drop was removed."""
    place.start_daemon()
    # Its end within a second after the reload would bring back what was removed.
    gone = place.start("--set", "Rollback=no", "--reload-signal", "SIGHUP", name="gone.service")
    stopped = place.start(name="stopped.service")
    stopped.kill()
    stopped.put("1.3", value="stays")
    stopped.logged("accepted; it is not running")
    gone.put("1.3")
    gone.logged("applied in")
    gone.remove("1.3")
    gone.logged("web 1.3 removed, applied in")
    gone.kill()
    for service in (gone, stopped):
        (place.runtime / "services" / f"{service.name}.json").unlink()  # as a reboot does it
    until(lambda: "gone.service.exec" not in os.listdir(place.state / "stacks"))
    until(lambda: len([name for name in os.listdir(place.state / "store") if not name.startswith(".")]) == 1)
    assert os.listdir(place.state / "units") == ["stopped.service.exec"]
    assert place.start(name="stopped.service").has("stays")
