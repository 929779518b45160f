# SPDX-License-Identifier: LGPL-2.1-or-later
"""All the mount namespaces of one service come to its stack, once; those of others are left alone.

These tests are also those of mounts/namespaces.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.needs import root
from support.service import Service
from watcher.model import Layer, Stack
from watcher.mounts import namespaces, syscalls
from watcher.mounts import swap as swapping
from watcher.mounts.converge import Compared, Converged, converge
from watcher.mounts.descriptors import Descriptors
from watcher.mounts.process import Gone, Process
from watcher.mounts.survey import Survey
from watcher.mounts.swap import build
from watcher.mounts.table import SOURCE, Table
from watcher.mounts.workers import HostNamespace, MountWorkers

from .conftest import Layers

pytestmark = root

Start = Callable[..., Service]


@pytest.fixture
def bring(workers: MountWorkers, layers: Layers) -> Callable[..., Converged]:
    compared: Compared = {}
    accepted: dict[Service, list[Stack]] = {}

    def brought(
        main: Service,
        *stack: Layer,
        others: tuple[Service, ...] = (),
        begin: Callable[[], None] = lambda: None,
        patient: bool = False,
        anew: bool = False,
        other_mains: Sequence[Service] = (),
    ) -> Converged:
        """`other_mains`: services of their own."""
        pids = [main.pid, *(other.pid for other in others)]
        kept = accepted.setdefault(main, [])
        kept.append(Stack(stack))
        return workers.submit(
            converge,
            workers,
            main.process,
            pids,
            Stack(stack),
            layers.copies,
            begin,
            compared,
            patient=patient,
            anew=anew,
            kept=lambda: kept,
            other_mains=lambda: [other.pid for other in other_mains],
        ).result()

    return brought


Bring = Callable[..., Converged]


def test_a_service_that_shows_the_stack_is_left_as_it_is(
    service: Service, layers: Layers, bring: Bring
) -> None:
    layer = layers.tree({"web.conf": "1"})
    assert bring(service, layer).swaps == 1
    before, told = service("read('/proc/self/mountinfo')"), []
    assert bring(service, layer, begin=lambda: told.append(True)).swaps == 0
    assert service("read('/proc/self/mountinfo')") == before
    assert not told


@pytest.mark.parametrize("propagation", ["shared", "slave", "private"])
def test_a_stack_that_is_shown_is_mounted_anew_where_its_copy_was_damaged(
    start: Start, service: Service, layers: Layers, bring: Bring, propagation: str
) -> None:
    layer = layers.tree({"web.conf": "damaged"})
    nested = start(*([] if propagation == "shared" else [propagation]), inside=service)
    bring(service, layer, others=(nested,))
    copy = Path(layers.copies[layer.digest].path)
    copy.rename(copy.with_name("damaged"))
    shutil.copytree(copy.with_name("damaged"), copy)
    (copy / "etc/web.conf").write_text("whole")
    told: list[bool] = []
    converged = bring(service, layer, others=(nested,), anew=True, begin=lambda: told.append(True))
    assert converged.anew and not converged.left_out and converged.swaps in (1, 2) and told
    for process in (service, nested):
        assert process.read("/etc/web.conf") == "whole"
    assert bring(service, layer, others=(nested,)).swaps == 0


def test_what_it_showed_before_is_told(service: Service, layers: Layers, bring: Bring) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    assert not bring(service, one).before.overlay
    assert bring(service, two).before.stack == Stack((one,)).id


@pytest.mark.parametrize("propagation", ["shared", "slave", "private"])
@pytest.mark.parametrize("own_mounts", [False, True], ids=["", "with mounts of its own"])
def test_processes_in_namespaces_of_their_own_follow(
    start: Start, service: Service, layers: Layers, bring: Bring, propagation: str, own_mounts: bool
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    service("(write('/other', 'other'), bind('/other', '/etc/secret'))")
    bring(service, one)
    nested = start(*([] if propagation == "shared" else [propagation]), inside=service)
    if own_mounts:
        nested("(tmpfs('/etc/app'), write('/etc/app/mine', 'mine'))")
    counts = []
    for layer, content in ((two, "2"), (one, "1"), (two, "2"), (one, "1")):
        converged = bring(service, layer, others=(nested,))
        assert converged.swaps in (1, 2) and converged.remarks == ()
        for process in (service, nested):
            assert (process.read("/etc/web.conf"), process.read("/etc/secret")) == (content, "other")
        if own_mounts:
            assert nested.read("/etc/app/mine") == "mine"
        assert bring(service, layer, others=(nested,)).swaps == 0, "all of them show it now"
        counts.append((len(service("rows()")), len(nested("rows()"))))
    assert counts[-1] == counts[-2], "nothing piles up"
    bring(service, others=(nested,))
    for process in (service, nested):
        assert process.read("/etc/secret") == "other"
        with pytest.raises(FileNotFoundError):
            process.read("/etc/web.conf")


@pytest.mark.parametrize("propagation", ["shared", "slave", "private"])
def test_they_follow_to_the_first_stack_too(
    start: Start, service: Service, layers: Layers, bring: Bring, propagation: str
) -> None:
    nested = start(*([] if propagation == "shared" else [propagation]), inside=service)
    bring(service, layers.tree({"web.conf": "1"}), others=(nested,))
    assert service.read("/etc/web.conf") == nested.read("/etc/web.conf") == "1"


def test_a_sandbox_with_users_of_its_own_follows_or_is_told_about(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    """What came with it is locked; whatever becomes of it, the service itself has its stack."""
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    service("(write('/other', 'other'), bind('/other', '/etc/secret'))")
    bring(service, one)
    nested = start("user-first", inside=service)
    for layer, content in ((two, "2"), (one, "1"), (two, "2")):
        converged = bring(service, layer, others=(nested,))
        assert service.read("/etc/web.conf") == content
        assert nested.read("/etc/secret") == "other"
        if nested.read("/etc/web.conf") != content:
            assert [remark for remark in converged.remarks if "mount namespace of its own" in remark]


@pytest.mark.parametrize("bound", ["NESTED_MAX", "TABLES_MAX"])
def test_of_more_namespaces_than_are_followed_the_service_itself_has_its_stack(
    start: Start,
    service: Service,
    layers: Layers,
    bring: Bring,
    bound: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any user can make thousands of them, with thousands of mounts in each."""
    nested = [start("private", inside=service) for _ in range(2)]
    monkeypatch.setattr(namespaces, bound, 1)
    converged = bring(service, layers.tree({"web.conf": "1"}), others=(*nested, nested[0]))
    assert service.read("/etc/web.conf") == "1"
    assert converged.swaps == (2 if bound == "NESTED_MAX" else 1)
    assert "the others keep the old stack" in converged.remarks[-1]


def test_one_that_was_left_behind_catches_up(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    bring(service, one)
    nested = start("private", inside=service)
    bring(service, two)
    assert nested.read("/etc/web.conf") == "1"
    converged = bring(service, two, others=(nested,))
    assert (converged.swaps, nested.read("/etc/web.conf")) == (1, "2")


def test_a_container_of_the_service_is_left_alone(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    container = start()
    other = start("private", inside=service)
    other("(os.mkdir('/own'), bind('/own', '/etc'))")
    before = container("rows()"), other("rows()")
    bring(service, layers.tree({"web.conf": "1"}), others=(container, other))
    assert (container("rows()"), other("rows()")) == before
    assert service.read("/etc/web.conf") == "1"


@pytest.mark.parametrize("known", [False, True])
def test_another_service_among_its_processes_keeps_its_own_stack(
    start: Start, service: Service, layers: Layers, bring: Bring, known: bool
) -> None:
    """A service may start another, with a stack of its own, on the same root."""
    one, two, others = (layers.tree({"web.conf": text}) for text in ("1", "2", "other"))
    bring(service, one)
    other = start("private", inside=service)
    bring(other, others)
    before = other("rows()")
    for layer in (two, one, two):
        bring(service, layer, others=(other,), other_mains=[other] if known else [])
        assert (service.read("/etc/web.conf"), other.read("/etc/web.conf")) == (
            layers.text(layer, "web.conf"),
            "other",
        )
    assert other("rows()") == before


def test_another_service_that_runs_on_the_same_images_keeps_them(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    bring(service, one)
    other = start("private", inside=service)
    bring(other, one)
    own = start("private", inside=service)
    bring(service, two, others=(other, own), other_mains=[other])
    assert [one.read("/etc/web.conf") for one in (service, own, other)] == ["2", "2", "1"]


def test_processes_that_have_ended_do_not_matter(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    ended = start("private", inside=service)
    ended.close()
    bring(service, layers.tree({"web.conf": "1"}), others=(ended,))
    assert service.read("/etc/web.conf") == "1"


def test_a_main_process_that_has_ended_is_gone(start: Start, layers: Layers, workers: MountWorkers) -> None:
    service = start()
    with service.process.hold() as main:
        service.close()
        with pytest.raises(Gone):
            workers.submit(converge, workers, main, [], Stack(), {}, lambda: None, {}, kept=list).result()


def test_a_service_in_the_hosts_namespace_is_not_touched(workers: MountWorkers, layers: Layers) -> None:
    stack = Stack((layers.tree({"web.conf": "1"}),))
    with Process(os.getpid()) as here, pytest.raises(HostNamespace):
        workers.submit(
            converge, workers, here, [], stack, layers.copies, lambda: None, {}, kept=list
        ).result()


def mount_as_systemd(service: Service, layers: Layers, layer: Layer) -> None:
    """A stack that does not say what it is."""
    service("os.path.exists('/base') or (os.mkdir('/base'), bind('/etc', '/base'))")
    service(f"overlay({SOURCE!r}, {layers.copies[layer.digest].path + '/etc'!r}, '/base')")


def test_a_stack_of_systemd_that_shows_the_same_is_taken_over(
    service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    mount_as_systemd(service, layers, one)
    before = service("rows()")
    assert bring(service, one).swaps == bring(service, one).swaps == 0
    assert service("rows()") == before
    assert bring(service, two).swaps == 1
    assert service.read("/etc/web.conf") == "2"


def test_a_stack_of_systemd_is_not_taken_for_one_that_had_its_mount_id_before(
    service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})

    def mounted(layer: Layer) -> int:
        mount_as_systemd(service, layers, layer)
        return service.table.top.id

    for _ in range(100):
        first = mounted(one)
        assert bring(service, one).swaps == 0
        service("syscalls.umount2('/etc', 0)")
        if mounted(two) == first:  # Likely: the kernel gives the lowest ID that is free.
            break
        service("syscalls.umount2('/etc', 0)")
    else:
        pytest.fail("the kernel gave no mount ID again")
    assert bring(service, one).swaps == 1
    assert service.read("/etc/web.conf") == "1"


def test_a_stack_of_systemd_stays_while_what_it_may_be_made_of_is_being_written(
    service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    mount_as_systemd(service, layers, one)
    before = service("rows()")
    assert bring(service, patient=True).swaps == bring(service, two, patient=True).swaps == 0
    assert service("rows()") == before
    assert bring(service, two).swaps == 1
    assert bring(service, one, patient=True).swaps == 1  # ours says what it is


# ---- the host merges its own confexts, and takes them away


def merge(host: Service, text: str, *, refresh: bool = False) -> None:
    """As systemd-confext does it: an overlay of what `/etc` is without it; to refresh, the old one goes first."""
    if refresh:
        unmerge(host)
    host(f"(os.makedirs('/host/{text}/etc'), write('/host/{text}/etc/host.conf', {text!r}))")
    host(f"overlay('confext', '/host/{text}/etc', '/etc')")


def unmerge(host: Service) -> None:
    host("syscalls.umount2('/etc', 2)")


def host_conf(service: Service) -> str:
    try:
        return service.read("/etc/host.conf")
    except FileNotFoundError:
        return ""


@pytest.fixture
def host(start: Start) -> Service:
    return start()


@pytest.fixture
def guest(start: Start, host: Service) -> Service:
    """A service on that host, with a mount of its sandbox."""
    service = start("slave", inside=host)
    service("(tmpfs('/etc/empty'), write('/etc/empty/mine', 'mine'))")
    return service


def test_what_the_host_merges_and_unmerges_is_followed_once(
    host: Service, guest: Service, layers: Layers, bring: Bring
) -> None:
    layer = layers.tree({"web.conf": "1"})
    bring(guest, layer)
    steps = [
        ("a", lambda: merge(host, "a")),
        ("b", lambda: merge(host, "b", refresh=True)),
        ("c", lambda: merge(host, "c", refresh=True)),
        ("", lambda: unmerge(host)),
        ("d", lambda: merge(host, "d")),
    ]
    for text, step in steps:
        shown = host_conf(guest)
        step()
        assert host_conf(guest) == shown, "what it has is complete, and stays until it is made anew"
        converged = bring(guest, layer)
        assert (converged.swaps, converged.rebased) == (1, True)
        assert converged.before.stack == Stack((layer,)).id
        assert host_conf(guest) == text
        assert (guest.read("/etc/web.conf"), guest.read("/etc/empty/mine")) == ("1", "mine")
        before, told = guest("read('/proc/self/mountinfo')"), []
        again = bring(guest, layer, begin=lambda told=told: told.append(True))
        assert (again.swaps, again.rebased, told) == (0, False, [])
        assert guest("read('/proc/self/mountinfo')") == before


def test_another_stack_is_no_same_one_anew(
    host: Service, guest: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    bring(guest, one)
    merge(host, "a")
    converged = bring(guest, two)
    assert (converged.swaps, converged.rebased) == (1, False)
    assert (guest.read("/etc/web.conf"), host_conf(guest)) == ("2", "a")


def test_a_host_that_does_not_change_etc_changes_nothing(
    host: Service, guest: Service, layers: Layers, bring: Bring
) -> None:
    layer = layers.tree({"web.conf": "1"})
    bring(guest, layer)
    host("(os.mkdir('/elsewhere'), tmpfs('/elsewhere'))")
    merge(host, "a")
    unmerge(host)
    assert bring(guest, layer).swaps == 0, "it came and went before anybody looked"


def test_an_empty_stack_with_a_sandbox_follows_too(
    host: Service, guest: Service, layers: Layers, bring: Bring
) -> None:
    bring(guest, layers.tree({"web.conf": "1"}))
    guest("(tmpfs('/etc/app'), write('/etc/app/mine', 'mine'))")
    bring(guest)
    assert guest.mounted.overlay and guest.mounted.stack == ""
    merge(host, "a")
    assert bring(guest).rebased
    assert (host_conf(guest), guest.read("/etc/app/mine")) == ("a", "mine")
    assert bring(guest).swaps == 0


def test_without_a_stack_there_is_nothing_to_make_anew(host: Service, start: Start, bring: Bring) -> None:
    service = start("slave", inside=host)
    bring(service)
    merge(host, "a")
    assert host_conf(service) == "a"
    assert bring(service).swaps == 0


@pytest.mark.parametrize("propagation", ["shared", "slave", "private"])
def test_processes_in_namespaces_of_their_own_follow_the_host_as_far_as_its_mounts_reach_them(
    start: Start, host: Service, guest: Service, layers: Layers, bring: Bring, propagation: str
) -> None:
    layer = layers.tree({"web.conf": "1"})
    bring(guest, layer)
    nested = start(*([] if propagation == "shared" else [propagation]), inside=guest)
    nested("(tmpfs('/etc/app'), write('/etc/app/mine', 'mine'))")
    for text, step in (("a", lambda: merge(host, "a")), ("b", lambda: merge(host, "b", refresh=True))):
        step()
        assert bring(guest, layer, others=(nested,)).rebased
        assert host_conf(guest) == text
        assert host_conf(nested) == ("" if propagation == "private" else text)
        assert (nested.read("/etc/web.conf"), nested.read("/etc/app/mine")) == ("1", "mine")
        assert bring(guest, layer, others=(nested,)).swaps == 0


def test_a_stack_of_systemd_follows_too(start: Start, host: Service, layers: Layers, bring: Bring) -> None:
    """It does not say on what it was made: what it showed when it was looked at first counts."""
    layer = layers.tree({"web.conf": "1"})
    service = start("slave", inside=host)
    service("(os.mkdir('/under'), bind('/etc', '/under'))")
    service(f"overlay({SOURCE!r}, {layers.copies[layer.digest].path + '/etc'!r}, '/under')")
    assert bring(service, layer).swaps == 0
    merge(host, "a")
    converged = bring(service, layer)
    assert (converged.swaps, converged.rebased) == (1, True)
    assert (host_conf(service), service.read("/etc/web.conf")) == ("a", "1")
    assert bring(service, layer).swaps == 0


def test_a_stack_of_systemd_that_the_host_changed_before_anybody_looked_follows_too(
    start: Start, host: Service, layers: Layers, bring: Bring
) -> None:
    layer = layers.tree({"web.conf": "1"})
    service = start("slave", inside=host)
    service("(os.mkdir('/under'), bind('/etc', '/under'))")
    service(f"overlay({SOURCE!r}, {layers.copies[layer.digest].path + '/etc'!r}, '/under')")
    merge(host, "a")
    assert bring(service, layer).swaps == 1
    assert (host_conf(service), service.read("/etc/web.conf")) == ("a", "1")
    assert bring(service, layer).swaps == 0


def test_killed_before_the_lift_what_lies_beneath_is_used_only_if_it_is_made_of_what_the_host_has_now(
    workers: MountWorkers, host: Service, guest: Service, layers: Layers, bring: Bring
) -> None:
    layer = layers.tree({"web.conf": "1"})

    def half() -> None:
        with (
            build(workers, guest.namespace, Stack((layer,)), layers.copies) as tree,
            workers.entered(guest.namespace),
        ):
            flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_BENEATH
            syscalls.move_mount(tree, "", syscalls.AT_FDCWD, "/etc", flags)

    bring(guest, layers.tree({"web.conf": "2"}))
    merge(host, "a")
    workers.submit(half).result()
    assert guest.mounted.doubled
    merge(host, "b", refresh=True)
    assert bring(guest, layer).swaps == 1
    assert (host_conf(guest), guest.read("/etc/web.conf")) == ("b", "1")
    assert not guest.mounted.doubled


def test_a_stack_that_was_made_before_they_said_on_what_is_left_until_the_host_changes(
    host: Service, guest: Service, layers: Layers, bring: Bring, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers.tree({"web.conf": "1"})
    attach_base = swapping.attach_base

    def in_root(fds: Descriptors, survey: Survey) -> int:
        os.mkdir("root")
        return attach_base(fds, survey)

    with monkeypatch.context() as formerly:
        formerly.setattr(swapping, "_ROOT", "elsewhere")
        formerly.setattr(swapping, "attach_base", in_root)
        formerly.setattr(Table, "base_path", "root/etc")
        bring(guest, layer)
    assert guest.mounted.stack == Stack((layer,)).id and guest.mounted.made_on is None
    assert bring(guest, layer).swaps == 0
    merge(host, "a")
    assert bring(guest, layer).rebased
    assert host_conf(guest) == "a" and guest.mounted.made_on == guest.mounted.base
