# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics by the interface `io.systemd.Metrics`."""

from __future__ import annotations

import functools
import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from control.test_server import varlinkctl
from hypothesis import given
from hypothesis import strategies as st

from watcher.control import metrics
from watcher.images.store import Store
from watcher.model import Event, Outcome
from watcher.records.schema import Failed, Quarantined, ServiceStatus

WEB = ServiceStatus("web.service", "systemd", "running", pid=7, on_trial=True, pinned="")
BAD = Quarantined("db.service", "d" * 64, "secret", 5, "/srv/secret.raw")
DB = ServiceStatus("db.service", "systemd", "needs-restart", pid=8, quarantined=(BAD, BAD))
DIGEST = "0" * 64


class Copies:
    """A store with one copy."""

    def __init__(self, directory: Path) -> None:
        self.state_directory = str(directory)
        (directory / "store" / DIGEST).mkdir(parents=True)
        (directory / "store" / ".lock").touch()

    def usage(self) -> int:
        return 4096


class World:
    """A daemon that exists only in words."""

    def __init__(self, directory: Path) -> None:
        self.services: Sequence[ServiceStatus] = (WEB, DB)
        self.error: Exception | None = None
        self.directory = directory / "report"
        self.directory.mkdir()
        self.metrics = metrics.Metrics(self._services, cast(Store, Copies(directory)))

    async def _services(self) -> Sequence[ServiceStatus]:
        if self.error is not None:
            raise self.error
        return self.services

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[Path]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(metrics.serve, self.metrics, str(self.directory))
            path = self.directory / "io.confext.Watcher"
            while not path.exists():
                await trio.sleep(0.001)
            yield path
            nursery.cancel_scope.cancel()

    async def rows(self) -> dict[str, Any]:
        """Values by what stands before them."""
        found = await self.metrics.rows()
        named = {
            (row["name"].rpartition(".")[2], row.get("object", ""), *row.get("fields", {}).values()): row[
                "value"
            ]
            for row in found
        }
        assert len(named) == len(found)  # what names one is there once
        return {" ".join(filter(None, key)): value for key, value in named.items()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def asked(path: Path, method: str, parameters: object = None, **flags: bool) -> list[dict[str, Any]]:
    """All replies to one call."""
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        call = {"method": method, "parameters": parameters, **flags}
        await stream.send_all(json.dumps(call).encode() + b"\0")
        received = b""
        while True:
            received += await stream.receive_some()
            replies = [json.loads(one) for one in received.split(b"\0")[:-1]]
            if replies and received.endswith(b"\0") and not replies[-1].get("continues"):
                return replies


def applied(total: int | None, swap: int | None = None) -> Event:
    return Event("web.service", Outcome.APPLIED, "", when=1, swap_usec=swap, total_usec=total)


async def test_services_are_counted_by_state_and_those_out_of_the_ordinary_are_named(world: World) -> None:
    rows = await world.rows()
    assert rows["ServicesByState running"] == rows["ServicesByState needs-restart"] == 1
    assert rows["ServicesByState stopped"] == rows["ServicesByState template"] == 0
    assert rows["ServicesOnTrial"] == rows["ServicesPinned"] == 1
    assert rows["ServiceState web.service"] == "running"
    assert rows["ImagesKeptOut db.service"] == 2
    assert "ImagesKeptOut web.service" not in rows
    assert (rows["StoreBytes"], rows["StoreCopies"]) == (4096, 1)


async def test_outcomes_and_latencies_are_counted_from_the_start_on(world: World) -> None:
    assert (await world.rows())["OutcomesTotal applied"] == 0
    world.metrics.tell(applied(15_000, 900))
    world.metrics.tell(applied(9_000_000_000))
    world.metrics.tell(Event("web.service", Outcome.REFUSED, "", when=1, total_usec=7))
    rows = await world.rows()
    assert (rows["OutcomesTotal applied"], rows["OutcomesTotal refused"]) == (2, 1)
    drop = "drop-to-reload"
    assert rows[f"LatencyTotal {drop}"] == 2
    assert rows[f"LatencyUSecTotal {drop}"] == 9_000_015_000
    assert rows[f"LatencyUSecLast {drop}"] == rows[f"LatencyUSecMax {drop}"] == 9_000_000_000
    assert rows[f"LatencyByUSecTotal {drop} 10000"] == 0
    assert rows[f"LatencyByUSecTotal {drop} 20000"] == rows[f"LatencyByUSecTotal {drop} 50000000"] == 1
    assert rows[f"LatencyByUSecTotal {drop} +Inf"] == 2
    assert rows["LatencyUSecMax swap"] == rows["LatencyUSecTotal swap"] == 900


@given(st.lists(st.integers(0, 10**12), max_size=30))
def test_classes_of_latencies_never_go_down_and_end_at_the_count(usecs: list[int]) -> None:
    latencies = metrics.Latencies()
    for usec in usecs:
        latencies.add(usec)
    rows = list(latencies.rows("swap"))
    classes = {row["fields"]["le"]: row["value"] for row in rows if "le" in row.get("fields", {})}
    assert list(classes.values()) == sorted(classes.values())
    assert classes.pop("+Inf") == len(usecs)
    assert classes == {le: sum(usec <= int(le) for usec in usecs) for le in classes}


async def test_every_row_is_of_a_family_and_as_the_interface_has_it(world: World) -> None:
    world.metrics.tell(applied(1, 1))
    kinds = {family.name: family.kind for family in metrics.FAMILIES}
    rows = await world.metrics.rows()
    assert {row["name"] for row in rows} == set(kinds)
    assert [*dict.fromkeys(row["name"] for row in rows)] == list(kinds)  # a family's rows in a row
    for row in rows:
        assert row.keys() <= {"name", "value", "object", "fields"}
        assert isinstance(row["value"], str if kinds[row["name"]] == "string" else int)
        assert all(isinstance(value, str) for value in row.get("fields", {}).values())
        # varlink_idl_interface_name_is_valid() and ..._field_name_is_valid() in systemd; else it drops the row.
        assert re.fullmatch(r"io\.confext\.Watcher\.[A-Za-z](_?[A-Za-z0-9])*", row["name"])


async def test_nothing_private_is_in_it_and_names_are_utf_8(world: World) -> None:
    world.services = (DB, ServiceStatus("\udcff.service", "standalone", "stopped"))
    text = json.dumps(await world.metrics.rows())
    assert "secret" not in text
    assert "\\udcff" not in text


async def test_of_too_many_services_those_that_need_a_restart_are_named(world: World) -> None:
    many = [ServiceStatus(f"{number}.service", "systemd", "running") for number in range(metrics.OBJECTS_MAX)]
    world.services = (*many, DB)
    rows = await world.rows()
    named = [key for key in rows if key.startswith("ServiceState ")]
    assert len(named) == metrics.OBJECTS_MAX
    assert rows["ServiceState db.service"] == "needs-restart"


# The socket


async def test_each_metric_and_each_family_is_a_reply_of_its_own(world: World) -> None:
    async with world.socket() as path:
        assert path.stat().st_mode & 0o777 == 0o666
        listed = await asked(path, "io.systemd.Metrics.List", more=True)
        described = await asked(path, "io.systemd.Metrics.Describe", more=True)
        without = await asked(path, "io.systemd.Metrics.List")
    assert [reply["parameters"] for reply in listed] == await world.metrics.rows()
    assert [reply["parameters"]["name"] for reply in described] == [
        family.name for family in metrics.FAMILIES
    ]
    assert all(reply["parameters"].keys() == {"name", "description", "type"} for reply in described)
    assert {reply["parameters"]["type"] for reply in described} <= {"counter", "gauge", "string"}
    for replies in (listed, described):
        assert [reply.get("continues", False) for reply in replies] == [True] * (len(replies) - 1) + [False]
    assert [reply["error"] for reply in without] == ["org.varlink.service.ExpectedMore"]
    assert not path.exists()  # nor when the watcher has ended


async def test_it_describes_itself(world: World) -> None:
    async with world.socket() as path:
        (info,) = await asked(path, "org.varlink.service.GetInfo")
        assert "io.systemd.Metrics" in info["parameters"]["interfaces"]
        (text,) = await asked(
            path, "org.varlink.service.GetInterfaceDescription", {"interface": "io.systemd.Metrics"}
        )
        assert text["parameters"]["description"] == metrics.DESCRIPTION


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("io.systemd.Metrics.Absent", {}, "org.varlink.service.MethodNotFound"),
        ("io.confext.Watcher.Rollback", {"service": "web.service"}, "org.varlink.service.InterfaceNotFound"),
        ("io.systemd.Metrics.List", {"name": "x"}, "org.varlink.service.InvalidParameter"),
    ],
)
async def test_what_it_has_not_is_refused(world: World, method: str, parameters: object, error: str) -> None:
    async with world.socket() as path:
        (reply,) = await asked(path, method, parameters, more=True)
    assert reply["error"] == error


async def test_rubbish_ends_the_connection_and_no_other(world: World) -> None:
    async with world.socket() as path:
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(b"rubbish\0")
            assert await stream.receive_some() == b""
        assert len(await asked(path, "io.systemd.Metrics.Describe", more=True)) == len(metrics.FAMILIES)


async def test_why_the_history_cannot_be_read_is_not_for_everybody(world: World) -> None:
    world.error = Failed("/srv/secret")
    async with world.socket() as path:
        (reply,) = await asked(path, "io.systemd.Metrics.List", more=True)
    assert reply == {"error": Failed("").name, "parameters": {}}


async def test_without_the_directory_of_systemd_260_there_is_no_socket(tmp_path: Path, world: World) -> None:
    with trio.fail_after(5):
        await metrics.serve(world.metrics, str(tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()


async def test_a_socket_that_a_killed_watcher_left_is_replaced(world: World) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(world.directory / "io.confext.Watcher"))
    left.close()
    before = (world.directory / "io.confext.Watcher").stat().st_ino
    async with world.socket() as path:
        while path.stat().st_ino == before:
            await trio.sleep(0.001)
        assert await asked(path, "org.varlink.service.GetInfo")


@pytest.mark.parametrize("version", ["262", "257"])
async def test_varlinkctl_reads_it(world: World, version: str) -> None:
    command = varlinkctl(version)
    if command is None:
        pytest.skip(f"needs the container of systemd {version}")

    async def run(*words: str) -> subprocess.CompletedProcess[str]:
        call = functools.partial(subprocess.run, check=False, capture_output=True, text=True)
        return await trio.to_thread.run_sync(call, [*command, *words])

    async with world.socket() as path:
        introspected = await run("introspect", str(path), "io.systemd.Metrics")
        assert introspected.returncode == 0, introspected.stderr
        assert "type MetricFamilyType" in introspected.stdout
        call = ["--json=short", "call", str(path), "io.systemd.Metrics.List", "{}"]
        listed = await run("--more", *call)
        assert listed.returncode == 0, listed.stderr
        rows = [json.loads(line) for line in listed.stdout.replace("\x1e", "").splitlines()]
        assert rows == await world.metrics.rows()
        assert (await run(*call)).returncode == 1
