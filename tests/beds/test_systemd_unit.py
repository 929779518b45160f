# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watcher's own unit: it allows all that is needed, and little besides (`units/confext-watcher.service.in`).

What it needs for mapped devices is in use in tests/vm/test_vm_verity.py: a container has none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from beds import site
from beds.bed import Bed
from beds.host import SECONDS, SLEEP, Host
from beds.host import UNITS as UNIT_DIRECTORY
from support import needs
from support.images import image, noise
from support.nobody import AS_NOBODY, NOBODY
from watcher.images import attributes

pytestmark = [needs.bed, needs.tool("mksquashfs"), needs.tool("mkfs.erofs")]

RELOADS = f"{SLEEP}ExecReload=/bin/true\n[X-Confext]\nTrustedUsers=nobody 1234\n"
UNITS = {
    "plain.service": f"[Service]\nUser=nobody\n{RELOADS}Reload=signal:SIGCONT\n",
    "dynamic.service": f"[Service]\nDynamicUser=yes\nPrivateUsers=yes\n{RELOADS}",
    "strict.service": f"[Service]\nProtectSystem=strict\nPrivateDevices=yes\nPrivateUsers=yes\n{RELOADS}"
    "Check=/bin/test -e /etc/passwd\n",
}
STEPS = ["squashfs", "erofs", "tree", "tries", "writers", "standalone", "removal"]
# VFS_CAP_REVISION_2, effective; CAP_NET_BIND_SERVICE.
CAPABLE = bytes.fromhex("0100000200040000000000000000000000000000")


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    with site.host(bed) as made:
        yield made


def scenario(host: Host) -> Iterator[str]:
    """All that the watcher needs its rights for, step by step; each step's name once it is done."""
    bed = host.bed
    host.stack.callback(bed.run, ["rm", "-rf", "/srv/standalone", "/srv/odd"])
    host.units(UNITS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", *UNITS)
    for version, fstype in (("1", "squashfs"), ("2", "erofs")):
        tree = host.tree(f"web_{version}", {"web.txt": version})
        (tree / "etc/large").write_bytes(noise(9 << 20))  # so much is read with a low priority
        built = image(tree, tree.parent / f"{tree.name}.raw", fstype)
        for name in UNITS:
            # As a user who deploys leaves it: his own, and nobody else's to read.
            target = host.confext_dir(name) / "web.raw.v" / built.name
            target.parent.mkdir(exist_ok=True)
            coming = target.with_name(".coming")
            shutil.copyfile(built, coming)
            os.chown(coming, NOBODY, NOBODY)
            coming.chmod(0o600)
            coming.rename(target)
        journal.all_applied(UNITS)
        for name in UNITS:
            assert host.see(name, "/etc/web.txt") == version
        yield fstype
    _odd_tree(host)
    journal.all_applied(["plain.service"])
    yield "tree"
    tree = host.tree("web_3", {"web.txt": "3"})
    counted = image(tree, tree.parent / "web_3+2.raw")
    target = host.confext_dir("strict.service") / "web.raw.v" / counted.name
    os.chown(target.parent, NOBODY, NOBODY)
    host.drop(counted, "strict.service", f"web.raw.v/{counted.name}")
    journal.applied("strict.service")
    assert not target.exists()
    yield "tries"
    _two_writers(host, built)
    journal.until(lambda entry: "web_4.raw refused: two programs wrote to it at once" in entry["MESSAGE"])
    yield "writers"
    yield from _standalone(host)
    for name in UNITS:
        shutil.rmtree(host.confext_dir(name))
        host.confext_dir(name).mkdir()
    journal.all_applied(UNITS)
    yield "removal"


def _odd_tree(host: Host) -> None:
    """A tree with whatever a tree may have; the store's copy is the same."""
    source = host.bed.path("/srv/odd")
    shutil.copytree(host.tree("odd", {"owned": "odd"}), source)
    etc = source / "etc"
    os.chown(etc / "owned", 1234, 4321)
    os.chmod(etc / "owned", 0o640)
    os.setxattr(etc / "owned", "user.note", b"said")
    (etc / "set-id").touch()
    os.chmod(etc / "set-id", 0o4755)
    (etc / "shared").mkdir()
    os.chown(etc / "shared", 0, 1234)
    os.chmod(etc / "shared", 0o2755)
    (etc / "capable").touch()
    os.setxattr(etc / "capable", "security.capability", CAPABLE)
    (etc / "link").symlink_to("owned")
    before = _listing(etc)
    dropped = f"{UNIT_DIRECTORY}/plain.service.confext.d/odd"
    host.bed.run(["mv", "/srv/odd", dropped])
    host.bed.run(["confext-watcher", "wait", "plain.service", dropped, "--timeout=20"])
    digest = os.path.basename(os.readlink(host.bed.path(f"{site.STATE}/units/plain.service/odd")))
    assert _listing(host.bed.path(f"{site.STATE}/store/{digest}/etc")) == before


def _two_writers(host: Host, image: Path) -> None:
    """Two processes write a file at once, which is whole all the same: only the kernel can tell of that."""
    target = f"{UNIT_DIRECTORY}/plain.service.confext.d/web.raw.v/web_4.raw"
    shutil.copyfile(image, host.bed.path("/srv/coming"))
    host.stack.callback(host.bed.run, ["rm", "-f", "/srv/coming"])
    both = f"for i in 1 2; do (exec >{target}; sleep 0.3; cat /srv/coming; sleep 0.3) & done; wait"
    host.bed.run(["sh", "-c", both])


def _listing(top: Path) -> dict[str, tuple[object, ...]]:
    """What a copy has to keep of each file."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(top):
        for path in (Path(directory, name) for name in (*directories, *files)):
            status = path.lstat()
            what = status.st_mode, status.st_uid, status.st_gid, attributes.read(str(path), path.name)
            found[str(path.relative_to(top))] = what
    return found


def _standalone(host: Host) -> Iterator[str]:
    """A service that systemd did not start, of a user without rights, with a check and a reload command."""
    bed = host.bed
    bed.run(["mkdir", "-p", "/srv/standalone/web.raw.v"])
    start = [
        *(
            "confext-watcher",
            "exec",
            "--name=alone",
            "--confext-dir=/srv/standalone",
            "--check=/bin/sh -c 'id -u'",
        ),
        *("--reload-command=/bin/sh -c '[ $(id -u) = 65534 ]'", "--"),
        *(
            *AS_NOBODY,
            "--bounding-set=-all",
            "sleep",
            "1000",
        ),
    ]
    process = bed.popen(["systemd-run", "--quiet", "--wait", "--unit=alone", *start])
    host.stack.callback(process.wait)
    host.stack.callback(bed.run, ["systemctl", "stop", "alone.service"])
    known = "until confext-watcher status alone >/dev/null 2>&1; do sleep 0.05; done"
    bed.run(["sh", "-c", known], timeout=SECONDS)
    built = host.image("web_1", {"web.txt": "alone"})
    shutil.copyfile(built, bed.path(f"/srv/standalone/web.raw.v/{built.name}"))
    waited = ["confext-watcher", "wait", "alone", f"/srv/standalone/web.raw.v/{built.name}", "--timeout=20"]
    said = bed.run(waited, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    yield "standalone"


def test_the_unit_allows_what_is_needed(host: Host) -> None:
    assert list(scenario(host)) == STEPS


def test_the_watcher_is_little_exposed(host: Host) -> None:
    asked = ["systemd-analyze", "security", "--no-pager", "confext-watcher.service"]
    done = host.bed.run([*asked, "--threshold=34"], check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_watcher_has_limits(host: Host) -> None:
    host.watch()
    for name in ("MemoryHigh", "MemoryMax", "TasksMax"):
        assert host.bed.property("confext-watcher", name).isdecimal()
