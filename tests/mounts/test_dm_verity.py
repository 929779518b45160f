# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of the answers of veritysetup and dmsetup. With a real device mapper: `tests/vm/test_vm_verity.py`."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from watcher.mounts import dm_verity
from watcher.mounts.dm_verity import PREFIX, Devices, Unavailable, Verified, remove_leftovers
from watcher.mounts.process import start_time
from watcher.settings import device_mapper

Tools = Callable[..., Path]
ROOT_HASH = bytes(range(32))
WANTED = Verified("/dev/loop1", "/dev/loop2", ROOT_HASH, None, "a" * 64)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Make programs of the device mapper's, each a shell script; what they are called with is in the file returned."""
    called = tmp_path / "called"
    called.touch()
    programs, devices = tmp_path / "bin", tmp_path / "mapper"
    devices.mkdir()
    programs.mkdir()
    monkeypatch.setattr(device_mapper, "CONTROL", os.devnull)
    monkeypatch.setattr(dm_verity, "DEVICES", str(devices))
    monkeypatch.setattr(dm_verity, "BLOCK", str(tmp_path / "block"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(**scripts: str) -> Path:
        for name, script in scripts.items():
            made = programs / name
            made.write_text(f'#!/bin/sh\necho {name} "$@" >>{called}\nmapper={devices}\n{script}\n')
            made.chmod(0o755)
        return called

    make(veritysetup='touch "$mapper/$3"', dmsetup='rm "$mapper/$3"')
    return make


def test_it_is_removed_when_it_is_mounted(tools: Tools) -> None:
    with Devices().opened(WANTED) as path:
        name = os.path.basename(path)
        assert os.path.exists(path)
    namespace = os.stat("/proc/self/ns/pid").st_ino
    assert name.startswith(f"{PREFIX}{'a' * 16}-{namespace}-{os.getpid()}-")
    assert tools().read_text().splitlines() == [
        f"veritysetup open /dev/loop1 {name} /dev/loop2 {ROOT_HASH.hex()}",
        f"dmsetup remove --deferred {name}",
    ]


def test_it_is_removed_where_it_cannot_be_mounted(tools: Tools) -> None:
    with pytest.raises(ZeroDivisionError), Devices().opened(WANTED):
        raise ZeroDivisionError
    assert "dmsetup remove --deferred" in tools().read_text()


def test_the_kernel_gets_the_signature(tools: Tools, tmp_path: Path) -> None:
    tools(veritysetup=f'cat "${{6#*=}}" >{tmp_path}/signature')
    with Devices().opened(WANTED._replace(signature=b"PKCS#7")):
        pass
    assert (tmp_path / "signature").read_bytes() == b"PKCS#7"


def test_each_has_a_name_of_its_own(tools: Tools) -> None:
    """One that a service still has keeps its name until that ends."""
    devices = Devices()
    with devices.opened(WANTED) as one, devices.opened(WANTED) as other:
        assert one != other


@pytest.mark.parametrize(
    ("script", "said", "refused"),
    [
        ("echo 'reload ioctl failed: Required key not available' >&2; exit 1", "Required key not", True),
        ("exit 4", "veritysetup: failed with exit status 4", True),
        ("kill -SEGV $$", "veritysetup: was ended by SIGSEGV", True),
    ],
)
def test_what_cannot_be_set_up_is_told(tools: Tools, script: str, said: str, *, refused: bool) -> None:
    tools(veritysetup=script)
    with pytest.raises(Unavailable, match=said) as caught, Devices().opened(WANTED):
        raise AssertionError("not reached")
    assert caught.value.refused is refused
    assert "dmsetup" not in tools().read_text(), "there is nothing to remove"


def test_without_the_package_or_the_device_mapper(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"package cryptsetup-bin"), Devices().opened(WANTED):
        raise AssertionError("not reached")
    monkeypatch.setattr(device_mapper, "CONTROL", str(tmp_path / "none"))
    with pytest.raises(Unavailable, match="no device mapper"), Devices().opened(WANTED):
        raise AssertionError("not reached")


def test_what_hangs_is_waited_for_once(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where udev does not answer, no later image waits for it, and a device that is there in part is removed."""
    monkeypatch.setattr(dm_verity, "_TIMEOUT_SEC", 0.3)
    tools(veritysetup="exec sleep 60")
    devices = Devices()
    for _ in range(2):
        with pytest.raises(Unavailable, match="has not answered in"), devices.opened(WANTED):
            raise AssertionError("not reached")
    programs = [line.split()[0] for line in tools().read_text().splitlines()]
    assert programs == ["veritysetup", "dmsetup"]


def test_what_a_killed_watcher_has_left_is_removed(tools: Tools, tmp_path: Path) -> None:
    """But not what a watcher in a container has in work: it has the same device mapper, and other PIDs."""
    ended = subprocess.Popen(["sleep", "60"])
    namespace = os.stat("/proc/self/ns/pid").st_ino
    names = {
        who: f"{PREFIX}{'b' * 16}-{namespace}-{pid}-{start_time(pid)}-{number}"
        for number, (who, pid) in enumerate((("dead", ended.pid), ("alive", os.getpid())))
    }
    names["used"] = f"{names['dead']}1"
    names["container"] = names["dead"].replace(str(namespace), str(namespace + 1))
    names["strange"] = f"{PREFIX}1"
    ended.send_signal(signal.SIGKILL)
    ended.wait()
    (tmp_path / "block/dm-1/dm").mkdir(parents=True)
    (tmp_path / "block/loop0").mkdir()
    (tmp_path / "block/dm-1/dm/name").write_text(f"{names['dead']}\n")
    state = {"used": "ACTIVE (READ-ONLY) (DEFERRED REMOVE)"}
    blocks = [f"Name:   {name}\nState:   {state.get(who, 'ACTIVE')}\n" for who, name in names.items()]
    listed = "\n".join([*blocks, "Name:   vg-root\nState:   ACTIVE\n"])
    tools(dmsetup=f"if [ $1 = info ]; then cat <<'.'\n{listed}.\nfi")
    with structlog.testing.capture_logs() as logs:
        remove_leftovers()
    assert tools().read_text().splitlines() == ["dmsetup info", f"dmsetup remove --deferred {names['dead']}"]
    (said,) = [entry["event"] for entry in logs]
    assert said == f"the device {names['dead']}, which a killed watcher has left, is removed"


def test_where_nothing_is_left_no_program_is_run(tools: Tools) -> None:
    remove_leftovers()
    assert tools().read_text() == ""
