# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine with Debian 13: its own kernel, and systemd 257.

    with Machine() as machine:
        machine.run(["systemctl", "start", "nginx"])

qemu emulates each instruction (TCG), so that it needs nothing of this machine's processor. Its clock counts
instructions while it works, 2 ns each, so that what it measures does not depend on how fast or busy this machine is.
Commands go in over one connection of SSH. Nothing that they do is written to the disk.

It is booted once, and what it then has in its memory is kept beside its disk: from there it goes on within seconds.
`python -m vm.machine` builds and boots it, so that `make test` can show that it is at it. It dies with the process that
started it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from beds import roots
from beds.systemd import ENVIRONMENT, Systemd
from support import needs
from vm import disk

BOOT_SECONDS = 240

_ARGUMENTS = (
    "console=ttyS0 quiet net.ifnames=0 systemd.show_status=error systemd.mask=serial-getty@ttyS0.service"
)


class BootFailed(Exception):
    """It did not come up: `str()` ends with what its console says."""


class Machine(Systemd):
    """A virtual machine.

    Attributes:
        name: for messages.
        pid: of qemu, 0 when it does not run.
    """

    name = "machine"
    patience = 240

    def __init__(self, files: disk.Files | None = None) -> None:
        """Prepare it; nothing happens before `boot()` or `with`.

        Args:
            files: others than `booted()`. Without a `state` it writes to the disk.
        """
        self.pid = 0
        self._files = files
        self._run = Path(tempfile.mkdtemp(prefix="confext-vm."))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def boot(self) -> None:
        """Boot it, or have it go on where it was when it was booted, until commands can be run.

        Raises:
            roots.BuildFailed, BootFailed
        """
        files = self._files or booted()
        port = _free_port()
        with (self._run / "qemu").open("wb") as said:
            qemu = self._start(_qemu(files, port, self._run), said.fileno())
        self.pid = qemu.pid
        deadline = time.monotonic() + BOOT_SECONDS
        connecting = self._connect(files.key, port)
        while subprocess.run(self._ssh("-O", "check"), capture_output=True, check=False).returncode != 0:
            if qemu.poll() is not None:
                raise BootFailed(f"qemu ended\n{(self._run / 'qemu').read_text()}{self.console()}")
            if time.monotonic() > deadline:
                raise BootFailed(f"not up after {BOOT_SECONDS} s\n{self.console()}")
            if connecting.poll() is not None:  # SSH in there was not up
                connecting = self._connect(files.key, port)
            time.sleep(0.2)  # nothing announces it
        self.run(["date", "--utc", f"--set=@{time.time():.0f}"])

    def _start(self, argv: list[str], output: int) -> subprocess.Popen[bytes]:
        started = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        self._processes.append(started)
        return started

    def _connect(self, key: Path, port: int) -> subprocess.Popen[bytes]:
        options = {
            "IdentityFile": key,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": BOOT_SECONDS,
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "Port": port,
        }
        words = [f"-o{name}={value}" for name, value in options.items()]
        with (self._run / "ssh").open("wb") as said:
            return self._start(self._ssh("-M", "-N", *words), said.fileno())

    def _ssh(self, *options: str) -> list[str]:
        return ["ssh", "-F", "none", "-S", str(self._run / "to"), *options, "root@127.0.0.1"]

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line on the host that runs `argv` in the machine, with nothing but `env` added to it."""
        variables = [f"{key}={value}" for key, value in {**ENVIRONMENT, **(env or {})}.items()]
        return [*self._ssh("-T"), shlex.join(["env", "--ignore-environment", *variables, *argv])]

    def send(self, *trees: Path, to: str = "/") -> None:
        """Copy what is in directories to one in the machine, owned by root."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for tree in trees:
                for entry in sorted(os.listdir(tree)):
                    tar.add(tree / entry, entry, filter=_owned_by_root)
        unpack = self.command(
            ["tar", "--extract", "--gzip", "--touch", "--no-overwrite-dir", f"--directory={to}"]
        )
        subprocess.run(unpack, input=packed.getvalue(), check=True, timeout=120)

    def freeze(self, state: Path) -> None:
        """Write down all that it has in its memory, and end it."""
        self._processes.pop().terminate()  # SSH: that connection would not go on
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._run / "qmp"))
            with monitor.makefile("rw") as lines:
                for execute, arguments in (
                    ("qmp_capabilities", {}),
                    ("migrate", {"uri": f"exec:cat >{shlex.quote(str(state))}"}),
                ):
                    _ask(lines, execute, arguments)
                while (status := _ask(lines, "query-migrate", {})["status"]) != "completed":
                    if status == "failed":
                        raise BootFailed("qemu could not write down the state of the machine")
                    time.sleep(0.1)  # nothing announces it
        self.stop()

    def console(self, lines: int = 40) -> str:
        """The last lines of what its kernel and systemd printed."""
        try:
            said = (self._run / "console").read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(line.rstrip() for line in said.splitlines()[-lines:])

    def stop(self) -> None:
        """End it. May be called twice."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._processes.clear()
        self.pid = 0
        shutil.rmtree(self._run, ignore_errors=True)


def _qemu(files: disk.Files, port: int, run: Path) -> list[str]:
    # Without cx16: qemu 7.2 gets cmpxchg16b wrong, and the kernel panics.
    return [
        "qemu-system-x86_64",
        *("-accel", "tcg,thread=single", "-icount", "shift=1", "-cpu", "max,-cx16", "-m", "1024"),
        *("-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", _ARGUMENTS),
        *("-drive", f"file={files.disk},if=virtio,format=raw,snapshot={'on' if files.state else 'off'}"),
        *(("-incoming", f"exec:cat {shlex.quote(str(files.state))}") if files.state else ()),
        *("-qmp", f"unix:{run / 'qmp'},server=on,wait=off"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{run / 'console'}"),
    ]


def booted() -> disk.Files:
    """The machine as it is when it has booted, which it is done for if that is not in the cache.

    Raises:
        roots.BuildFailed, BootFailed
    """
    kept = disk.build()
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, check=True).stdout
    recipe = repr((qemu, _qemu(kept, 0, Path())))
    found = roots.cached("machine-booted", recipe, lambda directory: _boot_once(kept, directory))
    return dataclasses.replace(kept, disk=found / "disk", state=found / "state")


def _boot_once(kept: disk.Files, directory: Path) -> None:
    print(f"booting a virtual machine for {directory.parent}", flush=True)
    directory.mkdir()
    subprocess.run(["cp", "--sparse=always", str(kept.disk), str(directory / "disk")], check=True)
    with Machine(dataclasses.replace(kept, disk=directory / "disk")) as machine:
        machine.run(["sh", "-c", "systemctl is-system-running --wait; journalctl --flush; sync"])
        machine.freeze(directory / "state")


def _ask(monitor: IO[str], execute: str, arguments: dict[str, str]) -> Any:
    """A command of qemu's monitor (QMP), and what it returns."""
    monitor.write(json.dumps({"execute": execute, "arguments": arguments}) + "\n")
    monitor.flush()
    for line in monitor:  # events come in between
        answer = json.loads(line)
        if "error" in answer:
            raise BootFailed(f"qemu: {execute}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
    raise BootFailed(f"qemu ended at {execute}")


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    return entry


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        found: int = any_port.getsockname()[1]
    return found


def main() -> int:
    """Build it and boot it; where it cannot be had, say why in one line."""
    reason = needs.lacking(needs.vm.mark)
    if reason:
        print(f"skipped: {reason}")
        return 0
    try:
        booted()
    except (roots.BuildFailed, BootFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
