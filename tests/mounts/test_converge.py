# SPDX-License-Identifier: LGPL-2.1-or-later
"""All the mount namespaces of one service come to its stack, once; those of others are left alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from service import Service

from needs import root
from watcher.model import Layer, Stack
from watcher.mounts.converge import Compared, Converged, converge
from watcher.mounts.table import SOURCE
from watcher.mounts.workshop import HostNamespace, Workshop
from watcher.process import Gone, Process

from .conftest import Layers

pytestmark = root

Start = Callable[..., Service]


@pytest.fixture
def bring(shop: Workshop, layers: Layers) -> Callable[..., Converged]:
    compared: dict[Compared, bool] = {}

    def brought(
        main: Service,
        *stack: Layer,
        others: tuple[Service, ...] = (),
        begin: Callable[[], None] = lambda: None,
    ) -> Converged:
        pids = [main.pid, *(other.pid for other in others)]
        return shop.submit(
            converge, shop, main.process, pids, Stack(stack), layers.copies, begin, compared
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


def test_processes_that_have_ended_do_not_matter(
    start: Start, service: Service, layers: Layers, bring: Bring
) -> None:
    ended = start("private", inside=service)
    ended.close()
    bring(service, layers.tree({"web.conf": "1"}), others=(ended,))
    assert service.read("/etc/web.conf") == "1"


def test_a_main_process_that_has_ended_is_gone(start: Start, layers: Layers, shop: Workshop) -> None:
    service = start()
    with service.process.hold() as main:
        service.close()
        with pytest.raises(Gone):
            shop.submit(converge, shop, main, [], Stack(), {}, lambda: None, {}).result()


def test_a_service_in_the_hosts_namespace_is_not_touched(shop: Workshop, layers: Layers) -> None:
    stack = Stack((layers.tree({"web.conf": "1"}),))
    with Process(os.getpid()) as here, pytest.raises(HostNamespace):
        shop.submit(converge, shop, here, [], stack, layers.copies, lambda: None, {}).result()


def test_a_stack_of_systemd_that_shows_the_same_is_taken_over(
    service: Service, layers: Layers, bring: Bring
) -> None:
    one, two = layers.tree({"web.conf": "1"}), layers.tree({"web.conf": "2"})
    service("(os.mkdir('/base'), bind('/etc', '/base'))")
    service(f"overlay({SOURCE!r}, {layers.copies[one.digest].path + '/etc'!r}, '/base')")
    before = service("rows()")
    assert bring(service, one).swaps == bring(service, one).swaps == 0
    assert service("rows()") == before
    assert bring(service, two).swaps == 1
    assert service.read("/etc/web.conf") == "2"
