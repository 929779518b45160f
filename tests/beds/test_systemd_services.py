# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole program with services of every kind that systemd knows: templates, sockets, several namespaces."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SLEEP, Host
from beds.test_systemd_manager import NOTIFY_RELOAD, NOTIFY_RELOAD_PROGRAM, daemon_reloads
from support import needs
from support.images import confext
from support.place import eventually
from watcher.managers.systemd.unit_files import DROPIN

pytestmark = needs.bed

RELOADS = SLEEP + "ExecReload=/bin/sh -c 'cat /etc/web.txt >>/run/reloads'\n"
VERSIONS = "web.raw.v"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def drop_version(host: Host, unit: str, version: str) -> None:
    source = host.image(f"web_{version}", {"web.txt": version})
    host.drop(source, unit, f"{VERSIONS}/{source.name}")


def processes(host: Host, unit: str) -> list[int]:
    """All of a unit, those of its subtrees included."""
    group = host.bed.property(unit, "ControlGroup")
    found = host.bed.run(["sh", "-c", f"find /sys/fs/cgroup{group} -name cgroup.procs | xargs cat"])
    return sorted(int(line) for line in found.stdout.split())


def namespaces(host: Host, pids: list[int]) -> int:
    paths = " ".join(f"/proc/{pid}/ns/mnt" for pid in pids)
    return len(set(host.bed.run(["sh", "-c", f"readlink {paths}"], check=False).stdout.split()))


def sees(host: Host, pid: int) -> str:
    inside = ["nsenter", "--target", str(pid), "--mount", "--root", "--", "cat", "/etc/web.txt"]
    return host.bed.run(inside, check=False).stdout.strip()


def slots(host: Host) -> set[str]:
    """Units that have a stack of their own."""
    return {path.name for path in host.bed.path("/var/lib/confext-watcher/units").iterdir()}


def test_a_reload_that_waits_for_the_watcher_does_not_hold_up_its_start(host: Host) -> None:
    host.unit("web.service", RELOADS)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/reloads"])
    host.watch()
    journal = host.journal()
    host.systemctl("start", "web.service")
    drop_version(host, "web.service", "1")
    journal.applied("web.service")
    host.systemctl("stop", "confext-watcher")
    drop_version(host, "web.service", "2")
    # All jobs of a unit that is ordered after the watcher wait for it, also one that somebody else has asked for.
    jobs = "systemctl start --no-block confext-watcher; systemctl reload --no-block web.service"
    host.bed.run(["sh", "-c", jobs])
    journal.applied("web.service")
    assert host.see("web.service", "/etc/web.txt") == "2"
    eventually(lambda: host.bed.property("confext-watcher", "ActiveState") == "active")
    assert host.bed.path("/run/reloads").read_text().endswith("2")


def test_all_mount_namespaces_of_a_service_get_the_stack(host: Host) -> None:
    apart = "unshare --mount --propagation {} sleep infinity & "
    start = f"{apart.format('private')}{apart.format('slave')}exec sleep infinity"
    host.unit("apart.service", f"[Service]\nExecStart=/bin/sh -c '{start}'\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "apart.service")
    eventually(lambda: namespaces(host, processes(host, "apart.service")) == 3)
    for version in ("1", "2"):
        drop_version(host, "apart.service", version)
        journal.applied("apart.service")
        assert [sees(host, pid) for pid in processes(host, "apart.service")] == [version] * 3


def test_a_service_without_a_main_process_is_not_said_to_be_stopped(host: Host) -> None:
    # Of several processes systemd does not guess which one it is.
    start = "ExecStart=/bin/sh -c 'sleep infinity & sleep infinity &'\n"
    host.unit("headless.service", "[Service]\nType=forking\n" + start)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "headless.service")
    assert host.main_pid("headless.service") == 0
    drop_version(host, "headless.service", "1")
    assert "no main process" in journal.applied("headless.service")["MESSAGE"]
    host.systemctl("restart", "headless.service")
    assert [sees(host, pid) for pid in processes(host, "headless.service")] == ["1", "1"]
    host.systemctl("stop", "headless.service")
    drop_version(host, "headless.service", "2")
    assert "it is not running" in journal.applied("headless.service")["MESSAGE"]


def test_a_container_in_a_delegated_subtree_is_none_of_ours(host: Host) -> None:
    group = "/sys/fs/cgroup$$(sed -n s/^0:://p /proc/self/cgroup)"
    container = "echo 0 >$$group/inside/cgroup.procs; exec unshare --mount sleep infinity"
    start = f'group={group}; mkdir $$group/inside; export group; sh -c "{container}" & exec sleep infinity'
    host.unit("holds.service", f"[Service]\nDelegate=yes\nExecStart=/bin/sh -c '{start}'\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "holds.service")
    eventually(lambda: namespaces(host, processes(host, "holds.service")) == 2)
    main = host.started("holds.service")
    (inside,) = set(processes(host, "holds.service")) - {main}
    drop_version(host, "holds.service", "1")
    journal.applied("holds.service")
    assert (sees(host, main), sees(host, inside)) == ("1", "")


def test_instances_start_on_the_stack_of_their_template_and_go_their_own_way(host: Host) -> None:
    one, two, template = "many@one.service", "many@two.service", "many@.service"
    host.unit(template, RELOADS)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/reloads"])
    host.watch()
    journal = host.journal()
    drop_version(host, template, "1")
    journal.applied(template)
    host.systemctl("start", one, two)
    assert [host.see(name, "/etc/web.txt") for name in (one, two)] == ["1", "1"]
    eventually(lambda: {one, two} <= slots(host))
    drop_version(host, template, "2")
    eventually(lambda: [host.see(name, "/etc/web.txt") for name in (one, two)] == ["2", "2"])
    host.drop(host.image("own", {"own.txt": "own"}), one)
    journal.until(lambda entry: entry.get("CONFEXT_SERVICE") == one and "own added" in entry["MESSAGE"])
    host.bed.run(["systemctl", "mask", "--runtime", "--now", "confext-watcher"])
    host.stack.callback(host.systemctl, "unmask", "--runtime", "confext-watcher")
    host.systemctl("restart", one, two)
    assert [host.see(name, "/etc/web.txt") for name in (one, two)] == ["2", "2"]
    assert [host.see(name, "/etc/own.txt") for name in (one, two)] == ["own", ""]


def test_the_server_of_one_connection_starts_on_its_templates_stack_and_has_none_of_its_own(
    host: Host,
) -> None:
    host.units(
        {
            "echo@.service": "[Service]\nExecStart=/bin/cat /etc/web.txt\nStandardOutput=socket\n",
            "echo.socket": "[Socket]\nListenStream=/run/echo\nAccept=yes\n",
        },
        takes_part=False,
    )
    host.confext_dir("echo@.service").mkdir()
    host.watch()
    journal = host.journal()
    drop_version(host, "echo@.service", "1")
    journal.applied("echo@.service")
    host.systemctl("start", "echo.socket")
    ask = (
        "import socket\nfor _ in range(20):\n with socket.socket(socket.AF_UNIX) as s:\n"
        "  s.connect('/run/echo'); print(s.makefile().read().strip())"
    )
    assert host.bed.run(["python3", "-c", ask]).stdout.split() == ["1"] * 20
    drop_version(host, "echo@.service", "2")
    journal.applied("echo@.service")
    assert host.bed.run(["python3", "-c", ask]).stdout.split() == ["2"] * 20
    assert {name for name in slots(host) if name.startswith("echo")} == {"echo@.service"}
    told = {entry.get("CONFEXT_SERVICE", "") for entry in journal.said()}
    assert {name for name in told if name.startswith("echo")} == {"echo@.service"}


def test_a_notify_reload_service_reads_the_new_files_on_its_own_signal(host: Host) -> None:
    program = NOTIFY_RELOAD_PROGRAM.replace(
        'open("/run/notify-reloaded", "w").close()',
        'open("/run/notify-reloaded", "a").write(open("/etc/web.txt").read() + "\\n")',
    )
    host.bed.path("/root/notify_reload.py").write_text(program)
    host.unit("notifies.service", NOTIFY_RELOAD)
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/notify-reloaded"])
    host.watch()
    journal = host.journal()
    host.systemctl("start", "notifies.service")
    for version in ("1", "2"):
        drop_version(host, "notifies.service", version)
        assert "reload done" in journal.applied("notifies.service")["MESSAGE"]
    assert host.bed.path("/run/notify-reloaded").read_text().split() == ["1", "2"]


def test_a_hundred_entries_dropped_at_once_make_one_or_two_daemon_reloads(host: Host, tmp_path: Path) -> None:
    host.unit("burst.service")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "burst.service")
    names = [f"tree{number:02}" for number in range(100)]
    for name in names:
        confext(tmp_path / name, name, {f"etc/{name}": name.encode()})
    before = daemon_reloads(host.bed)
    for name in names:
        shutil.copytree(tmp_path / name, host.confext_dir("burst.service") / name)
    last = f"/etc/{names[-1]}"
    while not host.see("burst.service", last):
        journal.applied("burst.service")
    assert 1 <= daemon_reloads(host.bed) - before <= 2
    host.systemctl("restart", "burst.service")
    inside = [
        "nsenter",
        "--target",
        str(host.started("burst.service")),
        "--mount",
        "--root",
        "--",
        "ls",
        "/etc",
    ]
    assert set(names) <= set(host.bed.run(inside).stdout.split())


@pytest.fixture
def limited(host: Host) -> Host:
    """A systemd that does one daemon-reload in so many seconds."""
    settings = host.bed.path("/etc/systemd/system.conf.d")
    settings.mkdir()
    (settings / "limit.conf").write_text("[Manager]\nReloadLimitIntervalSec=5\nReloadLimitBurst=1\n")
    # SIGTERM is daemon-reexec, which `systemctl` would not get past the limit.
    anew = "kill -TERM 1; until systemctl daemon-reload; do sleep 0.1; done"
    host.stack.callback(host.bed.run, ["sh", "-c", f"rm -r /etc/systemd/system.conf.d; {anew}"])
    host.systemctl("daemon-reexec")
    return host


def test_a_daemon_reload_that_systemd_puts_off_comes_about_all_the_same(limited: Host) -> None:
    limited.unit("limited.service")  # that was the one
    limited.watch()
    journal = limited.journal()
    limited.systemctl("start", "limited.service")
    for name in ("one", "two"):
        limited.drop(limited.image(name, {f"{name}.txt": "1"}), "limited.service")
    drop_in = limited.bed.path(f"/run/systemd/generator/limited.service.d/{DROPIN}")
    while not all(slot in drop_in.read_text() for slot in ("one.raw", "two.raw")):
        journal.applied("limited.service")
    refused = [entry for entry in journal.said() if "daemon-reload was not possible" in entry["MESSAGE"]]
    assert 1 <= len(refused) <= 2, [entry["MESSAGE"] for entry in refused]
