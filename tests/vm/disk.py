# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the virtual machine boots from, built once and kept in the cache of the containers' roots (`beds/roots.py`).

It is Debian 13 as mmdebstrap makes it, with Debian's own kernel, put on an ext4 by mke2fs. The kernel has the driver of
the disk as a module. So there is an initramfs, of busybox and that module: Debian's own takes far longer where each
instruction is emulated. For the same reason nothing starts at boot that no test needs.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from beds import roots

SUITE = "trixie"
SIZE = "2G"

_PACKAGES = ("linux-image-cloud-amd64", "udev", "cryptsetup-bin", "busybox-static", "cpio")

_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox insmod /virtio_blk.ko
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /sbin/init
"""

_WIRE = """\
[Unit]
DefaultDependencies=no
Before=ssh.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/modprobe virtio_net
ExecStart=/sbin/ip link set lo up
ExecStart=/sbin/ip address add 10.0.2.15/24 dev eth0
ExecStart=/sbin/ip link set eth0 up

[Install]
WantedBy=multi-user.target
"""

_SSHD = "UsePAM no\nUseDNS no\nPerSourcePenalties no\nMaxSessions 100\n"

_NOT_AT_BOOT = """
    sys-kernel-debug.mount sys-kernel-tracing.mount dev-mqueue.mount dev-hugepages.mount tmp.mount run-lock.mount
    modprobe@configfs.service modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service
    systemd-repart.service
    systemd-udev-trigger.service systemd-udev-load-credentials.service systemd-modules-load.service
    systemd-logind.service systemd-random-seed.service systemd-sysctl.service
    systemd-user-sessions.service
    systemd-update-utmp.service systemd-networkd-persistent-storage.service systemd-firstboot.service
    systemd-sysusers.service systemd-journal-catalog-update.service systemd-update-done.service ldconfig.service
    systemd-binfmt.service e2scrub_reap.service e2scrub_all.timer fstrim.timer dpkg-db-backup.timer
    systemd-tmpfiles-clean.timer apt-daily.timer apt-daily-upgrade.timer getty.target
""".split()


@dataclass(frozen=True)
class Files:
    """What qemu is given, and the key that lets in.

    Attributes:
        kernel, initrd, disk: the disk is never written to.
        key: private key of SSH for root.
        state: what the machine had in its memory when it had booted from this disk; None if it has not.
    """

    kernel: Path
    initrd: Path
    disk: Path
    key: Path
    state: Path | None = None


def root() -> Path:
    """The root file system that is on the disk, as a directory: what runs in there under chroot runs at full speed.

    It is built unless it is in the cache. Never write to it.

    Raises:
        roots.BuildFailed: what mmdebstrap said.
    """
    # No initramfs by the hook of the kernel's package: it takes half a minute.
    environment = {**os.environ, "INITRD": "No"}
    return roots.cached(
        "machine-root",
        roots.recipe(SUITE, _PACKAGES),
        lambda path: roots.bootstrap(SUITE, path, _PACKAGES, environment),
    )


def build() -> Files:
    """The files, built unless they are in the cache.

    Raises:
        roots.BuildFailed: mmdebstrap or a tool could not; what it said.
    """
    recipe = repr((roots.recipe(SUITE, _PACKAGES), Path(__file__).read_text()))
    kept = root()
    found = roots.cached("machine", recipe, lambda path: _make(kept, path))
    return Files(*(found / name for name in ("vmlinuz", "initrd", "disk", "key")))


def _make(kept: Path, directory: Path) -> None:
    directory.mkdir()
    copy = directory / "root"
    try:
        _run(["cp", "--archive", str(kept), str(copy)])
        _set_up(copy, directory / "key")
        (modules,) = (copy / "lib/modules").iterdir()
        shutil.move(copy / f"boot/vmlinuz-{modules.name}", directory / "vmlinuz")
        _initramfs(copy, modules, directory / "initrd")
        disk = [str(directory / "disk"), SIZE]
        _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(copy), *disk])
    except subprocess.CalledProcessError as error:
        raise roots.BuildFailed(f"{error}\n{error.stderr.decode(errors='replace')}") from None
    shutil.rmtree(copy)


def _set_up(root: Path, key: Path) -> None:
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)])
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.move(key.with_name("key.pub"), root / "root/.ssh/authorized_keys")
    (root / "etc/ssh/sshd_config.d/machine.conf").write_text(_SSHD)
    (root / "etc/systemd/system/wire.service").write_text(_WIRE)
    (root / "etc/hostname").write_text("machine\n")
    (root / "etc/fstab").write_text("")
    (root / "etc/systemd/system-generators").mkdir(exist_ok=True)
    systemctl = ["chroot", str(root), "systemctl", "--quiet"]
    _run([*systemctl, "unmask", "systemd-udevd.service"])
    _run([*systemctl, "mask", *_NOT_AT_BOOT])
    (root / "etc/systemd/system-generators/systemd-ssh-generator").symlink_to("/dev/null")
    _run([*systemctl, "enable", "wire.service", "ssh.service"])
    _run([*systemctl, "disable", "systemd-pstore.service", "nginx.service"])


def _initramfs(root: Path, modules: Path, target: Path) -> None:
    inside = root / "initramfs"
    for directory in ("bin", "dev", "root"):
        (inside / directory).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", inside / "bin")
    driver = modules / "kernel/drivers/block/virtio_blk.ko.xz"
    (inside / "virtio_blk.ko").write_bytes(lzma.decompress(driver.read_bytes()))
    (inside / "init").write_text(_INIT)
    (inside / "init").chmod(0o755)
    pack = "cd /initramfs && find . | cpio --quiet --create --format=newc"
    target.write_bytes(_run(["chroot", str(root), "sh", "-c", pack]))
    shutil.rmtree(inside)


def _run(argv: list[str]) -> bytes:
    return subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True).stdout
