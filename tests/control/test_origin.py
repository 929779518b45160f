# SPDX-License-Identifier: LGPL-2.1-or-later
"""How `origin` is shown (cli/show_origin.py), and since when a layer is there (control/subject.py).

On real services: tests/scenarios/test_origin.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from watcher.cli import show_origin
from watcher.control import subject
from watcher.model import Kind, Layer, Protection, Stack, Trust
from watcher.records.schema import to_dict
from watcher.records.traces import Origin, Piece, TracedFile, TracedLayer, TracedPath

SIGNED = Trust(
    Protection.SIGNED, "CN=o\x1b[m", "f" * 64, "a" * 64, "its hash tree was verified", "by an old key"
)
BASE = TracedLayer("base", "", "b" * 64, "directory", "base", "", Trust())
WEB = TracedLayer("web", "1.4", "d" * 64, "image", "web.raw", "/srv/web_1.4.raw", SIGNED)


def lines(**more: object) -> list[str]:
    known: dict[str, object] = {"state": "running", "stack": "x" * 16, "layers": (BASE, WEB)}
    return list(show_origin.origin(Origin("web.service", **(known | more))))  # type: ignore[arg-type]


@pytest.mark.parametrize("look", ["origin", "diff", "trace_program"])
def test_who_only_looks_does_not_wait_for_what_a_daemon_needs(look: str) -> None:
    unneeded = {"trio", "psutil", "inotify_simple"}
    script = f"import sys, watcher.control.{look}; print(*{unneeded} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_was_proved_of_a_layer_is_said() -> None:
    assert lines() == [
        "web.service: runs on 2 layers, topmost first",
        f"  web 1.4: image, signed, sha256 {'d' * 12}",
        f"    signed by CN=o\\x1b[m, certificate sha256 {'f' * 64}",
        f"    its hash tree was verified, root hash {'a' * 64}",
        "    warning: by an old key",
        "    /srv/web_1.4.raw",
        f"  base: directory, unprotected, sha256 {'b' * 12}",
    ]
    answer = to_dict(Origin("web.service", "running", "", (WEB,)))
    assert answer["layers"][0]["trust"]["protection"] == "signed"


@pytest.mark.parametrize(
    ("state", "said"),
    [("stopped", "does not run; its next start gets"), ("needs-restart", "its next start gets")],
)
def test_of_what_does_not_show_its_stack_it_is_said(state: str, said: str) -> None:
    assert said in lines(state=state)[0]
    assert lines(state=state, layers=())[0].endswith("the host's /etc alone")


def test_the_tree_has_a_line_for_each_directory_once() -> None:
    files = (
        TracedFile("/etc", "changed", "directory", 1),
        TracedFile("/etc/a/b/c", "changed", "file", 1, (0,)),
        TracedFile("/etc/a/b/d\n", "removed", "file", None),
        TracedFile("/etc/a/e", "new", "directory", 0),
        TracedFile("/etc/a/e/f", "changed", "link", 0, (), "tmpfs on /etc/a"),
        TracedFile("/etc/g", "removed", "directory", 1),
        TracedFile("/etc/h", "new", "file", 1),
        TracedFile("/etc/i", "changed", "directory", 1, note="what is in it is not shown"),
    )
    assert [line.rstrip() for line in lines(files=files)[7:]] == [
        f"{'/etc/':<36}  web 1.4, changed",
        "  a/",
        "    b/",
        f"{'      c':<36}  web 1.4, changed, covers base",
        f"{'      d' + chr(92) + 'n':<36}  removed, hidden by the layers above",
        f"{'    e/':<36}  base, new",
        f"{'      f':<36}  base, changed, hidden by a mount: tmpfs on /etc/a",
        f"{'  g/':<36}  removed, web 1.4",
        f"{'  h':<36}  web 1.4, new",
        f"{'  i/':<36}  web 1.4, changed, what is in it is not shown",
    ]


def test_a_chain_reads_from_the_top_down() -> None:
    def piece(layer: int | None, type: str, role: str, **more: object) -> Piece:
        known: dict[str, object] = dict.fromkeys(("uid", "gid", "size"), 0)
        known |= {"opaque": False, "covered_by": None, "at": "", "mode": 0o644}
        return Piece(layer, type, role, **(known | more))  # type: ignore[arg-type]

    chain = (
        piece(1, "directory", "shown", opaque=True, mode=0o755),
        piece(0, "whiteout", "covered", covered_by=1, at="/etc/x"),
        piece(None, "link", "covered", covered_by=1, at="/etc/x", mode=0o777),
    )
    found = TracedPath("/etc/x", chain, differs="there is nothing")
    assert lines(paths=(found,))[7:] == [
        "/etc/x",
        "  web 1.4: opaque directory 0755 of 0:0",
        "  base: a whiteout, covered by /etc/x of web 1.4",
        "  the host's /etc: link 0777 of 0:0, covered by /etc/x of web 1.4",
        "  the service sees something else: there is nothing; a process may hold an older file open",
    ]


def layer(name: str) -> Layer:
    return Layer(name, name, "1", name, Kind.IMAGE, "")


def test_a_layer_is_there_since_the_oldest_stack_without_a_break() -> None:
    a, b = layer("a"), layer("b")
    stacks = [Stack((a, b)), Stack((a,)), Stack((a, b)), Stack((b,))]
    when = {stack.id: number for number, stack in zip((40, 30, 20, 10), stacks, strict=True)}
    when[stacks[0].id] = 40  # the same stack once more
    assert subject._since("a", [Stack((a, b)), Stack((a,))], when) == 30
    assert subject._since("b", [Stack((a, b)), Stack((a,))], when) == 40
    assert subject._since("c", stacks, when) is None
