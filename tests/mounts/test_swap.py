# SPDX-License-Identifier: LGPL-2.1-or-later
"""The swap, on real processes in mount namespaces with the mounts that sandboxes have below `/etc`.

All of it once more in a user namespace (the last test), where the kernel allows less and locks mounts together. These
tests are also those of mounts/survey.py, mounts/etc.py, mounts/sandbox.py and mounts/compare.py.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.needs import filesystem, loop, root, tool, userns
from support.service import Service
from watcher.model import Refused, Stack
from watcher.mounts import syscalls
from watcher.mounts.compare import shows
from watcher.mounts.etc import Moved
from watcher.mounts.process import may_mount
from watcher.mounts.swap import build, swap
from watcher.mounts.table import LAYERS_MAX, SOURCE
from watcher.mounts.workers import HostNamespace, MountWorkers

from .conftest import Layers, Swaps, wait_until_idle

pytestmark = root

Start = Callable[..., Service]

RDONLY, NOSUID, NODEV, NOEXEC = (
    syscalls.MOUNT_ATTR_RDONLY,
    syscalls.MOUNT_ATTR_NOSUID,
    syscalls.MOUNT_ATTR_NODEV,
    syscalls.MOUNT_ATTR_NOEXEC,
)

not_in_user_namespace = pytest.mark.skipif(not may_mount(), reason="needs root of the machine")


def one_and_two(layers: Layers) -> tuple[object, object]:
    return layers.tree({"web.conf": "1", "app/a.conf": "1"}), layers.tree(
        {"web.conf": "2", "app/a.conf": "2"}
    )


def overlays(service: Service) -> list[str]:
    return [row for row in service("rows()") if row.startswith("/etc ")]


# ---- stacks


def test_the_first_stack_lies_over_the_base(service: Service, swaps: Swaps, layers: Layers) -> None:
    layer = layers.tree({"web.conf": "1", "app/a.conf": "1"}, name="web", version="1.4")
    swapped = swaps(service, layer)
    assert swapped.done
    assert not swapped.before.overlay
    assert service.read("/etc/web.conf") == service.read("/etc/app/a.conf") == "1"
    assert service.read("/etc/base.conf") == service.read("/etc/app/sub/deep.conf") == "base"


def test_the_mount_table_says_which_stack_it_is(service: Service, swaps: Swaps, layers: Layers) -> None:
    names = [("web", "1.4"), ("with_underscore", "1_2"), ("comma,blank \\ \udcff\n", ""), ("n" * 300, "3")]
    made = [layers.tree({}, name=name[:20], version=version) for name, version in names]
    stack = [
        type(layer)(layer.slot, name, version, layer.digest, layer.kind, layer.source)
        for layer, (name, version) in zip(made, names, strict=True)
    ]
    swaps(service, *stack)
    mounted = service.mounted
    assert mounted.stack == Stack(tuple(stack)).id
    assert [(one.name, one.version) for one in mounted.layers or ()][:3] == names[:3]
    assert [one.digest for one in mounted.layers or ()] == [layer.digest for layer in stack]


def test_a_new_stack_takes_the_place_of_the_old_one(service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    for number in range(20):
        before = service.mounted
        swapped = swaps(service, two if number % 2 else one)
        assert swapped.before == before
        assert service.read("/etc/web.conf") == service.read("/etc/app/a.conf") == str(number % 2 + 1)
        assert len(overlays(service)) == 1


def test_the_upper_layer_wins(service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    only_one = layers.tree({"only.conf": "3"})
    swaps(service, one, only_one, two)
    assert (service.read("/etc/web.conf"), service.read("/etc/only.conf")) == ("2", "3")
    swaps(service, two, only_one, one)
    assert (service.read("/etc/web.conf"), service.read("/etc/only.conf")) == ("1", "3")


def test_without_a_stack_it_is_the_original_again(service: Service, swaps: Swaps, layers: Layers) -> None:
    before = service("rows()"), service("sorted(os.listdir('/etc'))")
    swaps(service, layers.tree({"web.conf": "1"}))
    assert (service("rows()"), service("sorted(os.listdir('/etc'))")) != before
    assert swaps(service).done
    assert (service("rows()"), service("sorted(os.listdir('/etc'))")) == before


def test_no_stack_on_no_stack_does_nothing(service: Service, swaps: Swaps) -> None:
    before = service("read('/proc/self/mountinfo')")
    assert not swaps(service).done
    assert service("read('/proc/self/mountinfo')") == before


@loop
@not_in_user_namespace
@tool("mksquashfs")
@tool("mkfs.erofs")
@pytest.mark.parametrize("fstype", ["squashfs", pytest.param("erofs", marks=filesystem("erofs"))])
def test_layers_can_be_images(service: Service, swaps: Swaps, layers: Layers, fstype: str) -> None:
    swaps(service, layers.image({"web.conf": "1"}, fstype), layers.tree({"tree.conf": "2"}))
    assert (service.read("/etc/web.conf"), service.read("/etc/tree.conf")) == ("1", "2")
    swaps(service)


def test_as_many_layers_as_overlayfs_takes(service: Service, swaps: Swaps, layers: Layers) -> None:
    made = [layers.tree({f"{number}.conf": str(number)}) for number in range(LAYERS_MAX + 1)]
    swaps(service, *made[:-1])
    assert service.read("/etc/0.conf") == "0"
    assert service.read(f"/etc/{LAYERS_MAX - 1}.conf") == str(LAYERS_MAX - 1)
    assert len(service.mounted.layers or ()) == LAYERS_MAX
    with pytest.raises(
        Refused, match=f"a stack of {LAYERS_MAX + 1} layers is more than overlayfs takes: [^\n]*$"
    ):
        swaps(service, *made)
    assert len(service.mounted.layers or ()) == LAYERS_MAX


def test_the_same_content_twice_leaves_the_old_stack(service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    with pytest.raises(OSError):
        swaps(service, two, two)
    assert service.read("/etc/web.conf") == "1"


def test_a_swap_to_the_same_stack_shows_what_the_host_has_edited(
    service: Service, swaps: Swaps, layers: Layers, tmp_path: Path
) -> None:
    layer = layers.tree({"web.conf": "1"})
    swaps(service, layer)
    with pytest.raises(FileNotFoundError):
        service.read("/etc/new.conf")
    (tmp_path / "root-0/etc/new.conf").write_text("new")
    (tmp_path / "edited").write_text("edited")
    (tmp_path / "edited").rename(tmp_path / "root-0/etc/base.conf")
    swaps(service, layer)
    assert (service.read("/etc/new.conf"), service.read("/etc/base.conf")) == ("new", "edited")


@pytest.mark.parametrize(
    "fstype", ["", pytest.param("squashfs", marks=[loop, not_in_user_namespace, tool("mksquashfs")])]
)
def test_a_layer_whose_etc_is_a_link_does_not_show_what_that_leads_to(
    service: Service, swaps: Swaps, layers: Layers, tmp_path: Path, fstype: str
) -> None:
    (tmp_path / "of-the-host").mkdir()
    with pytest.raises(Refused, match=r"^web 1: etc in it is no directory$"):
        swaps(service, layers.linked(tmp_path / "of-the-host", fstype))
    assert not service.mounted.overlay


@pytest.mark.parametrize(
    "fstype",
    [
        "",
        pytest.param("squashfs", marks=[loop, not_in_user_namespace, tool("mksquashfs")]),
        pytest.param("erofs", marks=[loop, not_in_user_namespace, tool("mkfs.erofs"), filesystem("erofs")]),
    ],
)
def test_a_layer_cannot_show_another_directory_of_the_base(
    service: Service, swaps: Swaps, layers: Layers, fstype: str
) -> None:
    """trusted.overlay.redirect: what a sandbox mount hides would be there at another path."""
    service("(write('/none', ''), bind('/none', '/etc/app/private'))")
    swaps(service, layers.redirected("shown", "/app", fstype))
    assert service.read("/etc/app/private") == ""
    with pytest.raises(PermissionError):
        service("os.listdir('/etc/shown')")


# ---- what /etc itself is


def test_etc_is_like_that_of_the_topmost_layer(
    service: Service, swaps: Swaps, layers: Layers, tmp_path: Path
) -> None:
    """As systemd mounts it at a start; without layers it is the base's again."""
    os.chmod(tmp_path / "root-0/etc", 0o2751)
    lower, upper = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "1"})
    for layer, mode in ((lower, 0o1777), (upper, 0o1500)):
        os.chmod(f"{layers.copies[layer.digest].path}/etc", mode)
    before = os.umask(0o077)
    try:
        swaps(service, lower, upper)
        assert service("mode('/etc')") == 0o1500
        for stack, same in ((Stack((lower, upper)), True), (Stack((upper, lower)), False)):
            known = swaps.workers, service.namespace, stack, layers.copies
            assert swaps.workers.submit(shows, *known).result() is same
        swaps(service)
    finally:
        os.umask(before)
    assert service("mode('/etc')") == 0o2751


def test_what_the_base_could_execute_can_be_executed_with_a_stack(
    service: Service, swaps: Swaps, layers: Layers, tmp_path: Path
) -> None:
    script = tmp_path / "root-0/etc/hook"
    script.write_text("#!/bin/sh\necho done\n")
    script.chmod(0o755)
    swaps(service, layers.tree({"web.conf": "1"}))
    assert service("subprocess.check_output(['/etc/hook'], text=True)") == "done\n"
    assert {"ro", "nosuid", "nodev"} <= set(service("options('/etc')"))


def test_flags_are_carried_over(service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    service(
        f"flag('/etc', {RDONLY | NOSUID | NOEXEC | syscalls.MOUNT_ATTR_NOATIME}, {NODEV | syscalls.MOUNT_ATTR_ATIME})"
    )
    before = service("options('/etc')")
    assert set(before) == {"ro", "nosuid", "noexec", "noatime"}
    swaps(service, two)
    assert service("options('/etc')") == before


@pytest.mark.parametrize("kind", ["a symbolic link", "no directory", "nothing"])
def test_an_etc_that_is_no_directory_is_refused(
    service: Service, swaps: Swaps, layers: Layers, kind: str
) -> None:
    service("os.rename('/etc', '/usr-etc')")
    if kind == "a symbolic link":
        service("os.symlink('usr-etc', '/etc')")
    elif kind == "no directory":
        service("write('/etc', 'a file')")
    before = service("read('/proc/self/mountinfo')")
    with pytest.raises(Refused) as refused:
        swaps(service, layers.tree({"web.conf": "1"}))
    assert "/etc" in str(refused.value) and "directory" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert service("read('/proc/self/mountinfo')") == before


# ---- sandbox mounts: each is set up, then stacks come and go

ODD = ("a b", "tab\t", "new\nline", "car\rriage", "back\\slash", "com,ma", "#", "\udcff", "\u2028")

SANDBOXES = {
    "InaccessiblePaths= of a file": (
        "(write('/run-hidden', ''), os.chmod('/run-hidden', 0), bind('/run-hidden', '/etc/secret'))",
        "(mode('/etc/secret'), os.stat('/etc/secret').st_size)",
    ),
    "InaccessiblePaths= of a directory": (
        "(os.mkdir('/run-hidden', 0), bind('/run-hidden', '/etc/app'))",
        "(mode('/etc/app'), os.listdir('/etc/app'))",
    ),
    "TemporaryFileSystem=": (
        "(tmpfs('/etc/app'), write('/etc/app/mine', 'mine'))",
        "(read('/etc/app/mine'), write('/etc/app/again', 'x'), sorted(os.listdir('/etc/app')))",
    ),
    "BindReadOnlyPaths= of another directory": (
        f"(os.mkdir('/other'), write('/other/o.conf', 'other'), bind('/other', '/etc/empty', {RDONLY | NOEXEC}))",
        "(read('/etc/empty/o.conf'), [one for one in options('/etc/empty') if one in ('ro', 'noexec')])",
    ),
    "BindPaths= of a file": (
        "(write('/other', 'other'), bind('/other', '/etc/app/a.conf'))",
        "(read('/etc/app/a.conf'), write('/etc/app/a.conf', 'other'))",
    ),
    "mounts on mounts": (
        "(tmpfs('/etc/app'), os.mkdir('/etc/app/sub'), tmpfs('/etc/app/sub'), write('/etc/app/sub/deep', 'deep'),"
        " write('/other', 'other'), bind('/other', '/etc/app/sub/deep'))",
        "(read('/etc/app/sub/deep'), os.listdir('/etc/app'))",
    ),
    "one over another at the same place": (
        "(tmpfs('/etc/app'), write('/etc/app/lower', ''), tmpfs('/etc/app'), write('/etc/app/upper', ''))",
        "os.listdir('/etc/app')",
    ),
    "one hidden beneath another": (
        "(write('/other', 'other'), bind('/other', '/etc/app/private'), tmpfs('/etc/app'))",
        "os.listdir('/etc/app')",
    ),
    "ten": (
        "[(os.makedirs(f'/etc/empty/{n}', exist_ok=True), tmpfs(f'/etc/empty/{n}'),"
        " write(f'/etc/empty/{n}/f', str(n))) for n in range(10)]",
        "[read(f'/etc/empty/{n}/f') for n in range(10)]",
    ),
    "odd names": (
        f"[(os.makedirs('/etc/' + name, exist_ok=True), tmpfs('/etc/' + name), write(f'/etc/{{name}}/f', name[0]))"
        f" for name in {ODD!r}]",
        f"[read(f'/etc/{{name}}/f') for name in {ODD!r}]",
    ),
}


@pytest.mark.parametrize("made_on_the_stack", [False, True], ids=["before a stack", "on a stack"])
@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_sandbox_mounts_survive_every_swap(
    service: Service, swaps: Swaps, layers: Layers, sandbox: str, made_on_the_stack: bool
) -> None:
    setup, look = SANDBOXES[sandbox]
    one = layers.tree({"web.conf": "1", "secret": "from the stack", "app/private": "from the stack"})
    two = layers.tree({"web.conf": "2", "app/a.conf": "from the stack", "app/sub/deep": "from the stack"})
    if made_on_the_stack:
        swaps(
            service, layers.tree({f"{name}/place": "" for name in (*ODD, *(f"empty/{n}" for n in range(10)))})
        )
    service(setup)
    before = service(look)
    piled_up: list[int] = []
    for stack in ([one], [two], [one, two], [two, one], [], [two], [], [one], [two]):
        swaps(service, *stack)
        assert service(look) == before, f"after a swap to {len(stack)} layers"
        piled_up.append(len(service("rows()")))
    assert piled_up[-1] == piled_up[0]
    assert service.read("/etc/web.conf") == "2"


def test_where_there_is_only_the_sandbox_on_the_stack_an_empty_stack_carries_it(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    service("tmpfs('/etc/app')")
    assert swaps(service).done
    with pytest.raises(FileNotFoundError):
        service.read("/etc/web.conf")
    assert service.read("/etc/base.conf") == "base"
    assert service.mounted.overlay and service.mounted.stack == ""
    rows = len(service("rows()"))
    swaps(service, two)
    assert service("os.listdir('/etc/app')") == []
    swaps(service)
    assert len(service("rows()")) == rows


def test_a_place_that_a_stack_has_not_is_there_when_it_comes_back(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    with_place = layers.tree({"own/file": "shown", "own/hidden": "to be hidden"})
    swaps(service, with_place)
    service("(write('/other', 'other'), bind('/other', '/etc/own/hidden'))")
    swaps(service, layers.tree({"web.conf": "1"}))
    assert service.read("/etc/own/hidden") == "other"
    swaps(service, with_place)
    assert (service.read("/etc/own/hidden"), service.read("/etc/own/file")) == ("other", "shown")


def test_a_directory_above_a_sandbox_mount_looks_as_it_does_without(
    service: Service, swaps: Swaps, layers: Layers, tmp_path: Path
) -> None:
    os.chmod(tmp_path / "root-0/etc/app", 0o1711)
    os.setxattr(tmp_path / "root-0/etc/app", "user.note", b"kept")
    service("(write('/other', ''), bind('/other', '/etc/app/private'))")
    swaps(service, layers.tree({"web.conf": "1"}))
    assert service("mode('/etc/app')") == 0o1711
    assert sorted(service("os.listdir('/etc/app')")) == ["a.conf", "private", "sub"]
    assert service("os.getxattr('/etc/app', 'user.note').decode()") == "kept"


# ---- bind mounts of the base and of the stack itself


@pytest.mark.parametrize("peers", [False, True], ids=["as systemd does it", "by hand"])
def test_a_read_only_etc_is_not_lifted_off(
    service: Service, swaps: Swaps, layers: Layers, peers: bool
) -> None:
    """ProtectSystem=full: a bind mount of /etc on itself, here with a sandbox mount on it.

    Made by hand it is a peer of the root, and what is mounted on one appears on the other too.
    """
    service("write('/other', 'other')")
    binds = "bind('/etc', '/etc'), bind('/other', '/etc/secret')"
    service(f"({binds})" if peers else "set_up(('/etc', '/etc'), ('/other', '/etc/secret'))")
    service(f"flag('/etc', {RDONLY})")
    before = service("rows()")
    one, two = one_and_two(layers)
    for layer in (one, two):
        swaps(service, layer)
        assert (service.read("/etc/secret"), service.read("/etc/base.conf")) == ("other", "base")
        assert len(overlays(service)) == 2 + peers
    swaps(service)
    assert service("rows()") == before


def test_a_bind_mount_of_the_stack_shows_the_new_stack(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    """ReadWritePaths= and ReadOnlyPaths= with a stack."""
    one, two = one_and_two(layers)
    swaps(service, one)
    service(f"bind('/etc/app', '/etc/app', {RDONLY | NOEXEC})")
    service("bind('/etc/web.conf', '/etc/web.conf')")
    before = service("options('/etc/app')")
    for layer, content in ((two, "2"), (one, "1"), (two, "2")):
        swaps(service, layer)
        assert service.read("/etc/app/a.conf") == service.read("/etc/web.conf") == content
        assert service("options('/etc/app')") == before
    rows = len(service("rows()"))
    swaps(service, one)
    assert len(service("rows()")) == rows


def test_what_a_new_stack_has_not_is_an_empty_place_in_such_a_bind_mount(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    swaps(service, layers.tree({"own/file": "1"}))
    service("bind('/etc/own', '/etc/own')")
    swaps(service, layers.tree({"web.conf": "2"}))
    assert service("os.listdir('/etc/own')") == []
    swaps(service, layers.tree({"own/file": "3"}))
    assert service.read("/etc/own/file") == "3"


def test_what_is_mounted_on_such_a_bind_mount_stays_too(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    """InaccessiblePaths= below ReadWritePaths=."""
    one, two = one_and_two(layers)
    swaps(service, one)
    service("(bind('/etc/app', '/etc/app'), write('/other', 'other'), bind('/other', '/etc/app/private'))")
    service("(tmpfs('/etc/app/sub'), write('/etc/app/sub/mine', 'mine'))")
    for layer, content in ((two, "2"), (one, "1"), (two, "2")):
        swaps(service, layer)
        assert service.read("/etc/app/a.conf") == content
        assert service.read("/etc/app/private") == "other"
        assert service("os.listdir('/etc/app/sub')") == ["mine"]


def test_a_bind_mount_of_the_stack_on_a_sandbox_mount_shows_the_new_stack(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    service("(os.mkdir('/kept'), bind('/etc/app', '/kept'), tmpfs('/etc/empty'), os.mkdir('/etc/empty/app'))")
    service("(bind('/kept', '/etc/empty/app'), write('/etc/empty/mine', 'mine'))")
    swaps(service, two)
    assert service.read("/etc/empty/app/a.conf") == "2"
    assert service.read("/etc/empty/mine") == "mine"


def test_a_bind_mount_of_the_base_gives_way_to_what_the_stack_brings(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    """ReadWritePaths= without a stack yet; said in one line."""
    service("(bind('/etc/app', '/etc/app'), bind('/etc/empty', '/etc/empty'))")
    before = service("rows()")
    swapped = swaps(service, layers.tree({"app/a.conf": "1"}))
    assert service.read("/etc/app/a.conf") == "1"
    assert [remark.partition(":")[0] for remark in swapped.remarks] == ["/etc/app"]
    assert service("write('/etc/empty/mine', 'x')"), "nothing came for that one: it is as writable as before"
    swaps(service, layers.tree({"app/a.conf": "2"}))
    assert service.read("/etc/app/a.conf") == "2"
    swaps(service)
    assert service("rows()") == before
    assert service.read("/etc/app/a.conf") == "base"


# ---- other overlays


def test_an_overlay_of_the_host_is_the_base_and_stays(service: Service, swaps: Swaps, layers: Layers) -> None:
    service("(os.makedirs('/host/etc'), write('/host/etc/host.conf', 'host'))")
    service("overlay('confext', '/host/etc', '/etc')")
    before = service("rows()")
    one, two = one_and_two(layers)
    for layer, content in ((one, "1"), (two, "2")):
        swaps(service, layer)
        assert service.read("/etc/host.conf") == "host"
        assert (service.read("/etc/web.conf"), service.read("/etc/base.conf")) == (content, "base")
        assert len(overlays(service)) == 2
    swaps(service)
    assert service("rows()") == before


def test_what_the_host_merges_and_unmerges_is_there_after_the_next_swap(
    start: Start, swaps: Swaps, layers: Layers
) -> None:
    """It arrives beneath our stack, where nobody sees it."""
    host = start()
    service = start("slave", inside=host)
    one, two = one_and_two(layers)
    service("tmpfs('/etc/empty')")
    swaps(service, one)
    host(
        "(os.makedirs('/host/etc'), write('/host/etc/host.conf', 'host'), overlay('confext', '/host/etc', '/etc'))"
    )
    with pytest.raises(FileNotFoundError):
        service.read("/etc/host.conf")
    assert service.mounted.stack == Stack((one,)).id and not service.mounted.doubled
    swaps(service, two)
    assert (service.read("/etc/host.conf"), service.read("/etc/web.conf")) == ("host", "2")
    assert len(overlays(service)) == 2
    assert len(overlays(host)) == 1
    host("syscalls.umount2('/etc', 2)")
    swaps(service, one)
    with pytest.raises(FileNotFoundError):
        service.read("/etc/host.conf")
    assert len(overlays(service)) == 1


def test_a_stack_of_systemd_is_replaced(service: Service, swaps: Swaps, layers: Layers) -> None:
    service(
        "(os.makedirs('/old/etc'), write('/old/etc/web.conf', 'old'), os.mkdir('/base'), bind('/etc', '/base'))"
    )
    service(f"overlay({SOURCE!r}, '/old/etc', '/base')")
    assert service.mounted.overlay and service.mounted.stack is None
    swapped = swaps(service, layers.tree({"web.conf": "1"}))
    assert swapped.before.layers is None
    assert (service.read("/etc/web.conf"), service.read("/etc/base.conf")) == ("1", "base")
    assert len(overlays(service)) == 1


def test_one_that_shows_the_same_is_known_as_such(
    workers: MountWorkers, service: Service, layers: Layers, tmp_path: Path
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    service("(os.mkdir('/base'), bind('/etc', '/base'))")
    service(f"overlay({SOURCE!r}, {layers.copies[one.digest].path + '/etc'!r}, '/base')")
    for stack, same in ((Stack((one,)), True), (Stack((two,)), False), (Stack(), False)):
        assert workers.submit(shows, workers, service.namespace, stack, layers.copies).result() is same


def test_one_that_is_nested_deeper_than_any_etc_is_something_else(
    workers: MountWorkers, service: Service, layers: Layers, tmp_path: Path
) -> None:
    deep = "os.chdir('/base'), [(os.mkdir('d'), os.chdir('d')) for _ in range(1100)], os.chdir('/')"
    layer = layers.tree({"web.conf": "1"})
    service(f"(os.mkdir('/base'), bind('/etc', '/base'), {deep})")
    try:
        service(f"overlay({SOURCE!r}, {layers.copies[layer.digest].path + '/etc'!r}, '/base')")
        job = workers.submit(shows, workers, service.namespace, Stack((layer,)), layers.copies)
        assert job.result() is False
    finally:
        subprocess.run(["rm", "-r", tmp_path / "root-0/etc/d"], check=True)


def test_where_systemd_mounted_both_stack_and_sandbox_holders_of_old_directories_see_no_more_than_before(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    """Its stack has no cover: lifting it off would show them the file below."""
    service(
        "(os.makedirs('/old/etc'), write('/old/etc/web.conf', 'old'), os.mkdir('/base'), bind('/etc', '/base'))"
    )
    service(f"overlay({SOURCE!r}, '/old/etc', '/base')")
    service("(write('/other', 'other'), bind('/other', '/etc/secret'))")
    held = service("os.open('/etc', os.O_PATH)")
    one, two = one_and_two(layers)
    for layer, content in ((one, "1"), (two, "2"), (one, "1")):
        swaps(service, layer)
        assert service.read("/etc/web.conf") == content
        assert service.read("/etc/secret") == service(f"read('secret', {held})") == "other"
        assert len(overlays(service)) == 2
    swaps(service)
    assert service.read("/etc/secret") == service(f"read('secret', {held})") == "other"
    with pytest.raises(FileNotFoundError):
        service.read("/etc/web.conf")


def test_holders_of_directories_of_an_old_stack_do_not_see_what_a_sandbox_mount_hides(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    one, two = one_and_two(layers)
    service(
        "(os.mkdir('/empty', 0), write('/none', ''), bind('/none', '/etc/secret'), bind('/empty', '/etc/app/sub'))"
    )
    service("(bind('/none', '/etc/app/private'))")
    swaps(service, one)
    held = [service(f"os.open({path!r}, os.O_PATH)") for path in ("/etc", "/etc/app")]
    for layer in (two, one, two):
        swaps(service, layer)
        assert service(f"read('secret', {held[0]})") == service(f"read('private', {held[1]})") == ""
        assert service(f"os.listdir(os.open('app/sub', os.O_RDONLY, dir_fd={held[0]}))") == []


# ---- the process


@pytest.mark.parametrize("option", ["user-first", "user-last"])
def test_a_service_with_users_of_its_own(start: Start, swaps: Swaps, layers: Layers, option: str) -> None:
    """PrivateUsers=: its mounts came to it as a unit, and may be locked together."""
    service = start(option)
    service("(tmpfs('/etc/empty'), write('/etc/empty/mine', 'mine'))" if option == "user-first" else "None")
    one, two = one_and_two(layers)
    before = service("rows()")
    for layer, content in ((one, "1"), (two, "2"), (one, "1")):
        swaps(service, layer)
        assert (service.read("/etc/web.conf"), service.read("/etc/base.conf")) == (content, "base")
        if option == "user-first":
            assert service.read("/etc/empty/mine") == "mine"
    swaps(service)
    assert service("rows()") == before


def test_a_process_that_has_chrooted_itself(service: Service, swaps: Swaps, layers: Layers) -> None:
    """Its own view of its mount table is empty; what it held open before still leads to the namespace's /etc."""
    one, two = one_and_two(layers)
    held = service("(os.mkdir('/jail'), os.open('/', os.O_PATH), os.chroot('/jail'), os.chdir('/'))")[1]
    assert " /etc " not in service.process.read("mountinfo")
    for layer, content in ((one, "1"), (two, "2")):
        swaps(service, layer)
        assert service(f"read('etc/web.conf', {held})") == content
    swaps(service)
    assert service(f"'web.conf' in os.listdir(os.open('etc', os.O_RDONLY, dir_fd={held}))") is False


def test_a_mount_that_comes_during_the_swap_is_kept(service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    calls = []

    def meanwhile() -> None:
        calls.append(True)
        if len(calls) == 1:
            service("(tmpfs('/etc/app'), write('/etc/app/mine', 'mine'))")

    swaps(service, two, begin=meanwhile)
    assert len(calls) == 2
    assert (service.read("/etc/web.conf"), service.read("/etc/app/mine")) == ("2", "mine")


def test_mounts_elsewhere_do_not_disturb_a_swap(service: Service, swaps: Swaps, layers: Layers) -> None:
    calls = []

    def meanwhile() -> None:
        calls.append(service("tmpfs('/mnt')"))

    swaps(service, layers.tree({"web.conf": "1"}), begin=meanwhile)
    assert len(calls) == 1


def test_mounts_that_never_stop_coming_end_it(service: Service, swaps: Swaps, layers: Layers) -> None:
    with pytest.raises(Moved):
        swaps(service, layers.tree({"web.conf": "1"}), begin=lambda: service("tmpfs('/etc/app')"))
    assert not service.mounted.overlay
    service("[syscalls.umount2('/etc/app', 2) for _ in range(5)]")


def test_more_mounts_than_any_sandbox_has_are_refused(service: Service, swaps: Swaps, layers: Layers) -> None:
    service("(os.chdir('/etc/empty'), [tmpfs('.') or os.chdir('/etc/empty') for _ in range(1100)])")
    with pytest.raises(Refused, match=r"^more than 1000 mounts below /etc in the service: unmount some$"):
        swaps(service, layers.tree({"web.conf": "1"}))
    service("(os.chdir('/'), [syscalls.umount2('/etc/empty', 2) for _ in range(1100)])")
    assert swaps(service, layers.tree({"web.conf": "2"})).done


def test_a_swap_that_was_killed_before_the_lift_is_finished_by_one_lift(
    workers: MountWorkers, service: Service, swaps: Swaps, layers: Layers
) -> None:
    one, two = one_and_two(layers)
    service("(tmpfs('/etc/empty'), write('/etc/empty/mine', 'mine'))")
    swaps(service, one)

    def half() -> None:
        with (
            build(workers, service.namespace, Stack((two,)), layers.copies) as tree,
            workers.entered(service.namespace),
        ):
            flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_BENEATH
            syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags)

    workers.submit(half).result()
    assert service.mounted.doubled and service.read("/etc/web.conf") == "1"
    shown_next = service.table.stacks[-2].id
    assert swaps(service, two).done
    assert service.table.top.id == shown_next, "what was there already was uncovered, not made again"
    assert (service.read("/etc/web.conf"), service.read("/etc/empty/mine")) == ("2", "mine")
    workers.submit(half).result()
    swaps(service, one)
    assert not service.mounted.doubled and len(overlays(service)) == 1
    assert (service.read("/etc/web.conf"), service.read("/etc/empty/mine")) == ("1", "mine")
    workers.submit(half).result()
    swaps(service)
    assert overlays(service) == []


def test_the_namespaces_of_the_host_are_never_touched(workers: MountWorkers, layers: Layers) -> None:
    stack = Stack((layers.tree({"web.conf": "1"}),))
    before = Path("/proc/self/mountinfo").read_text()
    ours = workers.submit(os.open, "/proc/thread-self/ns/mnt", os.O_RDONLY).result()
    namespaces = [ours]
    for path in ("/proc/self/ns/mnt", "/proc/1/ns/mnt"):
        with contextlib.suppress(PermissionError):  # then it cannot be entered either
            namespaces.append(os.open(path, os.O_RDONLY))
    for namespace in namespaces:
        with pytest.raises(HostNamespace):
            workers.submit(swap, workers, namespace, stack, layers.copies).result()
        os.close(namespace)
    assert Path("/proc/self/mountinfo").read_text() == before
    assert workers.submit(
        lambda: " - overlay " in Path("/proc/thread-self/mountinfo").read_text()
    ).result() is (" - overlay " in before)


def test_nothing_leaks(workers: MountWorkers, service: Service, swaps: Swaps, layers: Layers) -> None:
    one, two = one_and_two(layers)
    service(
        "(tmpfs('/etc/empty'), write('/other', ''), bind('/other', '/etc/secret'), bind('/etc/app', '/etc/app'))"
    )

    def state() -> tuple[int, int, int]:
        wait_until_idle(workers)
        rows = workers.submit(Path("/proc/thread-self/mountinfo").read_text).result()
        wait_until_idle(workers)
        return (
            len(os.listdir("/proc/self/fd")) - len(workers._threads),
            rows.count("\n"),
            service("read('/proc/self/mountinfo')").count("\n"),
        )

    for layer in (one, two):
        swaps(service, layer)
    before = state()
    for number in range(30):
        swaps(service, (one, two)[number % 2])
        with pytest.raises(OSError):
            swaps(service, one, one)
    assert state() == before


def test_in_the_service_nothing_is_mounted_before_all_is_ready(
    service: Service, swaps: Swaps, layers: Layers
) -> None:
    one, two = one_and_two(layers)
    swaps(service, one)
    seen = []
    swaps(service, two, begin=lambda: seen.append((service("rows()"), service.read("/etc/web.conf"))))
    assert len(seen) == 1 and seen[0][1] == "1"
    assert len(seen[0][0]) == len(service("rows()"))


@userns
@not_in_user_namespace
@pytest.mark.limit(300)
def test_all_of_this_in_a_user_namespace(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m", "pytest", "-q"]
    # Not where others have left directories that it may not tidy up.
    own = ["-p", "no:cacheprovider", f"--basetemp={tmp_path}/own"]
    done = subprocess.run([*command, *own, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
