# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a service is told: by a signal, by a command where it is and as who it is, or not at all."""

from __future__ import annotations

import json
import os
import select
import shlex

import pytest

from scenarios.place import PYTHON, Place, Service, until
from support.images import confext, image

trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)
images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)


def script(place: Place, text: str) -> str:
    """A reload command that runs a shell script."""
    path = place.path / f"reload-{next(place.numbers)}"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def output(service: Service) -> str:
    """What the reload command printed, as the history has it."""
    history = json.loads(service.place.run("history", "--json", service.name).stdout)
    printed: str = history["events"][0]["output"]
    return printed


def test_a_command_runs_where_the_service_is(shared: Place) -> None:
    """In its mount namespace, with its environment and MAINPID, without standard input; and it is waited for."""
    out = shared.path / f"out-{next(shared.numbers)}"
    shared.environment["FROM_THE_SERVICE"] = "a b"
    service = shared.start(
        "--reload-command",
        script(
            shared,
            f"""
{{ echo "$MAINPID"; echo "$FROM_THE_SERVICE"; readlink /proc/self/ns/mnt; cat /etc/web.conf; pwd; cat; }} > {out}
""",
        ),
    )
    service.put("1.3")
    service.logged("web 1.3 added, applied in .*, reload done in")
    namespace = os.readlink(f"/proc/{service.pid}/ns/mnt")
    assert out.read_text().splitlines() == [str(service.pid), "a b", namespace, "1.3", "/"]


@images_only
def test_a_command_runs_as_who_the_service_is(shared: Place) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65533", "--groups=1,2", *PYTHON)
    service = shared.start("--reload-command", "sh -c 'id -u; id -g; id -G; exit 1'", program=nobody)
    service.put("1.3")
    service.logged("web 1.3 taken out again")
    assert output(service).split()[:5] == ["65534", "65533", "65533", "1", "2"]


@trees_only
def test_a_command_is_split_into_words_and_no_shell_sees_it(shared: Place) -> None:
    out = shared.path / f"out-{next(shared.numbers)}"
    words = ["sh", "-c", 'printf "<%s>" "$@" > "$0"', str(out), "a b", "$HOME", "*", "c'd"]
    service = shared.start("--reload-command", shlex.join(words))
    service.put("1.3")
    service.logged("reload done")
    assert out.read_text() == "<a b><$HOME><*><c'd>"


@trees_only
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sh -c 'echo it broke; echo badly >&2; exit 3'", "failed with exit status 3"),
        ("sh -c 'echo it broke; kill -SEGV $$'", "was ended by SIGSEGV"),
        ("/nowhere/reload", "cannot be started: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_said_and_the_stack_before_is_back(
    shared: Place, command: str, words: str
) -> None:
    service = shared.start("--reload-command", command)
    service.put("1.3")
    line = service.logged("web 1.3 taken out again: reload command", words)
    assert "level=" in line
    assert not service.etc("web.conf").exists()
    assert service.status()["last"]["outcome"] == "rolled-back"
    if "it broke" in command:
        assert "it broke" in output(service)


@trees_only
def test_what_a_command_leaves_running_is_ended(shared: Place) -> None:
    out, go_on = (shared.path / f"{name}-{next(shared.numbers)}" for name in ("out", "go-on"))
    os.mkfifo(out)
    os.mkfifo(go_on)
    service = shared.start(
        "--reload-command", f"sh -c 'sleep infinity & echo $! > {out}; read word < {go_on}'"
    )
    service.put("1.3")
    left = os.pidfd_open(int(out.read_text()))
    try:
        go_on.write_text("go on\n")
        service.logged("web 1.3 added, applied")
        until(lambda: select.select([left], [], [], 0)[0])
    finally:
        os.close(left)


@trees_only
def test_a_lot_of_output_is_cut_and_stops_nobody(shared: Place) -> None:
    service = shared.start("--reload-command", "sh -c 'head -c 1000000 /dev/zero | tr \"\\\\0\" x; exit 1'")
    service.put("1.3")
    service.logged("web 1.3 taken out again")
    printed = output(service)
    assert set(printed) == {"x"}
    assert len(printed) == 64 * 1024


@trees_only
def test_without_a_way_to_reload_it_is_applied_and_said(shared: Place) -> None:
    service = shared.start("--extension-directory", "-/nowhere")
    service.put("1.3")
    service.logged("web 1.3 added, applied in .*; it was not told to reload, it has no way to")
    assert service.has("1.3")


@trees_only
def test_a_program_without_a_handler_is_not_ended_by_the_signal(shared: Place) -> None:
    service = shared.start(
        "--reload-signal", "SIGHUP", program=("sh", "-c", "echo started; exec sleep infinity")
    )
    service.put("1.3")
    service.logged("web 1.3 added, applied", "SIGHUP was not sent, it has no handler")
    assert service.process.poll() is None
    assert service.has("1.3")


@trees_only
@pytest.mark.parametrize("name", ["SIGUSR1", "usr1", str(10)])
def test_any_signal_by_any_of_its_names(shared: Place, name: str) -> None:
    program = PYTHON[-1].replace("SIGUSR1", "SIGWINCH").replace("SIGHUP", "SIGUSR1")
    service = shared.start("--reload-signal", name, program=(*PYTHON[:-1], program))
    service.put("1.3")
    service.reloaded("1.3")
    service.logged("SIGUSR1 sent")


@images_only
def test_an_image_that_asks_for_a_restart_is_told_of_and_the_service_reloaded(shared: Place) -> None:
    """Nobody but who started it could restart it."""
    service = shared.start()
    service.put("1")
    service.reloaded("1")
    release = f"ID=_any\nEXTENSION_RESTART_UNITS={service.name}\n"
    made = confext(shared.path / "asks", "web", {"etc/web.conf": b"2"}, release)
    image(made, service.versions / "web_2.raw")
    service.logged("is not restarted, as EXTENSION_RESTART_UNITS= asks for.*it is told to reload")
    service.logged("web 1 -> 2 applied in .*, SIGHUP sent")
    service.put("3")
    service.logged("is not restarted")  # the one that asked goes
    service.logged("web 2 -> 3 applied in .*, SIGHUP sent")
    service.put("4")
    service.logged("web 3 -> 4 applied in .*, SIGHUP sent")
    assert len([line for line in service.log_lines() if "is not restarted" in line]) == 2
