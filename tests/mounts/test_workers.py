# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers stand in a namespace nobody sees, come back from wherever they were, and are replaced when they do not.

These tests are also those of mounts/image_mounts.py, mounts/whereabouts.py, mounts/syscalls.py and
mounts/descriptors.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from support import CHECKOUT
from support.disks import GENERIC, Part, disk
from support.images import FORMATS
from support.killing import killed_before
from support.needs import filesystem, loop, root, tool
from support.service import Service
from watcher.images.formats.probe import probe
from watcher.images.formats.squashfs import Squashfs
from watcher.model import Copy, Kind, Later, Layer, Refused, Stack
from watcher.mounts import image_mounts, syscalls
from watcher.mounts import workers as workers_module
from watcher.mounts.process import may_mount
from watcher.mounts.swap import swap
from watcher.mounts.whereabouts import WorkerLost
from watcher.mounts.workers import PLACE, HostNamespace, Hung, MountWorkers
from watcher.watch.offload import Offload

from .conftest import Layers, Swaps, wait_until_idle

pytestmark = root

Start = Callable[..., Service]
PAD = Part(bytes(512), GENERIC, "other")


def where() -> int:
    return os.stat("/proc/thread-self/ns/mnt").st_ino


def table() -> str:
    return Path("/proc/thread-self/mountinfo").read_text()


def tids() -> set[str]:
    """All threads, without those of tests before, which may end at any moment."""
    others = {str(one.native_id) for one in threading.enumerate() if not one.name.startswith("confext-mount")}
    return set(os.listdir("/proc/self/task")) - others


def until(condition: Callable[[], bool]) -> None:
    """Wait for what nothing announces: that the kernel has taken a thread apart."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def scratches(workers: MountWorkers) -> list[str]:
    """Those that are still there."""
    points = [line.split()[4] for line in workers.submit(table).result().splitlines()]
    return [point for point in points if point.removeprefix(PLACE + "/").isdecimal()]


def both(workers: MountWorkers, function: Callable[[], object]) -> list[object]:
    """What a function gives on each of two workers, which are known to do nothing else then."""
    at_once = threading.Barrier(2)
    futures = [workers.submit(lambda: (at_once.wait(10), function())) for _ in range(2)]
    return [future.result()[1] for future in futures]


@contextlib.contextmanager
def strace(workers: MountWorkers, *injections: str) -> Iterator[None]:
    """Inject faults into the one worker."""
    tid = workers.submit(threading.get_native_id).result()
    wait_until_idle(workers)
    words = [word for injection in injections for word in ("-e", f"inject={injection}")]
    tracer = subprocess.Popen(
        ["strace", "-p", str(tid), *words, "-o", "/dev/null"], stderr=subprocess.PIPE, text=True
    )
    with tracer:
        assert tracer.stderr is not None and "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)


# ---- apart from the rest


def test_workers_share_one_namespace_that_nobody_else_is_in(workers: MountWorkers) -> None:
    inside = both(workers, where)
    assert inside[0] == inside[1] != where()
    assert PLACE not in {line.split()[4] for line in table().splitlines() if "confext-watcher" in line}


def test_what_is_mounted_there_is_seen_nowhere_else(workers: MountWorkers) -> None:
    before = table()

    def mounted() -> str:
        with workers.scratch():
            syscalls.mount("none", ".", "tmpfs", 0)
            return table()

    assert workers.submit(mounted).result().count("\n") == before.count("\n") + 3
    assert table() == before


def test_results_and_errors_come_back(workers: MountWorkers) -> None:
    assert workers.submit(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        workers.submit(divmod, 7, 0).result()
    assert workers.submit(divmod, 7, 2).result() == (3, 1)


def test_who_asks_from_inside_stays_there(workers: MountWorkers) -> None:
    def nested() -> list[int]:
        return [where(), workers.call(where), where()]

    inside = workers.submit(nested).result()
    assert inside == [workers.call(where)] * 3 != [where()] * 3


def test_at_home_a_worker_is_where_the_program_is(workers: MountWorkers) -> None:
    seen: list[int] = []
    done = threading.Event()

    def work() -> None:
        seen.extend([where(), workers.call(where), where()])
        done.set()

    workers.start(work)
    assert done.wait(10)
    home, inside, back = seen
    assert home == back == where() != inside == workers.call(where)


def test_it_ends_with_everything_in_it() -> None:
    before = tids(), len(os.listdir("/proc/self/fd"))
    with MountWorkers() as workers:
        both(workers, where)
        assert len(tids() - before[0]) == 2
    assert len(os.listdir("/proc/self/fd")) == before[1]
    until(lambda: tids() == before[0])


# ---- entering


def test_inside_it_is_the_service_and_afterwards_it_is_not(workers: MountWorkers, service: Service) -> None:
    def look() -> list[object]:
        seen: list[object] = [where()]
        with workers.entered(service.namespace):
            seen += [os.stat("/proc/thread-self/ns/mnt").st_ino, os.listdir("/etc"), os.getcwd()]
        return [*seen, where(), os.getcwd()]

    before, inside, listed, directory, after, back = workers.submit(look).result()
    assert inside == os.fstat(service.namespace).st_ino
    assert "base.conf" in str(listed)
    assert before == after != inside
    assert directory == back == "/"


def test_it_comes_back_from_an_error(workers: MountWorkers, service: Service) -> None:
    def fail() -> None:
        with workers.entered(service.namespace):
            os.stat("/nothing-there")

    before = both(workers, where)
    with pytest.raises(FileNotFoundError):
        workers.submit(fail).result()
    assert both(workers, where) == before


def test_a_thread_that_a_worker_has_started_is_not_in_its_way(
    workers: MountWorkers, service: Service
) -> None:
    """It shares root and working directory with it, and the kernel then refuses to enter."""
    stay = threading.Event()

    def look() -> int:
        threading.Thread(target=stay.wait, daemon=True).start()
        with workers.entered(service.namespace):
            return where()

    try:
        assert workers.submit(look).result() == os.fstat(service.namespace).st_ino
    finally:
        stay.set()


def test_the_mount_table_is_that_of_where_it_stands_and_tells_of_changes(
    workers: MountWorkers, service: Service
) -> None:
    def look() -> tuple[str, bool, bool, bool]:
        with workers.entered(service.namespace):
            fd = workers.open_mountinfo()
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        text = os.read(fd, 1 << 20).decode()  # the first few lines
        before = bool(poll.poll(0))
        service("tmpfs('/mnt')")
        after = bool(poll.poll(0)), bool(poll.poll(0))
        os.close(fd)
        return text, before, *after

    expected = service("read('/proc/self/mountinfo')")
    text, *changes = workers.submit(look).result()
    assert text and expected.startswith(text)
    assert changes == [False, True, False]


def test_it_does_not_enter_what_is_not_a_services(workers: MountWorkers) -> None:
    def enter() -> None:
        with open("/proc/self/ns/mnt") as file, workers.entered(file.fileno()):
            raise AssertionError("inside")

    with pytest.raises(HostNamespace):
        workers.submit(enter).result()


@pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
def test_in_a_chroot_paths_lead_where_those_of_the_program_do(tmp_path: Path) -> None:
    """A build of an image runs `check` in one."""
    program = """
import os
from watcher.mounts.workers import MountWorkers
os.chroot({root!r})
os.chdir("/")
with MountWorkers() as workers:
    seen, done = [workers.call(os.path.exists, "/mnt/mark")], []
    workers.start(lambda: done.append((os.path.exists("/mnt/mark"), os.path.exists("/sys/images"))))
    while not done:
        pass
    print(seen, done, workers.call(os.path.exists, "/sys/images"))
"""
    root = tmp_path / "root"
    root.mkdir()
    script = program.format(root=str(root))
    shell = 'mount --rbind / "$1" && mount -t tmpfs none "$1/mnt" && touch "$1/mnt/mark" && exec "$2" -c "$3"'
    words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        shell,
        "sh",
        str(root),
        sys.executable,
    ]
    done = subprocess.run([*words, script], capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert done.stdout == "[True] [(True, False)] True\n", done.stderr


def test_two_workers_swap_at_the_same_time(start: Start, swaps: Swaps, layers: Layers) -> None:
    services = [start(), start()]
    made = [layers.tree({"web.conf": version}, version=version) for version in ("1", "2")]
    workers = swaps.workers
    for _ in range(20):
        futures = [
            workers.submit(swap, workers, service.namespace, Stack((layer,)), layers.copies)
            for service, layer in zip(services, made, strict=True)
        ]
        assert all(future.result().done for future in futures)
        shown = [service.read("/etc/web.conf") for service in services]
        assert shown == [layer.version for layer in made]
        made.reverse()


# ---- lost and hanging workers


@tool("strace")
def test_a_worker_that_cannot_come_back_is_replaced(service: Service, layers: Layers) -> None:
    stack = Stack((layers.tree({"web.conf": "1"}),))
    with MountWorkers(privileged=may_mount()) as workers:
        workers.submit(where).result()
        count, descriptors = len(tids()), len(os.listdir("/proc/self/fd"))
        # To the workers' namespace; to the service, and back from the look; the same for the swap; home.
        for when in (3, 5):
            with strace(workers, f"setns:error=EPERM:when={when}"), pytest.raises(WorkerLost):
                workers.submit(swap, workers, service.namespace, stack, layers.copies).result()
            until(lambda: scratches(workers) == [])  # another removes it
            until(lambda: len(tids()) == count)
            assert len(os.listdir("/proc/self/fd")) == descriptors
        assert service.read("/etc/web.conf") == "1"
        assert workers.submit(swap, workers, service.namespace, Stack(), {}).result().done


@tool("strace")
def test_a_scratch_that_cannot_be_removed_is_later(service: Service, layers: Layers) -> None:
    stack = Stack((layers.tree({"web.conf": "1"}),))
    with MountWorkers(privileged=may_mount()) as workers:
        for call in ("umount2", "rmdir"):
            with strace(workers, f"{call}:error=EBUSY:when=1"):
                assert workers.submit(swap, workers, service.namespace, stack, layers.copies).result().done
                wait_until_idle(workers)
                workers.submit(where).result()
                wait_until_idle(workers)
            assert scratches(workers) == []
            assert workers.submit(os.listdir, PLACE).result() == ["images"]
            assert workers.submit(swap, workers, service.namespace, Stack(), {}).result().done


def test_one_that_hangs_keeps_its_thread_and_the_next_gets_another() -> None:
    free = threading.Event()
    with MountWorkers(privileged=may_mount()) as workers:
        hang = [workers.submit(free.wait) for _ in range(6)]
        assert workers.submit(divmod, 7, 2).result() == (3, 1)
        free.set()
        assert all(one.result() for one in hang)


def test_threads_that_have_nothing_to_do_leave_but_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tids()
    monkeypatch.setattr(workers_module, "_IDLE_SEC", 0.1)
    with MountWorkers(privileged=may_mount()) as workers:
        for _ in range(3):
            both(workers, where)
            until(lambda: len(tids()) == len(before) + 1)


def test_a_service_that_hangs_costs_one_worker(
    monkeypatch: pytest.MonkeyPatch, service: Service, start: Start, layers: Layers
) -> None:
    monkeypatch.setattr(workers_module, "HANGS_SEC", 0.1)
    stack = Stack((layers.tree({"web.conf": "1"}),))
    free, inside = threading.Event(), threading.Event()

    def hang() -> None:
        inside.set()
        free.wait()

    with MountWorkers(privileged=may_mount()) as workers:
        hangs = workers.submit(swap, workers, service.namespace, stack, layers.copies, hang)
        inside.wait()
        time.sleep(0.1)  # the limit itself
        with pytest.raises(Hung):
            workers.submit(swap, workers, service.namespace, stack, layers.copies).result()
        other = start()
        assert workers.submit(swap, workers, other.namespace, stack, layers.copies).result().done
        free.set()
        assert hangs.result().done
        assert workers.submit(swap, workers, service.namespace, stack, layers.copies).result().done


def test_one_that_hangs_does_not_keep_the_program_from_ending() -> None:
    before, free = tids(), threading.Event()
    workers = MountWorkers(privileged=may_mount())
    workers.submit(free.wait)
    workers.close()
    free.set()
    until(lambda: tids() == before)


async def test_a_lost_worker_does_no_other_job(
    monkeypatch: pytest.MonkeyPatch, workers: MountWorkers, service: Service
) -> None:
    """It may still be in the service's namespace: what comes next in the queue must not be done there."""
    real, seen = syscalls.setns, list[int]()

    def setns(fd: int, kind: int) -> None:
        if fd == workers._namespace.fd and where() == os.fstat(service.namespace).st_ino:
            raise PermissionError(1, "no way back")
        real(fd, kind)

    def visit() -> None:
        with workers.entered(service.namespace):
            pass

    jobs = Offload(start=workers.start)
    monkeypatch.setattr(syscalls, "setns", setns)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def lost() -> None:
                with pytest.raises(WorkerLost):
                    await jobs.run("web", workers.call, visit)

            nursery.start_soon(lost)
            for number in range(5):
                nursery.start_soon(jobs.run, f"{number}", lambda: seen.append(where()))
    assert seen == [where()] * 5


# ---- images


@pytest.fixture
def squashfs(layers: Layers) -> Layer:
    return layers.image({"web.conf": "1"}, "squashfs")


def loops(layers: Layers, layer: Layer) -> int:
    """How many loop devices there are on a layer's file, whose path is cut when its namespace has gone."""
    name = "/".join(layers.copies[layer.digest].path.split("/")[-2:])
    backing = Path("/sys/block").glob("loop*/loop/backing_file")
    found = 0
    for one in backing:
        with contextlib.suppress(OSError):  # another one's, gone just now
            found += one.read_text().strip().endswith(name)
    return found


def backed(device: Path, file: Path) -> bool:
    with contextlib.suppress(OSError):
        return (device / "backing_file").read_text().strip() == str(file)
    return False


@loop
@tool("mksquashfs")
@pytest.mark.skipif(not may_mount(), reason="needs root of the machine")
class TestImages:
    def test_an_image_is_mounted_once_for_all_its_users(self, layers: Layers, squashfs: Layer) -> None:
        copy = layers.copies[squashfs.digest]
        with MountWorkers() as workers:

            def use() -> str:
                with workers.images.attached([copy]) as roots:
                    return Path(roots[copy.digest], "etc/web.conf").read_text()

            assert both(workers, use) == both(workers, use) == ["1", "1"]
            assert loops(layers, squashfs) == 1
            workers.submit(workers.images.retain, [copy.digest]).result()
            assert loops(layers, squashfs) == 1
            workers.submit(workers.images.retain, []).result()
            until(lambda: loops(layers, squashfs) == 0)
            assert workers.submit(use).result() == "1"
            assert loops(layers, squashfs) == 1

    def test_one_that_cannot_be_mounted_yet_keeps_no_other_waiting(
        self, layers: Layers, squashfs: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its file is on a dead network file system, say."""
        os.mkfifo(tmp_path / "blocks")
        hangs = Copy("f" * 64, str(tmp_path / "blocks"), 0, Kind.IMAGE, FORMATS["squashfs"])
        copy = layers.copies[squashfs.digest]
        with MountWorkers() as workers:

            def use(copy: Copy) -> str:
                with workers.images.attached([copy]) as roots:
                    return Path(roots[copy.digest], "etc/web.conf").read_text()

            blocked = workers.submit(use, hangs)
            until(blocked.running)
            with monkeypatch.context() as patch, pytest.raises(Later, match="a mount of it does not end"):
                patch.setattr(image_mounts, "_HANGS_SEC", 0.1)  # one thread that waits for it is enough
                workers.submit(use, hangs).result(timeout=30)
            assert workers.submit(use, copy).result(timeout=30) == "1"
            workers.submit(workers.images.retain, []).result(timeout=30)
            until(lambda: loops(layers, squashfs) == 0)
            assert not blocked.done()
            (tmp_path / "blocks").write_text("")
            with pytest.raises(Later):  # a FIFO cannot be mounted
                blocked.result()
            assert workers.submit(use, copy).result() == "1"

    def test_one_in_use_is_not_unmounted(self, layers: Layers, squashfs: Layer) -> None:
        copy = layers.copies[squashfs.digest]
        with MountWorkers() as workers:

            def use() -> str:
                with workers.images.attached([copy]) as roots:
                    workers.images.retain([])
                    return Path(roots[copy.digest], "etc/web.conf").read_text()

            assert workers.submit(use).result() == "1"

    def test_a_copy_made_anew_leaves_no_moment_without_one(self, layers: Layers, squashfs: Layer) -> None:
        """Who reads the mounted image, or makes a stack of it, must never take the empty mount point for it."""
        copy = layers.copies[squashfs.digest]
        seen = []

        class Slow(Squashfs):
            def fsmount(self, backing: int, label: str) -> int:
                seen.append(os.listdir(f"{PLACE}/images/{copy.digest}"))
                return super().fsmount(backing, label)

        with MountWorkers() as workers:

            def use() -> str:
                with workers.images.attached([copy]) as roots:
                    shutil.copyfile(copy.path, f"{copy.path}.new")
                    os.rename(f"{copy.path}.new", copy.path)
                    with workers.images.attached([replace(copy, format=Slow())]):
                        return Path(roots[copy.digest], "etc/web.conf").read_text()

            assert workers.submit(use).result() == "1"
            assert seen == [["etc"]]
            # Nothing is mounted from the first one for longer than it has users.
            workers.submit(workers.images.retain, [copy.digest]).result()
            until(lambda: loops(layers, squashfs) == 0)
            assert "images/" not in workers.submit(table).result()
            assert workers.submit(use).result() == "1"

    def test_a_service_keeps_its_stack_when_the_workers_have_gone(
        self, service: Service, layers: Layers, squashfs: Layer
    ) -> None:
        with MountWorkers() as workers:
            workers.submit(swap, workers, service.namespace, Stack((squashfs,)), layers.copies).result()
        assert service.read("/etc/web.conf") == "1"
        assert loops(layers, squashfs) == 1

    @filesystem("erofs")
    @tool("mkfs.erofs")
    def test_erofs_needs_no_loop_device_where_the_kernel_can_do_without(self, layers: Layers) -> None:
        layer = layers.image({"web.conf": "1"}, "erofs")
        with MountWorkers() as workers:

            def use() -> str:
                with workers.images.attached([layers.copies[layer.digest]]) as roots:
                    return Path(roots[layer.digest], "etc/web.conf").read_text()

            assert workers.submit(use).result() == "1"
            path = layers.copies[layer.digest].path
            kind = subprocess.check_output(["stat", "-f", "-c", "%T", path], text=True).strip()
            release = tuple(map(int, os.uname().release.split(".")[:2]))
            assert loops(layers, layer) == (1 if release < (6, 12) or kind == "tmpfs" else 0)

    @pytest.mark.parametrize(
        "fstype", ["squashfs", pytest.param("erofs", marks=[filesystem("erofs"), tool("mkfs.erofs")])]
    )
    @pytest.mark.parametrize("sector", [512, 4096])
    def test_of_a_disk_image_the_root_partition_is_mounted_and_nothing_behind_it(
        self, layers: Layers, fstype: str, sector: int
    ) -> None:
        layer = layers.image({"web.conf": "1"}, fstype)
        plain = Path(layers.copies[layer.digest].path)
        plain.write_bytes(disk(PAD, plain.read_bytes(), PAD, sector=sector))
        with plain.open("rb") as file:
            found = probe(file.fileno(), plain.stat().st_size)
        assert (found.offset > 4096, found.size >= 4096) == (True, True)
        layers.copies[layer.digest] = replace(layers.copies[layer.digest], format=found)
        with MountWorkers() as workers:

            def use() -> str:
                with workers.images.attached([layers.copies[layer.digest]]) as roots:
                    return Path(roots[layer.digest], "etc/web.conf").read_text()

            assert workers.submit(use).result() == "1"
            kind = subprocess.check_output(["stat", "-f", "-c", "%T", plain], text=True).strip()
            release = tuple(map(int, os.uname().release.split(".")[:2]))
            without = fstype == "erofs" and release >= (6, 17) and kind != "tmpfs"
            assert loops(layers, layer) == (0 if without else 1)
            if not without:
                (device,) = [one for one in Path("/sys/block").glob("loop*/loop") if backed(one, plain)]
                assert int((device / "offset").read_text()) == found.offset
                assert int((device / "sizelimit").read_text()) == found.size
                assert (device / "autoclear").read_text().strip() == "1"
            workers.submit(workers.images.retain, []).result()
            until(lambda: loops(layers, layer) == 0)

    def test_killed_at_any_call_it_leaves_no_loop_device(self, layers: Layers, squashfs: Layer) -> None:
        path = Path(layers.copies[squashfs.digest].path)
        path.write_bytes(disk(path.read_bytes()))
        with path.open("rb") as file:
            found = probe(file.fileno(), path.stat().st_size)

            def mount() -> None:
                mounted = found.fsmount(file.fileno(), "killed")
                os.mkdir(f"{path}.{time.monotonic_ns()}")  # a call that changes something, with all mounted
                os.close(mounted)

            calls = 1
            while killed_before(calls, mount):
                until(lambda: loops(layers, squashfs) == 0)
                calls += 1
        assert calls > 5
        until(lambda: loops(layers, squashfs) == 0)

    @pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=filesystem("erofs"))])
    def test_a_broken_image_is_refused_and_leaves_nothing(
        self, layers: Layers, squashfs: Layer, tmp_path: Path, fstype: str
    ) -> None:
        broken = tmp_path / "broken.raw"
        broken.write_bytes(os.urandom(1 << 16))
        copy = layers.copies[squashfs.digest]
        bad = type(copy)("b" * 64, str(broken), 1 << 16, Kind.IMAGE, FORMATS[fstype])
        with MountWorkers() as workers:

            def use() -> None:
                with workers.images.attached([copy, bad]):
                    raise AssertionError("mounted")

            for _ in range(3):
                with pytest.raises(Refused, match=f"the kernel cannot mount it as {fstype}: [^\n]+$"):
                    workers.submit(use).result()
            workers.submit(workers.images.retain, []).result()
            assert "images/" not in workers.submit(table).result()


def test_one_worker_at_a_time_changes_a_namespace(
    workers: MountWorkers, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round swaps a stack, and meanwhile another worker mounts it anew: neither sees half of the other's work."""
    inside, most, stay = [0], [0], threading.Event()

    def attend(hold: threading.Event | None = None) -> None:
        with workers.attending(service.namespace):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            if hold is not None:
                hold.wait(30)
            time.sleep(0.001)
            inside[0] -= 1

    for job in [workers.submit(attend) for _ in range(20)]:
        job.result()
    assert most == [1]
    first = workers.submit(attend, stay)
    while not inside[0]:
        time.sleep(0.001)
    with monkeypatch.context() as patch, pytest.raises(Hung):
        patch.setattr(workers_module, "HANGS_SEC", 0.01)
        workers.submit(attend).result()
    stay.set()
    first.result()
    workers.submit(attend).result()
