# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the stacks that systemd itself mounts stand in a mount table; rows as 257 and 262 made them."""

from watcher.mounts.table import Table

_ROOT = "385 129 254:0 / / ro,relatime shared:184 - ext4 /dev/vda rw\n"
_LOWER = "lowerdir=/run/systemd/unit-extensions/0/etc:/run/systemd/mount-rootfs/etc,redirect_dir=on"


def test_a_stack_of_systemd_257_is_known_by_its_layers() -> None:
    row = f"408 385 0:84 / /etc ro,relatime shared:234 - overlay overlay ro,{_LOWER}\n"
    mounted = Table(_ROOT + row).mounted()
    assert mounted.overlay
    assert mounted.layers is None


def test_a_stack_of_systemd_262_is_known_by_its_source() -> None:
    row = f"408 385 0:84 / /etc ro,relatime shared:234 - overlay systemd-extensions ro,{_LOWER}\n"
    assert Table(_ROOT + row).mounted().overlay


def test_another_overlay_is_not_a_stack() -> None:
    for source in ("overlay", "confext"):
        row = f"408 385 0:84 / /etc rw,relatime - overlay {source} rw,lowerdir=/srv/a:/srv/b\n"
        assert not Table(_ROOT + row).mounted().overlay
