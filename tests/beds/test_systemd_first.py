# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first image of a service on real systemd: `Check=` sees it before any start does, as that start would see it; and
all processes of one start see one `/etc`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, UNITS, Host
from beds.site import WEB, drop, kept, sees
from support import needs
from watcher.rounds.facts import AFTERGLOW_USEC

pytestmark = [needs.bed, needs.tool("mksquashfs")]


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        made.stack.callback(bed.run, ["sh", "-c", "rm -rf /run/see* /srv/jail /run/probe*"])
        yield made


CONF = "cat /etc/web.conf 2>/dev/null || echo none"
# What each process of a start sees, one line each; a broken image is one that says so.
SEEING = f"""[Service]
Type=notify
NotifyAccess=all
ExecStartPre=/bin/sh -c 'echo pre $({CONF}) >>/run/seen; ! grep -qs broken /etc/web.conf'
ExecStart=/bin/sh -c 'echo main $({CONF}) >>/run/seen; systemd-notify --ready; exec sleep infinity'
ExecStartPost=/bin/sh -c 'echo post $({CONF}) >>/run/seen'
[X-Confext]
SettleSec=0
Reload=none
"""
# systemd would put in a variable of its own.
CHECK = """Check=/bin/sh -c 'f=/etc/web.conf; ! grep broken "${f}"'\n"""


def seen(host: Host) -> list[str]:
    """What the processes of the last start saw."""
    path = host.bed.path("/run/seen")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "in-the-hosts-namespace"])
def test_a_broken_first_image_is_refused_before_any_start(host: Host, *, running: bool) -> None:
    host.unit(WEB, SEEING + CHECK, takes_part=False)
    host.watch()
    if running:
        host.systemctl("start", WEB)
        assert seen(host) == ["pre none", "main none", "post none"]
    journal = host.journal()
    host.confext_dir(WEB).mkdir()
    drop(host, 1, {"web.conf": "broken"})
    entry = journal.outcome(WEB, "refused")
    assert "check" in entry["MESSAGE"] and entry["CONFEXT_OUTPUT"] == "broken\n"
    assert not kept(host)
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre none", "main none", "post none"]
    drop(host, 2, {"web.conf": "2"})
    sees(host, "2")
    assert not [one for one in journal.said() if "restart it once" in one["MESSAGE"]]
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre 2", "main 2", "post 2"]


def test_one_in_the_hosts_namespace_is_told_to_restart_once_the_check_let_it_in(host: Host) -> None:
    host.unit(WEB, SEEING + CHECK, takes_part=False)
    host.watch()
    host.systemctl("start", WEB)
    journal = host.journal()
    host.confext_dir(WEB).mkdir()
    drop(host, 1, {"web.conf": "1"})
    journal.outcome(WEB, "needs-restart")
    seen(host)
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre 1", "main 1", "post 1"]


def test_what_is_dropped_for_a_stopped_service_is_checked_at_once(host: Host) -> None:
    host.unit(WEB, SEEING + CHECK)
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "1"})
    assert "its next start gets it" in journal.applied(WEB)["MESSAGE"]
    drop(host, 2, {"web.conf": "broken 2"})
    assert "site 1 -> 2, refused: check" in journal.outcome(WEB, "refused")["MESSAGE"]
    drop(host, 3, {"web.conf": "3"})
    assert "its next start gets it" in journal.applied(WEB)["MESSAGE"]
    host.systemctl("start", WEB)
    assert seen(host) == ["pre 3", "main 3", "post 3"]


def test_a_template_has_no_start_to_be_checked_for_until_an_instance_of_it_runs(host: Host) -> None:
    template, instance = "web@.service", "web@a.service"
    host.unit(template, SEEING + CHECK)
    host.watch()
    journal = host.journal()
    for version in ("1", "2"):
        drop(host, version, {"web.conf": version}, template)
        assert "its next instance gets it" in journal.applied(template)["MESSAGE"]
    host.systemctl("start", instance)
    assert seen(host) == ["pre 2", "main 2", "post 2"]
    # Its own settings are the ones that count now.
    drop(host, 3, {"web.conf": "broken"}, template)
    said = {template, instance}
    while said:
        entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "refused")
        assert "check" in entry["MESSAGE"] and entry["CONFEXT_OUTPUT"] == "broken\n"
        said.remove(entry["CONFEXT_SERVICE"])
    host.systemctl("start", "web@b.service")
    assert seen(host) == ["pre 2", "main 2", "post 2"]
    drop(host, 4, {"web.conf": "4"}, template)
    sees(host, "4", instance)
    assert "site 2 -> 4" in journal.applied(template)["MESSAGE"]
    host.systemctl("start", "web@c.service")
    assert seen(host) == ["pre 4", "main 4", "post 4"]


ENDS = SEEING.replace("; ! grep -qs broken /etc/web.conf'", "'").replace(
    "systemd-notify --ready;", "! grep -qs broken /etc/web.conf || exit 1; systemd-notify --ready;"
)


@pytest.mark.parametrize("verb", ["start", "restart"])
@pytest.mark.parametrize(
    ("text", "first"),
    [(SEEING, ["pre broken"]), (ENDS, ["pre broken", "main broken"])],
    ids=["prepares", "runs"],
)
def test_a_first_start_that_fails_on_what_was_not_checked_is_undone_before_it_ends(
    host: Host, verb: str, text: str, first: list[str]
) -> None:
    host.unit(WEB, text)
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "broken"})
    journal.applied(WEB)  # accepted
    host.systemctl(verb, WEB)  # it comes up
    assert host.bed.property(WEB, "ActiveState") == "active"
    assert seen(host) == [*first, "pre none", "main none", "post none"]
    entry = journal.outcome(WEB, "rolled-back")
    assert "back on its own /etc" in entry["MESSAGE"] and entry["CONFEXT_VERDICT"] == "went-down"
    assert host.bed.property(WEB, "Restart") == "no" and host.bed.property(WEB, "NRestarts") == "0"


# Its main process ends ill when it is stopped.
ENDS_ILL = """[Service]
Type=notify
NotifyAccess=all
ExecStartPre=/bin/sh /run/see pre
ExecStart=/bin/sh /run/see main
ExecStartPost=/bin/sh /run/see post
[X-Confext]
SettleSec=0
Reload=none
"""
SEE = f"""echo $1 $({CONF}) >>/run/seen
grep -qs broken /etc/web.conf && exit 1
[ $1 = main ] || exit 0
trap 'exit 3' TERM
systemd-notify --ready
while :; do sleep 0.05; done
"""


def test_the_one_restart_that_a_service_needs_is_undone_before_it_ends(host: Host) -> None:
    """What became of the process that was there before is not put down to the image."""
    host.bed.path("/run/see").write_text(SEE)
    host.unit(WEB, ENDS_ILL, takes_part=False)
    host.watch()
    host.systemctl("start", WEB)
    seen(host)
    journal = host.journal()
    host.confext_dir(WEB).mkdir()
    drop(host, 1, {"web.conf": "broken"})
    journal.outcome(WEB, "needs-restart")
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre broken", "pre none", "main none", "post none"]
    back = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") == "rolled-back")
    assert "back on its own /etc" in back["MESSAGE"]
    drop(host, 2, {"web.conf": "2"})
    journal.applied(WEB)
    sees(host, "2")
    time.sleep(AFTERGLOW_USEC / 1e6)
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre 2", "main 2", "post 2"]


def test_the_one_restart_goes_well_though_the_process_before_ends_ill(host: Host) -> None:
    host.bed.path("/run/see").write_text(SEE)
    host.unit(WEB, ENDS_ILL, takes_part=False)
    host.watch()
    host.systemctl("start", WEB)
    seen(host)
    journal = host.journal()
    host.confext_dir(WEB).mkdir()
    drop(host, 1, {"web.conf": "1"})
    journal.outcome(WEB, "needs-restart")
    host.systemctl("restart", WEB)
    assert seen(host) == ["pre 1", "main 1", "post 1"]
    journal.until(lambda entry: f"{WEB}: started well on site 1" in entry["MESSAGE"])
    # Nothing is on trial any more: from the next daemon-reload on nothing is run for that.
    host.systemctl("daemon-reload")
    assert "ExecStopPost" not in host.bed.run(["systemctl", "cat", WEB]).stdout


def test_without_a_watcher_a_failed_start_is_not_waited_for(host: Host) -> None:
    host.unit(WEB, SEEING)
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "broken"})
    journal.applied(WEB)
    host.systemctl("stop", "confext-watcher")
    host.systemctl("mask", "--runtime", "confext-watcher")
    host.stack.callback(host.bed.run, ["systemctl", "unmask", "--runtime", "confext-watcher"])
    assert not list(host.bed.path("/run/confext-watcher/starts").iterdir())
    assert host.bed.run(["systemctl", "restart", WEB], check=False).returncode == 1
    assert seen(host) == ["pre broken"]


def test_no_check_passes_because_of_a_daemon_reload(host: Host) -> None:
    """systemd forgets the images of a transient unit by that."""
    host.unit(WEB, SEEING + CHECK)
    host.watch()
    journal = host.journal()
    for number in range(1, 6):
        reloads = "for i in 1 2 3 4 5; do systemctl daemon-reload; done"
        with host.bed.popen(["sh", "-c", reloads]) as reloading:
            drop(host, number, {"web.conf": f"broken {number}"})
            reloading.wait()
        assert journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"] == f"broken {number}\n"
    assert not kept(host)


# With a file in the place of that directory systemd cannot bind anything on it, and exits with 226.
BOUND = SEEING.replace("[Service]\n", "[Service]\nBindReadOnlyPaths=/etc/systemd:/etc/skel\n")
IN_THE_WAY = {"web.conf": "1", "skel": "a file"}


def test_what_systemd_itself_cannot_start_the_service_on_is_refused_before_any_start(host: Host) -> None:
    host.unit(WEB, BOUND + CHECK)
    host.watch()
    journal = host.journal()
    drop(host, 1, IN_THE_WAY)
    entry = journal.outcome(WEB, "refused")
    assert "systemd cannot start the service on it: exit status 226" in entry["MESSAGE"]
    assert not kept(host)
    host.systemctl("start", WEB)
    assert seen(host) == ["pre none", "main none", "post none"]


def test_a_start_that_systemd_itself_cannot_make_on_what_was_not_checked_is_undone(host: Host) -> None:
    host.unit(WEB, BOUND)
    host.watch()
    journal = host.journal()
    drop(host, 1, IN_THE_WAY)
    journal.applied(WEB)  # accepted
    # The image keeps systemd from running anything in the unit, also what would wait.
    assert host.bed.run(["systemctl", "restart", WEB], check=False).returncode == 1
    entry = journal.outcome(WEB, "rolled-back")
    assert "systemd cannot start the service on it: exit status 226" in entry["CONFEXT_REASON"]
    assert host.bed.property(WEB, "ActiveState") == "active"
    assert seen(host) == ["pre none", "main none", "post none"]


def test_what_no_start_can_be_made_for_is_accepted_without_its_check_and_on_trial(host: Host) -> None:
    """That is no verdict of the check."""
    host.unit(WEB, SEEING.replace("[Service]\n", "[Service]\nBindPaths=/missing\n") + CHECK)
    host.watch()
    journal = host.journal()
    drop(host, 1, {"web.conf": "broken"})
    assert "its next start gets it" in journal.applied(WEB)["MESSAGE"]
    host.bed.run(["systemctl", "start", WEB], check=False)
    journal.until(lambda entry: "not by its stack: exit status 226" in entry["MESSAGE"])
    path = f"{UNITS}/{WEB}.confext.d/site.raw.v/{drop(host, 2, {'web.conf': '2'}).name}"
    waited = host.bed.run(["confext-watcher", "wait", "--timeout=20", WEB, path], check=False)
    assert "Check= needs that (exit status 226 is systemd's own" in waited.stdout + waited.stderr, waited
    host.bed.path("/missing").mkdir()
    host.stack.callback(host.bed.path("/missing").rmdir)
    assert host.bed.run(["systemctl", "restart", WEB], check=False).returncode in (0, 1)
    journal.outcome(WEB, "rolled-back")
    journal.applied(WEB)
    sees(host, "2")


def test_what_is_dropped_during_a_start_waits_for_its_end(host: Host) -> None:
    waiting = (
        "ExecStartPre=/bin/sh -c 'touch /run/seen.pre; until [ -e /run/seen.go ]; do sleep 0.02; done'\n"
    )
    host.unit(WEB, SEEING.replace("ExecStart=", f"{waiting}ExecStart="))
    host.stack.callback(host.bed.run, ["sh", "-c", "rm -f /run/seen.*"])
    host.watch()
    journal = host.journal()
    host.systemctl("start", "--no-block", WEB)
    host.bed.run(["sh", "-c", "until [ -e /run/seen.pre ]; do sleep 0.02; done"], timeout=SECONDS)
    drop(host, 1, {"web.conf": "1"})
    host.confext_dir(WEB).joinpath("site.raw.v/site_0.raw").write_text("no image")
    host.confext_dir(WEB).joinpath("other.raw").write_text("no image")
    journal.outcome(WEB, "refused")  # it has looked
    assert not kept(host)
    host.bed.path("/run/seen.go").touch()
    journal.applied(WEB)
    sees(host, "1")
    assert seen(host) == ["pre none", "main none", "post none"]


# --- as the start will see it ---

# Everything of a process that a check before the start has to have, too.
PROBE = """
exec 2>/dev/null
grep -E '^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Umask):' /proc/self/status
env | grep -vE '^(INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID|MEMORY_PRESSURE_.*|_|PWD|OLDPWD|SHLVL)=' | sort
cat "$CREDENTIALS_DIRECTORY/secret"
awk '{split($6, flags, ","); print $5, flags[1]}' /proc/self/mountinfo | sort -u
cat /srv/hidden /etc/hidden /etc/web.conf
for at in /usr /etc /srv /srv/rw /run/webrun /var/lib/webstate; do (: >$at/trying) && rm $at/trying && echo $at; done
ls -d /dev/* /home/* /tmp/* | sort
exit $1
"""
SANDBOX = """[Service]
Type=oneshot
RemainAfterExit=yes
StandardOutput=truncate:/run/probe
StandardError=inherit
Environment=COLOUR=blue "UNIT=%n"
SetCredential=secret:geheim
UMask=0027
RuntimeDirectory=webrun
StateDirectory=webstate
StateDirectoryMode=0750
ProtectSystem=full
ProtectHome=yes
ProtectProc=invisible
PrivateTmp=yes
PrivateDevices=yes
PrivateNetwork=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectHostname=yes
NoNewPrivileges=yes
RestrictNamespaces=yes
RestrictAddressFamilies=none
SystemCallFilter=@system-service
SystemCallFilter=~@resources
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=CAP_CHOWN CAP_KILL
ReadOnlyPaths=/srv
ReadWritePaths=/srv/rw
InaccessiblePaths=-/etc/hidden /srv/hidden
TemporaryFileSystem=/mnt:ro
BindReadOnlyPaths=/srv:/opt/with
{unit}
ExecStart=/bin/sh /etc/probe 0
[X-Confext]
SettleSec=0
Check=/bin/sh -c '. /etc/check'
"""


@pytest.mark.parametrize(
    "unit",
    [
        "",
        "User=nobody\nGroup=games\nSupplementaryGroups=lp\nAmbientCapabilities=CAP_KILL",
        # The check must not take the directory of a service that is started meanwhile away: it keeps it. With
        # DynamicUser= what is kept lies below /run/private, and is moved back by a start that does not keep it.
        "DynamicUser=yes\nPrivateUsers=yes\nRuntimeDirectoryPreserve=yes",
        "RootDirectory=/srv/jail\nBindReadOnlyPaths=/usr\nMountAPIVFS=yes",
    ],
    ids=["root", "user", "dynamic-user", "root-directory"],
)
@pytest.mark.parametrize("kind", ["image", "tree"])
def test_a_check_before_the_start_sees_what_the_start_will_see(host: Host, unit: str, kind: str) -> None:
    jail = """
        mkdir -p /srv/rw /srv/jail/etc /srv/jail/usr /srv/jail/proc /srv/jail/dev /srv/jail/run /srv/jail/sys
        mkdir -p /srv/jail/tmp /srv/jail/srv/rw /srv/jail/srv/hidden /srv/jail/home /srv/jail/mnt /srv/jail/opt
        mkdir -p /srv/jail/var /srv/jail/root; chmod 1777 /srv/rw
        cd /srv/jail; for name in bin lib lib64; do ln -sf usr/$name $name; done; cp /etc/os-release etc
        echo hidden >/srv/hidden
    """
    host.bed.run(["sh", "-ec", jail])
    host.stack.callback(host.bed.run, ["sh", "-c", "rm -rf /srv/jail /srv/rw /srv/hidden /var/lib/*webstate"])
    host.unit(WEB, SANDBOX.format(unit=unit))
    host.watch()
    journal = host.journal()
    files = {"probe": PROBE, "web.conf": "1"}
    for number, check in ((1, "set -- 1; . /etc/probe"), (2, "exit 0")):
        name = f"site_{number}"
        more = {**files, "check": check}
        if kind == "image":
            host.drop(host.image(name, more), WEB, f"site.raw.v/{name}.raw")
        else:
            host.confext_dir(WEB).joinpath("site.v").mkdir(exist_ok=True)
            host.drop_tree(host.tree(name, more), str(f"/etc/systemd/system/{WEB}.confext.d/site.v/{name}"))
        if number == 1:
            found = journal.outcome(WEB, "refused")["CONFEXT_OUTPUT"]
    journal.applied(WEB)
    host.bed.run(["systemctl", "start", WEB], timeout=SECONDS)
    found = re.sub(r"confext-watcher-check-[0-9a-f]+\.service", WEB, found)  # in the path of its credentials
    assert sorted(found.splitlines()) == sorted(host.bed.path("/run/probe").read_text().splitlines())
    assert "geheim" in found and "/etc" not in found.splitlines() and "/usr" not in found.splitlines()
    left = ["systemctl", "list-units", "--all", "--plain", "--quiet", "confext-watcher-check-*"]
    assert not host.bed.run(left).stdout
