# SPDX-License-Identifier: LGPL-2.1-or-later
"""The beds themselves: real systemd comes up, the program is there, and all of it goes away again."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beds.bed import Bed, LeftBehind, cgroup2, sweep
from beds.roots import cache_directory


def test_everything_that_systemd_started_is_up(bed: Bed) -> None:
    assert bed.property("", "SystemState") == "running", bed.run(
        ["systemctl", "--failed", "--no-legend"]
    ).stdout
    assert bed.run(["cat", "/proc/1/comm"]).stdout == "systemd\n"


def test_the_versions_are_those_that_matter(bed262: Bed, bed257: Bed, bed254: Bed) -> None:
    def version(bed: Bed) -> int:
        return int(bed.run(["systemctl", "--version"]).stdout.split()[1])

    assert version(bed262) >= 262  # Debian's testing moves on
    assert version(bed257) == 257
    assert version(bed254) == 254


def test_the_program_imports_with_the_distributions_own_modules(bed: Bed) -> None:
    script = "import sys; sys.path.insert(0, '/usr/lib/confext-watcher')\n"
    script += "import inotify_simple, jeepney, psutil, rich, structlog, trio, varlink, watcher.model\n"
    script += "print(*{m.__file__.split('/')[3] for m in (jeepney, psutil, rich, structlog, trio, varlink)})"
    assert bed.run(["python3", "-I", "-W", "error", "-c", script]).stdout == "python3\n"


def test_where_the_distributions_modules_are_too_old_the_program_brings_its_own(bed254: Bed) -> None:
    script = "import sys; sys.path.insert(0, '/usr/lib/confext-watcher')\n"
    script += "import inotify_simple, jeepney, psutil, rich, structlog, trio, varlink, watcher.model"
    bed254.run(["python3", "-I", "-c", script])


def test_a_service_gets_a_stack_of_its_own(bed: Bed) -> None:
    tree = bed.path("/srv/web")
    (tree / "etc/extension-release.d").mkdir(parents=True)
    (tree / "etc/extension-release.d/extension-release.web").write_text("ID=_any\n")
    (tree / "etc/web.conf").write_text("from the extension\n")
    bed.run(["mksquashfs", "/srv/web", "/srv/web.raw", "-quiet", "-no-progress"])
    run = ["systemd-run", "--wait", "--pipe", "--quiet", "--property=ExtensionImages=/srv/web.raw"]
    assert bed.run([*run, "cat", "/etc/web.conf"]).stdout == "from the extension\n"
    assert not bed.path("/etc/web.conf").exists()


def test_two_beds_talk_over_a_cable(bed262: Bed, bed257: Bed) -> None:
    bed262.run(["systemctl", "start", "nginx"])
    address, _ = bed262.connect(bed257, subnet=2)  # other tests use 1, and the cable stays
    assert "nginx" in bed257.run(["curl", "--silent", "--show-error", f"http://{address}/"]).stdout
    bed262.run(["systemctl", "stop", "nginx"])


def test_nothing_of_a_stopped_bed_is_left(new_bed: Callable[[str], Bed]) -> None:
    bed = new_bed("257")
    sleeper = bed.popen(["sleep", "infinity"])
    systemd = bed.pid
    bed.stop()
    assert sleeper.wait() != 0
    assert not Path(f"/proc/{systemd}").exists()
    assert not (cgroup2() / f"confext-{bed.name}").exists()
    assert not (cache_directory() / "run" / bed.name).exists()


def test_a_loop_device_that_outlives_its_bed_is_told_and_detached(new_bed: Callable[[str], Bed]) -> None:
    bed = new_bed("257")
    image = f"/var/{bed.name}"
    bed.run(["truncate", "--size=1M", image])
    device = bed.run(["losetup", "--find", "--show", image]).stdout.strip()
    with pytest.raises(LeftBehind, match=device):
        bed.stop()
    # The device may be another's by now.
    backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
    assert not backing.exists() or backing.read_text().strip() != image


def test_a_bed_dies_with_the_process_that_booted_it() -> None:
    script = "from beds.bed import Bed; bed = Bed('257'); bed.boot(); print(bed.pid, bed.name, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout
        pid, name = owner.stdout.readline().split()
        systemd = os.pidfd_open(int(pid))
        owner.kill()
    select.select([systemd], [], [])
    os.close(systemd)
    sweep()
    assert not (cgroup2() / f"confext-{name}").exists()
    assert not (cache_directory() / "run" / name).exists()
