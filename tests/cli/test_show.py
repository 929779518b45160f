# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was proved of images, as the command line prints it; the rest of cli/show.py is seen in the scenarios."""

from __future__ import annotations

from dataclasses import replace

from watcher.cli import show, show_status
from watcher.model import Kind, Layer, Protection, Trust
from watcher.records.schema import PlannedChange, ServiceStatus

SIGNED = Trust(Protection.SIGNED, "CN=ops", "f" * 64, "e" * 64, "verified over the store's copy")
TREE = Layer("base", "base", "2", "b" * 64, Kind.DIRECTORY, "/srv/base_2")
IMAGE = Layer("web.raw", "web", "1.4", "a" * 64, Kind.IMAGE, "/srv/web_1.4.raw", SIGNED)
UNKNOWN = replace(IMAGE, trust=Trust(Protection.VERITY, how="verified", remark="signed by an unknown key"))
STATUS = ServiceStatus("web.service", "standalone", "running", pid=9, layers=(TREE, IMAGE))


def test_of_one_service_it_is_said_how_and_by_whom() -> None:
    said = list(show_status.in_depth(STATUS))
    by = f"CN=ops (certificate sha256 {'f' * 64})"
    first = said.index("   Runs on: web 1.4 (aaaaaaaaaaaa, signed)")
    assert said[first + 1 : first + 3] == [
        f"              signed by {by}: verified over the store's copy, root hash {'e' * 64}",
        "            base 2 (bbbbbbbbbbbb, unprotected)",
    ]
    (warning,) = [line for line in show_status.in_depth(replace(STATUS, layers=(UNKNOWN,))) if "warn" in line]
    assert warning.strip() == "warning: signed by an unknown key"


def test_a_plan_says_it_of_what_is_new() -> None:
    change = PlannedChange("web.service", True, layers=(TREE,), wanted_layers=(TREE, IMAGE))
    said = "\n".join(show.changes([change]))
    assert "web.service: web 1.4: signed by CN=ops" in said and "base 2" not in said
