# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signed disk images on a kernel with device mapper: what a service runs on goes through dm-verity.

systemd sets it up when it starts the service, the watcher when it swaps: mounts/dm_verity.py, images/verified_mounts.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from support import needs
from support.images import confext, image, noise
from support.signed import Key, make_key, make_tree, padded
from vm import native
from vm.machine import Machine
from vm.web import DROPS, WEB, Web, web

pytestmark = [needs.vm, pytest.mark.limit(900), needs.tool("openssl"), needs.tool("sfdisk")]

UNIT = """
[Service]
Type=exec
ExecStart=/bin/sleep infinity
ExecReload=/bin/true
ExtensionImagePolicy=root=signed+absent:=unused+absent
"""

SIGNED = b'"signature":"'

REPART = """\
exec systemd-repart --make-ddi=confext --offline=yes --private-key={work}/key --certificate={work}/crt \
    --copy-source={work}/site {work}/made.raw
"""


class Parts(NamedTuple):
    """Where the partitions of a disk image begin, bytes."""

    data: int
    tree: int
    signature: int


def signed(directory: Path, content: str, key: Key) -> Path:
    """A disk image by systemd-repart, signed."""
    directory.mkdir()
    # With more than one block there are hashes of blocks between the data and the root hash.
    files = {"etc/web.conf": content.encode(), "etc/noise": noise(20_000)}
    confext(directory / "site", "site", files)
    shutil.copy(key.private, directory / "key")
    shutil.copy(key.certificate, directory / "crt")
    native.run(directory, ["sh", "-ec", REPART.format(work=native.WORK)])
    return directory / "made.raw"


def trusted(machine: Machine, directory: Path) -> Key:
    """A key, whose certificate is in verity.d of the machine."""
    key = make_key(directory, "ours")
    (directory / "certificate").mkdir()
    shutil.copy(key.certificate, directory / "certificate/ours.crt")
    machine.run(["mkdir", "-p", "/etc/verity.d"])
    machine.send(directory / "certificate", to="/etc/verity.d")
    return key


def parts(image: Path) -> Parts:
    listed = subprocess.run(["sfdisk", "--json", str(image)], check=True, capture_output=True).stdout
    found: dict[str, int] = {
        row["name"]: row["start"] * 512 for row in json.loads(listed)["partitiontable"]["partitions"]
    }

    def start(suffix: str) -> int:
        (begin,) = (begin for name, begin in found.items() if name.endswith(suffix))
        return begin

    tree, signature = start("-verity"), start("-verity-sig")
    (data,) = set(found.values()) - {tree, signature}
    return Parts(data, tree, signature)


def damaged(image: Path, target: Path, at: int) -> Path:
    """A copy with one bit flipped."""
    content = bytearray(image.read_bytes())
    content[at] ^= 1
    target.write_bytes(content)
    return target


@pytest.fixture
def site(machine: Machine) -> Iterator[Web]:
    with web(machine) as made:
        yield made


def test_signed_goes_in_and_what_is_damaged_does_not(site: Web, machine: Machine, tmp_path: Path) -> None:
    key = trusted(machine, tmp_path)
    good = {version: signed(tmp_path / str(version), str(version), key) for version in (1, 2)}
    site.unit(UNIT)
    site.drop(good[1].rename(tmp_path / "site_1.raw"))
    before = unknown_keys(machine)
    journal = site.start()
    assert sees(machine) == "1"
    assert unknown_keys(machine) - before == 2, (
        "the kernel gets the signature from the watcher and from systemd"
    )

    image, drops = good[2], tmp_path / "drops"
    drops.mkdir()
    where = parts(image)
    content = image.read_bytes()
    bits = {
        "11": where.data + 1000,
        "12": where.tree + 4096 + 3,
        "13": where.tree + 64,
        # The end of it is what the key has made; a bit of the certificate that comes along does not count.
        "14": content.index(b'"', content.index(SIGNED, where.signature) + len(SIGNED)) - 40,
        "15": 2 * 512 + 60,
    }
    for version, at in bits.items():
        damaged(image, drops / f"site_{version}.raw", at)
    other = signed(tmp_path / "other", "16", make_key(tmp_path, "other"))
    other.rename(drops / "site_16.raw")
    machine.send(drops, to=DROPS)
    left = {f"site_{version}.raw" for version in (*bits, "16")}
    while left:
        entry = journal.until(lambda entry: "refused: " in entry["MESSAGE"])
        left -= {name for name in left if name in entry["MESSAGE"]}
    assert sees(machine) == "1"

    at = where.data + 1000
    site.drop(image.rename(tmp_path / "site_20.raw"))
    journal.applied(WEB)
    assert sees(machine) == "2"
    assert "dm-verity verifies what is read of it" in trust(machine)["how"]
    assert "/etc/verity.d/ours.crt" in trust(machine)["how"], "the kernel has not that key"
    # The service has the store's copy: what happens to the file is nothing to it, nor to its next start.
    flip = f"printf X | dd conv=notrunc bs=1 seek={at} of={DROPS}/site_20.raw status=none"
    machine.run(["sh", "-c", flip])
    journal.until(lambda entry: "site_20.raw" in entry["MESSAGE"])
    assert sees(machine) == "2"
    machine.run(["systemctl", "restart", WEB])
    assert sees(machine) == "2"
    assert "verity" in machine.run(["dmsetup", "table"]).stdout, (
        "systemd verifies what it starts a service on"
    )
    machine.run(["systemctl", "stop", WEB, "confext-watcher"])
    assert left_behind(machine) == "No devices found\n"


def test_what_build_has_signed_goes_in_also_while_the_service_runs(
    site: Web, machine: Machine, tmp_path: Path
) -> None:
    """Made in the drop directory by Debian 13's tools: once without a mapped device there, once with."""
    key = trusted(machine, tmp_path)
    keys = tmp_path / "send/root/keys"
    keys.mkdir(parents=True)
    for path in (key.private, key.certificate):
        shutil.copy(path, keys)
    machine.send(tmp_path / "send")
    site.unit(UNIT)
    build = f"""
        mkdir -p /root/site/etc
        printf $1 >/root/site/etc/web.conf
        exec confext-watcher build /root/site --output={DROPS}/ --version=$1 \\
            --sign=/root/keys/ours.key --certificate=/root/keys/ours.crt
    """
    said = machine.run(["sh", "-ec", build, "sh", "1"]).stdout
    assert f"{DROPS}/site_1.raw: signed by CN=ours" in said
    journal = site.start()
    assert sees(machine) == "1"
    machine.run(["sh", "-ec", build, "sh", "2"])
    journal.applied(WEB)
    assert sees(machine) == "2"


def test_what_a_running_service_reads_is_verified(site: Web, machine: Machine, tmp_path: Path) -> None:
    """Who writes to the disk under the store can make a file unreadable, but not another one."""
    key = trusted(machine, tmp_path)
    images = [signed(tmp_path / str(version), str(version), key) for version in (1, 2)]
    site.unit(UNIT.replace("signed", "verity+signed+unprotected"))
    site.drop(images[0].rename(tmp_path / "site_1.raw"))
    journal = site.start()
    where = parts(images[1])
    site.drop(images[1].rename(tmp_path / "site_2.raw"))
    digest = journal.applied(WEB)["CONFEXT_DIGEST"]
    assert devices(machine), "the service shows what was dropped through a device"
    assert sees(machine) == "2"
    other = signed(tmp_path / "other", "3", make_key(tmp_path, "other"))
    site.drop(other.rename(tmp_path / "site_3.raw"))
    journal.until(lambda entry: "systemd would not start the unit on it" in entry["MESSAGE"])
    # The file's own page is in the memory of the kernel until it is dropped.
    flip = f"""
        printf X | dd conv=notrunc,fsync bs=1 seek={where.data + 4096} status=none \
            of=/var/lib/confext-watcher/store/{digest}
        echo 3 >/proc/sys/vm/drop_caches
        pid=$(systemctl show --value --property=MainPID {WEB})
        nsenter --target $pid --mount -- sh -c 'cat /etc/noise /etc/web.conf' 2>&1 >/dev/null
    """
    assert "Input/output error" in machine.run(["sh", "-c", flip], check=False).stdout
    machine.run(["systemctl", "stop", WEB, "confext-watcher"])
    assert left_behind(machine) == "No devices found\n"


# Sets up devices for an image, and is killed while it does.
KILLED = """
import os, signal, sys, time
sys.path.insert(0, "/usr/lib/confext-watcher")
from watcher.mounts import syscalls
from watcher.mounts.dm_verity import Devices, Verified, remove_leftovers
def set_up():
    one, two = (syscalls.loop_attach(os.open(f"/root/drop/{name}", os.O_RDONLY), "killed") for name in ("data", "tree"))
    with Devices().opened(Verified(one[1], two[1], bytes.fromhex(sys.argv[1]), None, "a" * 64)) as path:
        syscalls.mount(path, "/mnt", "squashfs", 1)
    time.sleep(60)
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
for tenths in range(1, 40, 2):
    pid = os.fork()
    if not pid:
        try:
            set_up()
        finally:
            os._exit(1)
    time.sleep(tenths / 100)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    time.sleep(0.3)  # what it has started ends
    with open("/proc/self/mounts") as mounts:
        mounted = "/mnt squashfs" in mounts.read()
    remove_leftovers()
    print(tenths, "mounted" if mounted else "")
    if mounted:
        assert open("/mnt/etc/web.conf").read() == "x"
        syscalls.umount2("/mnt", 0)
"""


def test_killed_at_any_moment_it_leaves_nothing(machine: Machine, tmp_path: Path) -> None:
    """What is mounted stays so until its last user goes; what is not, the next start removes."""
    content = padded(
        image(confext(tmp_path / "site", "web", {"etc/web.conf": b"x"}), tmp_path / "raw").read_bytes()
    )
    tree = make_tree(content)
    drop = tmp_path / "send/root/drop"
    drop.mkdir(parents=True)
    for name, written in (("data", content), ("tree", tree.content), ("killed.py", KILLED.encode())):
        (drop / name).write_bytes(written)
    machine.send(tmp_path / "send")
    machine.run(["sh", "-c", "modprobe loop; modprobe dm_verity"])
    said = machine.run(["python3", "/root/drop/killed.py", tree.root_hash.hex()]).stdout
    assert "which a killed watcher has left, is removed" in said
    assert "mounted" in said
    assert left_behind(machine) == "No devices found\n"


def left_behind(machine: Machine) -> str:
    return machine.run(["sh", "-c", "udevadm settle; dmsetup ls; losetup --list --noheadings"]).stdout


def unknown_keys(machine: Machine) -> int:
    """How often the kernel was given a signature of a key that is not in its keyring."""
    return machine.run(["journalctl", "--dmesg"]).stdout.count("Root hash verification failed (-ENOKEY)")


def devices(machine: Machine) -> list[str]:
    """The mapped devices that the watcher has made."""
    listed = machine.run(["dmsetup", "ls"]).stdout.split()
    return [word for word in listed if word.startswith("confext-watcher-")]


def trust(machine: Machine) -> dict[str, str]:
    """What `status` says is proved of the one layer."""
    said = json.loads(machine.run(["confext-watcher", "status", "--json", WEB]).stdout)
    (layer,) = said["services"][0]["layers"]
    found: dict[str, str] = layer["trust"]
    return found


def sees(machine: Machine) -> str:
    """What the unit has in its configuration."""
    pid = machine.property(WEB, "MainPID")
    return machine.run(["nsenter", "--target", pid, "--mount", "--", "cat", "/etc/web.conf"]).stdout
