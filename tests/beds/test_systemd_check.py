# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Check=` on real systemd: what it is allowed and limited to, how it ends, and what it leaves behind.

Covers managers/systemd/transient.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, Host
from beds.site import WEB, drop, kept, run
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


# Everything of a process that its check has to have too; the service itself and the check run the same script.
PROBE = """
grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs):' /proc/self/status
for kind in net ipc uts user; do readlink /proc/self/ns/$kind; done
env | grep -v ^MAINPID= | sort
stat -c 'root %i' /
stat -Lc 'stdin %t:%T' /proc/self/fd/0
"""
IDENTITY = """[Service]
User=nobody
Group=games
SupplementaryGroups=lp
CapabilityBoundingSet=CAP_CHOWN CAP_KILL
AmbientCapabilities=CAP_KILL
NoNewPrivileges=yes
Environment=COLOUR=blue
PrivateNetwork=yes
StandardOutput=truncate:/run/probe
{unit}
ExecStart=/bin/sh -c '. /etc/probe; exec sleep infinity'
[X-Confext]
Check=/bin/sh -c '. /etc/probe; [ ! -e /etc/more ]'
"""
ROOTED = "RootDirectory=/srv/jail\nBindReadOnlyPaths=/usr\nMountAPIVFS=yes"
AS_ROOT = "User=\nGroup=\nSupplementaryGroups=\nAmbientCapabilities="


@pytest.mark.parametrize(
    "unit",
    ["", AS_ROOT, f"{ROOTED}\nPrivateUsers=yes"],
    ids=["user", "root", "root-directory-and-private-users"],
)
def test_a_check_is_what_the_service_is(host: Host, unit: str) -> None:
    jail = (
        "mkdir -p /srv/jail/etc /srv/jail/usr /srv/jail/proc /srv/jail/dev /srv/jail/run /srv/jail/sys /srv/jail/tmp;"
        "cd /srv/jail; for name in bin lib lib64; do ln -s usr/$name $name; done; cp /etc/os-release etc"
    )
    host.bed.run(["sh", "-c", jail])
    host.stack.callback(host.bed.run, ["rm", "-rf", "/srv/jail", "/run/probe"])
    journal = run(host, IDENTITY.format(unit=unit), {"probe": PROBE})
    host.bed.run(["sh", "-c", "until grep -q stdin /run/probe; do sleep 0.02; done"], timeout=SECONDS)
    service = host.bed.path("/run/probe").read_text()
    drop(host, 2, {"probe": PROBE, "more": "2"})
    found = journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    assert found == service


# Whatever a version's /etc/check does is its check.
CHECKED = """[Service]
MemoryMax=300M
TasksMax=20
LimitNOFILE=77
LimitAS=400M
ExecStart=/bin/sleep infinity
[X-Confext]
Check=/bin/sh /etc/check first
Check=/bin/sh /etc/check second
CheckSec=1s
SettleSec=0
"""
UNIT = "confext-watcher-check-*.service"


def test_a_check_is_limited_as_the_service_is(host: Host) -> None:
    journal = run(host, CHECKED, {"check": ""})
    limits = f"systemctl show -P MemoryMax -P TasksMax '{UNIT}'; ulimit -n; exit 1"
    drop(host, 2, {"check": limits})
    assert journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"].split() == [str(300 << 20), "20", "77"]
    drop(host, 3, {"check": "exec python3 -c 'bytearray(500 << 20)'"})
    assert "MemoryError" in journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    drop(host, 4, {"check": "echo I am slow; sleep 1000"})
    entry = journal.outcome(WEB, "refused")
    assert "was killed: it took longer than 1 s" in entry["MESSAGE"]
    assert entry["CONFEXT_OUTPUT"] == "I am slow\n"


def test_checks_run_in_order_until_one_fails_and_nothing_stays_of_them(host: Host) -> None:
    journal = run(host, CHECKED, {"check": ""})
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/left"])
    mounts = host.mounts(WEB), host.own_mounts()
    drop(host, 2, {"check": "echo $1; [ $1 = first ] || exit 3"})
    entry = journal.outcome(WEB, "refused")
    assert "check '/bin/sh /etc/check second' failed with exit status 3" in entry["MESSAGE"]
    assert entry["CONFEXT_OUTPUT"] == "first\nsecond\n"
    drop(host, 3, {"check": "echo $1; kill -KILL $$"})
    entry = journal.outcome(WEB, "refused")
    assert "check '/bin/sh /etc/check first' was ended by SIGKILL" in entry["MESSAGE"]
    assert entry["CONFEXT_OUTPUT"] == "first\n"
    drop(host, 4, {"check": "head -c 1000000 /dev/zero | tr '\\0' x; exit 1"})
    assert journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"] == "x" * 65536
    assert (host.mounts(WEB), host.own_mounts()) == mounts
    # One that its session, and one that nothing but its control group tells of.
    stays = "'echo $$ >>/run/left; exec sleep 1000'"
    script = f"""
        [ $1 = first ] && count=2 || count=4
        mount -t tmpfs none /mnt; touch /run/left
        sh -c {stays} & setsid sh -c {stays} &
        until [ $(wc -l </run/left) = $count ]; do sleep 0.02; done
    """
    drop(host, 5, {"check": script})
    journal.applied(WEB)
    left = ",".join(host.bed.path("/run/left").read_text().split())
    host.bed.run(["sh", "-c", f"while ps -p {left}; do sleep 0.02; done"], timeout=SECONDS)
    assert " /mnt " not in host.own_mounts() and "/mnt" not in [row[4] for row in host.mounts(WEB)]


def test_what_was_refused_while_a_service_does_not_run_is_checked_again_once_it_does(host: Host) -> None:
    journal = run(host, CHECKED, {"check": ""})
    slot = kept(host)
    host.systemctl("stop", WEB)
    drop(host, 2, {"check": "systemctl --quiet is-active web.service"})
    assert "site 1 -> 2, refused: check" in journal.outcome(WEB, "refused")["MESSAGE"]
    assert kept(host) == slot
    host.systemctl("start", WEB)
    assert "site 1 -> 2" in journal.applied(WEB)["MESSAGE"]
    host.systemctl("stop", WEB)
    drop(host, 3, {"check": "exit 0"})
    assert "its next start gets it" in journal.applied(WEB)["MESSAGE"]
    host.systemctl("start", WEB)
    assert host.see(WEB, "/etc/check") == "exit 0"


# --- a service that wants more than it has ---

WHO = "grep -E '^(Uid|CapEff|CapBnd):' /proc/self/status; readlink /proc/self/ns/user"
# All capabilities in namespaces of its own, its own program where the watcher looks for another.
TAKEN = """[Service]
User=nobody
ExecStart=/usr/bin/unshare --user --map-current-user --mount --keep-caps /run/lair/take
[X-Confext]
Check=/usr/bin/true
SettleSec=0
"""
TAKE = f"""#!/bin/sh
mount --bind /run/lair/evil /usr/bin/true
{{ {WHO}; }} >/run/lair/itself
exec sleep infinity
"""
EVIL = f"""#!/bin/sh
{WHO}
cat /etc/shadow >/dev/null 2>&1 && echo escaped
exit 1
"""
LENT = """[Service]
User=nobody
ExecStart=/run/lair/sleep infinity
[X-Confext]
Check=/bin/sh /etc/check
SettleSec=0
"""


@pytest.fixture
def lair(host: Host) -> Iterator[None]:
    """A directory of the attacker's own."""
    script = "mkdir -m 777 /run/lair; mount -t tmpfs -o mode=777 none /run/lair; cp /bin/sleep /run/lair"
    host.bed.run(["sh", "-ec", f"{script}; chmod 4755 /run/lair/sleep"])
    host.stack.callback(host.bed.run, ["sh", "-c", "umount -l /run/lair; rmdir /run/lair"])
    for name, text in {"take": TAKE, "evil": EVIL}.items():
        host.bed.run(["sh", "-c", f"cat >/run/lair/{name}; chmod 755 /run/lair/{name}"], input=text)
    yield


@pytest.mark.usefixtures("lair")
def test_capabilities_of_its_own_user_namespace_are_none_of_the_hosts(host: Host) -> None:
    host.unit(WEB, TAKEN)
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    host.bed.run(["sh", "-c", "until grep -q user /run/lair/itself; do sleep 0.02; done"], timeout=SECONDS)
    itself = host.bed.run(["cat", "/run/lair/itself"]).stdout
    drop(host, 1, {"web.conf": "1"})
    found = journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    assert found == itself
    assert host.bed.run(["readlink", "/proc/1/ns/user"]).stdout not in found


@pytest.mark.usefixtures("lair")
def test_a_set_user_id_program_lends_it_no_rights(host: Host) -> None:
    host.unit(WEB, LENT)
    drop(host, 1, {"check": f"{WHO}; exit 1"})
    host.watch()
    journal = host.journal()
    host.systemctl("start", WEB)
    drop(host, 2, {"check": f"{WHO}; exit 1", "more": "2"})
    words = "could not be run: its main process runs a program with rights that are not its own"
    journal.until(lambda entry: words in entry["MESSAGE"])
