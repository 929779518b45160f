# SPDX-License-Identifier: LGPL-2.1-or-later
"""`systemd.confext=` on the kernel command line, as systemd 262 reads it."""

from __future__ import annotations

import pytest

from watcher.settings import kernel_command_line
from watcher.settings.kernel_command_line import is_off, why_nothing_new


@pytest.mark.parametrize(
    ("line", "off"),
    [
        ("BOOT_IMAGE=/vmlinuz root=/dev/vda quiet", False),
        ("", False),
        ("quiet systemd.confext=no root=/dev/vda", True),
        ("systemd.confext=0", True),
        ("systemd.confext=off\n", True),
        ('"systemd.confext=no" quiet', True),
        ("systemd.confext=yes", False),
        ("systemd.confext", False),
        ("systemd.confext=", False),
        ("systemd.confext=nope", False),
        ("systemd.confext=no systemd.confext=yes", False),
        ("systemd.confext=yes systemd.confext=no", True),
        ("systemd.confext=no systemd.confext", True),
        ("systemd.sysext=no rd.systemd.confext=no xsystemd.confext=no", False),
        ("systemd.confext=no 'never closed", True),
        ("SYSTEMD.CONFEXT=no", False),
    ],
)
def test_what_turns_confexts_off(line: str, off: bool) -> None:
    assert is_off(line) is off


def test_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_PROC_CMDLINE", "quiet systemd.confext=no")
    why_nothing_new.cache_clear()
    assert why_nothing_new() == "systemd.confext=no is on the kernel command line"
    monkeypatch.delenv("SYSTEMD_PROC_CMDLINE")
    monkeypatch.setattr(kernel_command_line, "_IN_CONTAINER", "/nowhere")
    monkeypatch.setattr(kernel_command_line, "_KERNELS", "/nowhere")
    why_nothing_new.cache_clear()
    assert why_nothing_new() == ""
    why_nothing_new.cache_clear()
