# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Check=` of services without systemd (rounds/service_check.py): before the swap, where the service is, with no more
than the service has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.needs import cgroup2, root, tool
from support.place import Place, eventually
from watcher.managers.cgroup import mount_point

pytestmark = [root, tool("mksquashfs")]

SLEEP = ("sleep", "infinity")
GOOD = "grep -qv bad /etc/web.conf"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


def reports(place: Place, script: str, *program: str, options: tuple[str, ...] = ()) -> list[str]:
    """What a check prints that refuses everything but the first stack."""
    place.image("1", "one")
    place.start_daemon()
    place.start(*program or SLEEP, options=("--check", f"/bin/sh -c '{script}; exit 1'", *options))
    place.until("started well")
    place.image("2", "two")
    place.outcome("refused")
    eventually(place.history)
    return place.history()[0].output.splitlines()


def test_a_new_stack_that_fails_its_check_never_gets_near_the_service(place: Place) -> None:
    place.image("1", "good")
    place.start_daemon()
    told = place.scratch / "told"
    reload = ("--reload-command", f"touch {told}")
    service = place.start(*SLEEP, options=("--check", GOOD, *reload))
    place.until("started well")
    mounts, slot = Path(f"/proc/{service.pid}/mountinfo").read_text(), place.slot()
    place.image("2", "bad")
    line = place.outcome("refused")
    assert "web 1 -> 2, refused: check" in line and "the service was not touched" in line
    assert Path(f"/proc/{service.pid}/mountinfo").read_text() == mounts
    assert (place.slot(), told.exists(), place.shown(service)) == (slot, False, "good")
    place.image("3", "fine")
    place.outcome("applied")
    assert (told.exists(), place.shown(service)) == (True, "fine")


def test_it_sees_the_new_stack_and_what_it_prints_is_kept(place: Place) -> None:
    assert reports(place, "cat /etc/web.conf; echo; echo oops >&2") == ["two", "oops"]


def test_the_reason_has_the_line_that_says_why(place: Place) -> None:
    why = "nginx: [emerg] unknown directive sever in /etc/web.conf:1"
    reports(place, f'echo "{why}"; echo "nginx: configuration file /etc/nginx/nginx.conf test failed"')
    assert f" failed with exit status 1 ({why}); the service was not touched" in place.history()[0].message
    status = place.command("status", "web.service").stdout
    assert why in " ".join(status.split()) and "test failed)" not in status


def test_it_has_the_user_the_groups_the_environment_and_the_rights_of_the_service(place: Place) -> None:
    place.environment["COLOUR"] = "blue"
    setpriv = (
        "setpriv --reuid=65534 --regid=65533 --groups=65532,7 --bounding-set=-all,+chown,+kill --no-new-privs"
    )
    ambient = "--inh-caps=+kill --ambient-caps=+kill"
    fields = "Uid|Gid|Groups|CapBnd|CapInh|CapAmb|CapPrm|NoNewPrivs"
    script = f'grep -E "{fields}" /proc/self/status; echo $COLOUR; readlink /proc/self/fd/0'
    chown_kill, kill = f"{1 << 0 | 1 << 5:016x}", f"{1 << 5:016x}"
    assert [
        " ".join(line.split()) for line in reports(place, script, *setpriv.split(), *ambient.split(), *SLEEP)
    ] == [
        "Uid: 65534 65534 65534 65534",
        "Gid: 65533 65533 65533 65533",
        "Groups: 7 65532",
        f"CapInh: {kill}",
        f"CapPrm: {kill}",
        f"CapBnd: {chown_kill}",
        f"CapAmb: {kill}",
        "NoNewPrivs: 1",
        "blue",
        "/dev/null",
    ]


def test_a_service_of_root_with_few_rights_has_a_check_with_as_few(place: Place) -> None:
    few = ("setpriv", "--bounding-set=-all,+net_raw", *SLEEP)
    expected = f"CapPrm:\t{1 << 13:016x}"
    assert reports(place, "grep CapPrm /proc/self/status", *few) == [expected]


def test_its_root_directory_is_that_of_the_service(place: Place) -> None:
    jail = place.scratch / "jail"
    jail.mkdir()
    script = (
        f"mount -t tmpfs jail {jail} && cd {jail} && mkdir usr proc && echo yes >inside &&"
        " mount --bind /usr usr && mount --bind /proc proc &&"
        " for name in bin lib lib64; do ln -s usr/$name $name; done && exec chroot . /usr/bin/sleep 1000"
    )
    assert reports(place, "cat /inside", "sh", "-c", script) == ["yes"]


@cgroup2
@pytest.mark.parametrize("owner", [0, 65534])
def test_its_control_group_is_that_of_the_service(place: Place, owner: int) -> None:
    """One of its own below that, unless the group is delegated: then its owner could move what is in there out."""
    mount = mount_point(Path("/proc/self/mountinfo").read_text())
    group = Path(mount, f"confext-test-{os.getpid()}")
    group.mkdir()
    os.chown(group, owner, -1)
    try:
        script = f"echo 0 >{group}/cgroup.procs && exec sleep 1000"
        found = reports(place, "grep ^0:: /proc/self/cgroup", "sh", "-c", script)
    finally:
        place.__exit__()
        eventually(lambda: "populated 0" in (group / "cgroup.events").read_text())
        group.rmdir()
    assert found, place.history()[0].message
    assert f"/{group.name}{'/confext-watcher-' if owner == 0 else ''}" in found[0]
    assert found[0].endswith(group.name) == (owner != 0)


def test_its_output_is_cut_and_does_not_hold_it_up(place: Place) -> None:
    output = reports(place, 'head -c 1000000 /dev/zero | tr "\\\\0" x')
    assert output == ["x" * 65536]


def test_one_that_takes_too_long_is_a_refusal(place: Place) -> None:
    place.image("1", "one")
    place.start_daemon()
    place.start(*SLEEP, options=("--check", "sleep 1000", "--set", "CheckSec=200ms"))
    place.until("started well")
    place.image("2", "two")
    assert "took longer than 0.2 s" in place.outcome("refused")


def test_what_it_leaves_running_is_killed_and_what_it_mounts_is_gone(place: Place) -> None:
    place.image("1", "one")
    place.start_daemon()
    pids = place.scratch / "pids"
    away = f"echo $$ >>{pids}; exec sleep 1000"
    script = place.scratch / "leave-running"
    script.write_text(
        f"sleep 1000 & echo $! >>{pids}\nsetsid -f sh -c '{away}'\n"
        f"until [ $(wc -l <{pids}) = 2 ]; do :; done\nmount -t tmpfs none /mnt\n"
    )
    service = place.start(*SLEEP, options=("--check", f"/bin/sh {script}"))
    place.until("started well")
    place.image("2", "two")
    place.outcome("applied")
    found = pids.read_text().split()
    assert len(found) == 2 and not [pid for pid in found if Path(f"/proc/{pid}/exe").exists()]
    assert " /mnt " not in Path(f"/proc/{service.pid}/mountinfo").read_text()


def test_several_run_in_order_until_one_fails(place: Place) -> None:
    place.image("1", "one")
    place.start_daemon()
    ran = place.scratch / "ran"
    checks = (f"/bin/sh -c 'echo {n} >>{ran}; exit {status}'" for n, status in ((1, 0), (2, 1), (3, 0)))
    place.start(*SLEEP, options=[part for check in checks for part in ("--check", check)])
    place.until("started well")
    place.image("2", "two")
    place.outcome("refused")
    assert ran.read_text().split() == ["1", "2"]


def test_a_stopped_service_keeps_its_stack_and_the_new_one_is_checked_when_it_runs(place: Place) -> None:
    place.image("1", "one")
    place.start_daemon()
    service = place.start(*SLEEP, options=("--check", GOOD))
    place.until("started well")
    slot = place.slot()
    place.stop(service)
    place.image("2", "bad")
    place.stop_daemon()
    assert place.slot() == slot
    service = place.start(*SLEEP, options=("--check", GOOD))
    assert (place.shown(service), place.slot()) == ("one", slot)
    place.start_daemon()
    eventually(lambda: place.outcomes() == ["refused"])
    place.image("3", "three")
    place.outcome("applied")
    assert place.shown(service) == "three"


def test_the_first_stack_is_accepted_unchecked_and_judged_after_the_start(place: Place) -> None:
    place.image("1", "bad")
    service = place.start(
        *SLEEP, options=("--check", GOOD, "--health-check", GOOD, "--set", "HealthCheckSec=100ms")
    )
    assert place.shown(service) == "bad"
    place.start_daemon()
    eventually(lambda: place.outcomes() == ["rolled-back"])
    assert "back on its own /etc" in place.history()[0].message
    assert (place.shown(service), place.slot()) == (None, None)
