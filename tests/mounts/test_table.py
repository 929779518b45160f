# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mount table says what is on /etc and which stack it is, however it is ordered and whatever things are called.

These tests are also those of mounts/mountinfo.py.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from watcher.model import stack_id
from watcher.mounts.table import BASE, COVER, LAYERS, LAYERS_MAX, SOURCE, Table, layer_path

A, B = "a" * 64, "b" * 64
ROOT = "20 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"

NAMES = st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), max_size=80)
ODD = st.binary(max_size=300).map(
    lambda raw: raw.replace(b"/", b"").replace(b"\0", b"").decode("utf-8", "surrogateescape")
)


def escape(text: str, characters: str) -> str:
    """As the kernel prints a string into mountinfo: bytes of these and the backslash as octal numbers."""
    return "".join(f"\\{ord(char):03o}" if char in characters + "\\" else char for char in text)


def row(
    mount_id: int, parent: int, point: str, rest: str = "0:50 /", source: str = "none", options: str = "rw"
) -> str:
    device, root = rest.split(" ")
    fstype = "overlay" if source in (SOURCE, "confext", "overlay") else "tmpfs"
    points = escape(point, " \t\n#")
    return f"{mount_id} {parent} {device} {root} {points} ro,relatime shared:2 - {fstype} {source} {options}"


def stack_row(mount_id: int, parent: int, *paths: str, base: str = f"{BASE}@254:0") -> str:
    """An overlay of ours; paths of its layers bottom to top."""
    layers = [COVER, *reversed(paths), base]
    shown = ",".join("lowerdir+=" + escape(path, ", \t\n") for path in layers)
    return row(mount_id, parent, "/etc", source=SOURCE, options=f"ro,{shown},redirect_dir=on")


def table(*rows: str) -> Table:
    return Table("\n".join([ROOT, *rows, ""]))


# ---- layers


@given(NAMES | ODD, NAMES | ODD, st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_layer_is_read_back_from_its_path(name: str, version: str, digest: str) -> None:
    path = layer_path(name, version, digest)
    assert len(path.encode()) <= 255
    assert path.isascii() and path.isprintable()
    assert path.count("/") == 1 and path.startswith(LAYERS + "/")
    (layer,) = table(stack_row(30, 20, path)).mounted().layers or ()
    assert layer.digest == digest
    if len(path) < 255 - 12:  # else it had to be cut, maybe before a character of four bytes
        assert (layer.name, layer.version) == (name, version)
    else:
        assert name.startswith(layer.name) and version.startswith(layer.version)


def test_a_long_name_is_cut_and_the_digest_is_not() -> None:
    for length in range(150, 260):
        path = layer_path("n" * length, "1.4", A)
        assert len(path) <= 255
        assert path.endswith("@" + A)
    path = layer_path("n", "ä" * 100, A)
    assert len(path) <= 255
    (layer,) = table(stack_row(30, 20, path)).mounted().layers or ()
    assert set(layer.version) == {"ä"}, "not cut through a character"


@pytest.mark.parametrize(
    "name", ["web@1", "a_b", "comma,", "per%cent", "back\\slash", "..", ".", "", "\udcff", "a/b"]
)
def test_a_name_cannot_pass_for_something_else(name: str) -> None:
    (layer,) = table(stack_row(30, 20, layer_path(name, "1", A))).mounted().layers or ()
    assert (layer.name, layer.version, layer.digest) == (name, "1", A)


def test_the_stack_is_known_by_its_layers_bottom_to_top() -> None:
    found = table(stack_row(30, 20, layer_path("one", "1", A), layer_path("two", "2", B)))
    mounted = found.mounted()
    assert [layer.name for layer in mounted.layers or ()] == ["one", "two"]
    assert mounted.stack == stack_id([A, B])
    assert found.top.id == 30
    assert mounted.overlay and not mounted.doubled


def test_as_many_layers_as_there_can_be() -> None:
    paths = [layer_path("web", str(number), f"{number:064x}") for number in range(LAYERS_MAX)]
    assert [layer.version for layer in table(stack_row(30, 20, *paths)).mounted().layers or ()] == [
        str(number) for number in range(LAYERS_MAX)
    ]


def test_the_empty_stack_is_one_too() -> None:
    mounted = table(stack_row(30, 20)).mounted()
    assert mounted.overlay and mounted.layers == () and mounted.stack == ""


@pytest.mark.parametrize(
    "options",
    [
        "ro,lowerdir=/a:/b",
        "ro,lowerdir+=/a,lowerdir+=/b",
        "ro,lowerdir+=cover",
        f"ro,lowerdir+={COVER},lowerdir+=layers/web_1@{A}",
        f"ro,lowerdir+={COVER},lowerdir+=layers/web_1@not\\012a\\012digest,lowerdir+=base@0:1",
        f"ro,lowerdir+={COVER},lowerdir+=/layers/web_1@{A},lowerdir+=base@0:1",
        f"ro,lowerdir+={COVER},lowerdir+=layers/web_1@{A.upper()},lowerdir+=base@0:1",
        "ro",
    ],
)
def test_an_overlay_of_systemd_does_not_say_which_stack_it_is(options: str) -> None:
    mounted = table(row(30, 20, "/etc", source=SOURCE, options=options)).mounted()
    assert mounted.overlay and mounted.layers is None and mounted.stack is None


@pytest.mark.parametrize("source", ["confext", "none", "overlay"])
def test_overlays_of_others_are_the_base(source: str) -> None:
    found = table(row(30, 20, "/etc", source=source), stack_row(31, 30, layer_path("web", "1", A)))
    assert found.beneath.id == 30
    assert [mount.id for mount in found.stacks] == [31]
    assert not table(row(30, 20, "/etc", source=source)).mounted().overlay


def test_the_base_is_known_by_its_device() -> None:
    stack = stack_row(31, 20, layer_path("web", "1", A))
    made = table(stack).mounted()
    assert made.base == made.made_on == f"{BASE}@254:0"
    for_host = row(30, 20, "/etc", "0:77 /", source="confext")
    merged = table(for_host, stack_row(31, 30, layer_path("web", "1", A))).mounted()
    assert merged.made_on == made.made_on and merged.base != made.base
    assert merged.stack == made.stack and not merged.doubled
    anew = table(for_host, stack_row(31, 30, layer_path("web", "1", A), base=merged.base)).mounted()
    assert anew.made_on == anew.base == merged.base


def test_a_root_that_is_renamed_is_the_same_base_and_another_directory_mounted_there_is_not() -> None:
    stack = stack_row(31, 20, layer_path("web", "1", A))
    renamed = Table("\n".join([ROOT.replace(" / / ", " /srv/old / "), stack]))
    assert renamed.mounted().base == table(stack).mounted().base
    over = [row(30, 20, "/etc", f"254:0 /{name}") for name in ("a", "b")]
    bases = {table(one, stack_row(31, 30)).mounted().base for one in over}
    assert len(bases) == 2 and table(stack).mounted().base not in bases


@given(ODD | NAMES)
def test_whatever_directory_the_base_is_the_kernel_takes_its_path(name: str) -> None:
    directory = escape("/" + "/".join([name] * 3), " \t\n")
    found = table(row(30, 20, "/etc", f"254:0 {directory}"))
    assert len(found.base_path) <= 255
    assert found.base_path.isascii() and found.base_path.isprintable() and "/" not in found.base_path
    on_it = table(
        row(30, 20, "/etc", f"254:0 {directory}"), stack_row(31, 30, base=found.base_path)
    ).mounted()
    assert on_it.made_on == on_it.base


def test_a_stack_that_was_made_before_they_said_on_what_is_read_too() -> None:
    mounted = table(stack_row(31, 20, layer_path("web", "1", A), base="root/etc")).mounted()
    assert mounted.stack == stack_id([A]) and mounted.made_on is None
    assert table(stack_row(31, 20, base="root/elsewhere")).mounted().layers is None


def test_a_stack_of_systemd_does_not_say_on_what_it_was_made() -> None:
    mounted = table(row(30, 20, "/etc", source=SOURCE)).mounted()
    assert mounted.made_on is None and mounted.base


def test_without_a_stack_it_is_the_base_itself() -> None:
    for found in (table(), table(row(30, 20, "/etc", "0:77 /", source="confext"))):
        assert found.mounted().made_on == found.mounted().base


# ---- what lies on what


def test_the_top_is_found_by_parents_and_not_by_position() -> None:
    rows = [
        row(40, 20, "/etc", source="confext"),
        stack_row(30, 40),
        row(41, 30, "/etc/app"),
        row(50, 20, "/home"),
    ]
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        found = table(*rows)
        assert found.top.id == 30
        assert [mount.id for mount in found.chain] == [40, 30]
        assert [mount.id for mount in found.on(found.top)] == [41]


def test_the_root_may_be_covered_and_have_any_parent() -> None:
    text = "\n".join(
        ["5 4 0:1 / / rw - rootfs none rw", "9 5 254:0 / / rw - ext4 /dev/vda rw", stack_row(30, 9)]
    )
    assert Table(text).under.id == 9
    assert Table(text).top.id == 30
    assert Table("1 1 0:1 / / rw - rootfs none rw\n" + stack_row(30, 1)).top.id == 30


@pytest.mark.parametrize(
    "text", ["", "\n", "30 20 0:5 / /etc rw - tmpfs none rw\n", "7 7 0:1 / /home rw - tmpfs none rw"]
)
def test_without_a_root_it_is_refused(text: str) -> None:
    """That of a process which has changed its root."""
    with pytest.raises(ValueError, match="without a root"):
        Table(text)


@pytest.mark.parametrize("text", ["rubbish", "20 1 254:0 / / rw", "a b c / / rw - x y z"])
def test_what_is_no_row_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Table(text)


def test_mounts_that_another_covers_do_not_count() -> None:
    found = table(
        stack_row(30, 20),
        row(40, 30, "/etc/app/deep/x"),
        row(41, 30, "/etc/app"),
        row(42, 30, "/etc/app-not-below"),
        row(43, 41, "/etc/app/on-it"),
        row(44, 41, "/etc/app"),
    )
    assert [mount.id for mount in found.on(found.top)] == [41, 42]
    assert [mount.id for mount in found.on(found.on(found.top)[0])] == [44], (
        "the upper one hides what is on the lower"
    )
    assert sorted(mount.id for mount in found.above(found.top)) == [41, 42, 44]


def test_only_what_lies_on_the_uppermost_counts() -> None:
    found = table(
        row(40, 20, "/etc/app"), stack_row(30, 20), row(41, 30, "/etc/other"), row(42, 20, "/etcetera")
    )
    assert [mount.id for mount in found.on(found.top)] == [41]
    assert [mount.id for mount in found.on(found.under)] == [40]


@given(st.lists(NAMES.filter(bool), unique=True, max_size=8))
def test_whatever_mount_points_are_called(names: list[str]) -> None:
    rows = [row(100 + number, 30, f"/etc/{name}") for number, name in enumerate(names)]
    found = table(stack_row(30, 20), *rows)
    assert {mount.point for mount in found.on(found.top)} == {f"/etc/{name}" for name in names}


def test_a_carriage_return_or_another_end_of_line_is_none_here() -> None:
    for char in "\r\x0b\x0c\x1c\x85\u2028":
        found = table(stack_row(30, 20), row(40, 30, f"/etc/a{char}b"))
        assert [mount.point for mount in found.on(found.top)] == [f"/etc/a{char}b"]


def test_a_source_or_an_option_with_a_dash_is_no_separator() -> None:
    found = table("40 20 0:9 / /etc rw shared:1 master:2 - tmpfs a\\040-\\040b rw,x=\\040-\\040")
    assert found.top.source == "a - b"
    assert not found.mounted().overlay


# ---- what to do about it

STACK_A, STACK_B = layer_path("web", "1", A), layer_path("web", "2", B)
SANDBOX = "254:0 /hidden"


def test_two_of_ours_are_a_swap_that_was_killed() -> None:
    found = table(
        stack_row(30, 20, STACK_B),
        row(40, 30, "/etc/secret", SANDBOX),
        stack_row(31, 30, STACK_A),
        row(41, 31, "/etc/secret", SANDBOX),
    )
    assert found.mounted().doubled and found.surplus == 1 and found.liftable == 2


def test_one_that_alone_has_a_sandbox_mount_is_no_surplus() -> None:
    found = table(stack_row(30, 20, STACK_B), stack_row(31, 30, STACK_A), row(41, 31, "/etc/secret", SANDBOX))
    assert not found.mounted().doubled
    other = table(
        stack_row(30, 20, STACK_B),
        row(40, 30, "/etc/secret", "254:0 /something-else"),
        stack_row(31, 30, STACK_A),
        row(41, 31, "/etc/secret", SANDBOX),
    )
    assert not other.mounted().doubled


def test_mounts_on_mounts_without_end_are_compared() -> None:
    """A service that may mount in its own user namespace can have as many as it likes."""

    def deep(first: int, last: str = "0:50 /") -> list[str]:
        ids = range(first, first + 3000)
        return [row(one, one - 1, "/etc/app", last if one == ids[-1] else "0:50 /") for one in ids]

    for last, same in (("0:50 /", True), ("0:51 /", False)):
        stacks = [
            stack_row(30, 20, layer_path("web", "1", A)),
            stack_row(5000, 30, layer_path("web", "2", B)),
        ]
        found = table(stacks[0], *deep(31), stacks[1], *deep(5001, last))
        assert found.carries(found.stacks[0], found.stacks[1]) is same


def test_a_stack_of_systemd_with_a_sandbox_mount_on_it_is_not_lifted() -> None:
    assert table(row(30, 20, "/etc", source=SOURCE)).liftable == 1
    with_mount = [row(30, 20, "/etc", source=SOURCE), row(40, 30, "/etc/secret", SANDBOX)]
    assert table(*with_mount).liftable == 0
    assert table(*with_mount, stack_row(31, 30, STACK_A)).liftable == 1


def test_the_base_is_on_the_root_unless_something_else_was_mounted_there() -> None:
    assert table().base_on_root and table(stack_row(30, 20)).base_on_root
    assert table(row(30, 20, "/etc", "254:0 /etc"), stack_row(31, 30)).base_on_root
    assert not table(row(30, 20, "/etc", "254:0 /etc//deleted"), stack_row(31, 30)).base_on_root
    assert not table(row(30, 20, "/etc", "254:0 /srv/etc"), stack_row(31, 30)).base_on_root
    assert not table(row(30, 20, "/etc", "0:77 /etc"), stack_row(31, 30)).base_on_root


def test_a_change_below_etc_is_one_and_elsewhere_is_none() -> None:
    before = table(stack_row(30, 20), row(40, 30, "/etc/app"))
    assert before.same_etc(table(stack_row(30, 20), row(40, 30, "/etc/app"), row(50, 20, "/home")))
    assert not before.same_etc(table(stack_row(30, 20)))
    assert not before.same_etc(table(stack_row(30, 20), row(41, 30, "/etc/app")))
    assert not before.same_etc(table(stack_row(30, 20), row(40, 30, "/etc/app"), row(41, 40, "/etc/app/x")))
