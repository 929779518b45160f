# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stack is known by the contents of its layers, and a layer by its name."""

from __future__ import annotations

from watcher.model import Kind, Layer, Stack, stack_id


def layer(name: str, version: str, digest: str) -> Layer:
    return Layer(name, name, version, digest, Kind.IMAGE, f"/srv/{name}")


def test_stacks_with_the_same_contents_in_the_same_order_are_the_same() -> None:
    one, renamed, two = (
        layer("one", "1", "a" * 64),
        layer("renamed", "2", "a" * 64),
        layer("two", "1", "b" * 64),
    )
    assert Stack((one, two)).id == Stack((renamed, two)).id != Stack((two, one)).id
    assert Stack().id == ""


def test_the_identity_of_a_stack_stays_what_it_is_in_every_history() -> None:
    assert stack_id(["a" * 64, "b" * 64]) == "5e9ae866add9a85d"


def test_a_layer_without_a_version_is_called_by_its_name() -> None:
    assert layer("web", "1.4", "").label == "web 1.4"
    assert layer("a\nb", "", "").label == "a\\nb"
