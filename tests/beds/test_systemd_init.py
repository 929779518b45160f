# SPDX-License-Identifier: LGPL-2.1-or-later
"""From nothing to a deploy and back, with the nginx of Debian: `init` and `remove`.

Covers setup/init.py, setup/remove.py, cli/init.py, cli/remove.py, cli/asking.py, and what people
see of them: cli/show_init.py, cli/show_remove.py.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host
from support import needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

ON_TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if not pid:
    os.execvp(sys.argv[2], sys.argv[2:])
os.write(terminal, sys.argv[1].encode())
try:
    while said := os.read(terminal, 65536):
        os.write(1, said)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
NGINX = "nginx.service"
TOP = f"{UNITS}/nginx.service.confext.d"
PLACE = f"{TOP}/nginx.raw.v"
DROP_IN = f"{UNITS}/nginx.service.d/confext.conf"
SECRET = "/etc/nginx/secret.conf"
KEY = "/etc/nginx/site.key"
ANY = 0xFFFFFFFF


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        made.clean(NGINX)
        made.stack.callback(made.bed.run, ["sh", "-c", f"rm -f {SECRET} {KEY}; systemctl stop nginx"])
        bed.path(SECRET).write_text("# it is one\n")
        bed.path(SECRET).chmod(0o640)
        bed.path(KEY).write_text("key\n")
        yield made


def command(host: Host, *words: str, typed: str | None = None) -> tuple[int, str]:
    """Exit status, and the words that are said; with `typed`, on a terminal, where lines are folded."""
    argv = ["confext-watcher", *words]
    if typed is not None:
        argv = ["python3", "-c", ON_TERMINAL, typed, *argv]
    done = host.bed.run(argv, check=False, timeout=180)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def files(host: Host) -> str:
    """All that these commands could have changed."""
    places = "/etc /tmp /var/tmp /var/lib/confext-watcher/units"
    seen = f"find {places} -type d -printf '%p %M %U %G\\n' -o -printf '%p %M %U %G %T@ %l\\n' 2>/dev/null | sort"
    return host.bed.run(["sh", "-c", seen]).stdout


def drop(host: Host, version: str, extra: str) -> tuple[int, str]:
    """What `wait` answers to a version that has one more file for nginx."""
    built = host.image(f"nginx_{version}", {"nginx/conf.d/extra.conf": extra})
    host.drop(built, NGINX, f"nginx.raw.v/{built.name}")
    return command(host, "wait", "--timeout", "60", "nginx", built.name)


def stacks(host: Host) -> list[list[str]]:
    """The overlays that nginx has on its /etc."""
    return [row for row in host.mounts(NGINX) if row[4] == "/etc" and "overlay" in row]


def test_from_nothing_to_a_deploy_and_back(host: Host) -> None:
    bed = host.bed
    host.watch()
    host.systemctl("start", "nginx")
    pid, before = host.main_pid(NGINX), files(host)
    original = bed.path("/etc/nginx/nginx.conf").read_text()

    status, said = command(host, "init", "nginx", "--dry-run")
    assert status == 0 and "Nothing was done" in said and "Check=/usr/sbin/nginx" in said
    status, said = command(host, "init", "nginx")
    assert status == 2 and "--yes does it" in said
    status, said = command(host, "init", "nginx", typed="n\n")
    assert status == 1 and "Do this? [y/N]" in said
    assert files(host) == before

    status, said = command(host, "init", "nginx", typed="y\n")
    assert status == 0, said
    assert f"{SECRET} (0640)" in said and f"alone, by the recipe or as what an editor left: {KEY}" in said
    assert "only new images do, also for what upgrades of nginx" in said
    assert "systemctl restart nginx.service" in said and "confext-watcher remove nginx.service" in said
    assert host.main_pid(NGINX) == pid, "nothing is restarted"
    assert bed.path(f"{PLACE}/nginx_0.raw").stat().st_mode & 0o777 == 0o600
    status, said = command(host, "init", "nginx")
    assert status == 0 and "set up already" in said and "systemctl restart nginx.service" in said

    host.systemctl("restart", "nginx")
    pid = host.started(NGINX)
    assert len(stacks(host)) == 1
    assert host.see(NGINX, "/etc/nginx/nginx.conf") == original.strip()
    assert host.see(NGINX, SECRET) == "# it is one" and host.see(NGINX, KEY) == "key"
    status, said = command(host, "init", "nginx", "--yes")
    assert status == 0 and "restart" not in said

    next_version = re.findall(r"^  (.*)$", bed.run(["confext-watcher", "init", "nginx"]).stdout, re.MULTILINE)
    copied = (
        'cp -aT /etc/nginx COPY; echo "server { listen 127.0.0.1:8099; return 204; }" >COPY/conf.d/extra.conf'
    )
    build_and_drop = [line for line in next_version if "systemctl" not in line and "remove" not in line]
    typed = ["mkdir /root/work", "cd /root/work", copied, *build_and_drop, "cd /", "rm -r /root/work"]
    bed.run(["sh", "-e", "-c", "\n".join(typed)])
    bed.run(["curl", "--fail", "--silent", "--retry", "9", "--retry-connrefused", "http://127.0.0.1:8099"])
    status, said = drop(host, "2", "nonsense;")
    assert status == 1 and "refused: check" in said, said
    assert "8099" in host.see(NGINX, "/etc/nginx/conf.d/extra.conf")

    dropped = files(host)
    status, said = command(host, "remove", "nginx", "--dry-run")
    assert status == 0 and f"{TOP}/" in said and files(host) == dropped
    status, said = command(host, "remove", "nginx", typed="y\n")
    assert status == 0 and "nginx.service has the host's own /etc" in said, said
    assert host.main_pid(NGINX) == pid and stacks(host) == []
    assert host.see(NGINX, "/etc/nginx/conf.d/extra.conf") == ""
    assert [line for line in files(host).splitlines() if "nginx.service" in line] == []
    assert not bed.path("/run/systemd/generator/nginx.service.d").exists()
    kept = bed.run(["find", "/var/lib/confext-watcher/removed", "-name", "*.raw", "-printf", "%f\n"]).stdout
    assert sorted(kept.split()) == ["nginx_0.raw", "nginx_1.raw", "nginx_2.raw"]
    status, said = command(host, "remove", "nginx")
    assert status == 0 and "nothing to remove" in said


READ = """
import os, sys
for path in sys.argv[1:]:
    names = sorted(os.listxattr(path))
    print(path, oct(os.stat(path).st_mode), [(name, os.getxattr(path, name)) for name in names])
"""
LET_ONE = struct.pack(
    "<I" + "HHI" * 5, 2, *(1, 6, ANY), *(2, 4, 1234), *(4, 0, ANY), *(16, 4, ANY), *(32, 0, ANY)
)
"""An access control list: user 1234 may read, and the group may not. The mode says 0640."""


@needs.filesystem("erofs")
def test_who_may_read_what_on_the_host_may_read_it_in_the_service(host: Host) -> None:
    bed = host.bed
    os.setxattr(bed.path(SECRET), "system.posix_acl_access", LET_ONE)
    os.setxattr(bed.path(SECRET), "user.origin", b"here")
    os.setxattr(bed.path("/etc/nginx/nginx.conf"), "user.origin", b"there")
    host.watch()
    status, said = command(host, "init", "nginx", "--yes")
    assert (
        status == 0 and f"The image is an erofs, which can hold the access control lists of {SECRET}" in said
    )
    host.systemctl("start", "nginx")
    read = ["python3", "-c", READ, SECRET, "/etc/nginx/nginx.conf"]
    inside = ["nsenter", "--target", str(host.started(NGINX)), "--mount", "--root", "--"]
    seen = bed.run([*inside, *read]).stdout
    assert len(stacks(host)) == 1 and seen == bed.run(read).stdout
    assert "0o100640" in seen and "posix_acl_access" in seen and seen.count("user.origin") == 2
    for uid, may in ((1234, True), (1235, False)):
        for place in (inside, []):
            cat = [*place, "setpriv", f"--reuid={uid}", "--regid=0", "--clear-groups", "cat", SECRET]
            assert (bed.run(cat, check=False).returncode == 0) is may


def test_what_a_person_has_made_is_never_lost(host: Host) -> None:
    """His drop-in, his other images, and a daemon that does not run."""
    bed = host.bed
    host.watch()
    own = "[X-Confext]\nSettleSec=0\n"
    bed.run(["mkdir", "-p", f"{UNITS}/nginx.service.d", f"{TOP}/aaa.raw.v"])
    bed.path(DROP_IN).write_text(own)
    status, said = command(
        host, "init", "nginx", "--yes", "--from", "/etc/nginx/conf.d", "--from", "/etc/nginx/nginx.conf"
    )
    assert status == 0 and "is not by this command, and stays" in said and "aaa.raw.v" in said
    assert bed.path(DROP_IN).read_text() == own
    status, said = command(host, "remove", "nginx", "--yes")
    assert status == 0 and "Not made by init" in said and "goes on taking part" in said
    assert bed.path(f"{TOP}/aaa.raw.v").is_dir() and bed.path(DROP_IN).read_text() == own
    assert not bed.path(PLACE).exists()

    bed.path(DROP_IN).unlink()
    command(host, "init", "nginx", "--yes", "--user", "nobody")
    assert bed.path(PLACE).stat().st_uid == 65534 and "TrustedUsers=nobody" in bed.path(DROP_IN).read_text()
    with bed.path(DROP_IN).open("a") as file:
        file.write("SettleSec=0\n")
    status, said = command(host, "init", "nginx", "--yes")
    assert status == 0 and "was changed by hand, and stays" in said
    host.systemctl("start", "nginx")
    assert len(stacks(host)) == 1
    host.systemctl("stop", "confext-watcher")
    status, said = command(host, "remove", "nginx", "--yes", "--all")
    assert status == 0 and "the daemon does not run" in said and "systemctl restart nginx.service" in said
    assert not bed.path(TOP).exists() and not bed.path(DROP_IN).exists()
    kept = bed.run(["sh", "-c", "cat /var/lib/confext-watcher/removed/*/confext.conf"]).stdout
    assert kept.endswith("SettleSec=0\n")
    host.systemctl("restart", "nginx")
    assert stacks(host) == []
    host.systemctl("start", "confext-watcher")
    status, said = command(host, "remove", "nginx", "--yes")
    assert status == 0 and "has the host's own /etc" in said, said
    status, said = command(host, "remove", "nginx", "--yes")
    assert status == 0 and "nothing to remove" in said


def test_what_fails_leaves_nothing(host: Host) -> None:
    bed = host.bed
    before = files(host)

    def fails(reason: str, *words: str, prepare: str = "true", after: str = "true") -> None:
        shell = [
            "sh",
            "-c",
            f'{prepare}; confext-watcher init "$@" --yes; status=$?; {after}; exit $status',
            "sh",
        ]
        done = bed.run([*shell, *words], check=False)
        assert done.returncode == 1 and reason in done.stdout + done.stderr, done.stdout + done.stderr
        assert files(host) == before

    tool = "/usr/bin/mksquashfs"
    fails(
        "apt install squashfs-tools",
        "nginx",
        prepare=f"mv {tool} {tool}.away",
        after=f"mv {tool}.away {tool}",
    )
    generator, away = "/usr/lib/systemd/system-generators/confext-watcher-generator", "/root/generator"
    fails("generator installed?", "nginx", prepare=f"mv {generator} {away}", after=f"mv {away} {generator}")
    fails("no such unit", "nobody-has-this")
    fails("no recipe is for", "dbus")
    fails("there is nothing in /etc/none", "nginx", "--from", "/etc/none")
    fails("no path below /etc", "nginx", "--from", "/usr")
    fails("is a link to", "nginx", "--from", "/etc/os-release")
    fails("there is no such user", "nginx", "--user", "none")
    fails("there is no such recipe, only", "nginx", "--recipe", "none-such")
    fails("is no service unit", "nginx.socket")
    as_user = ["setpriv", "--reuid=65534", "--clear-groups", "confext-watcher"]
    for words in (["init", "nginx", "--yes"], ["remove", "nginx", "--yes"]):
        done = bed.run([*as_user, *words], check=False)
        assert done.returncode in (0, 1) and (
            "only root may" in done.stderr or "nothing to remove" in done.stdout
        )
    assert files(host) == before
