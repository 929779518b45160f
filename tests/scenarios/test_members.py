# SPDX-License-Identifier: LGPL-2.1-or-later
"""`origin` and `diff` by members of the group `confext-watcher`, who ask the daemon: what they are told, and what not.

Their side (control/trace_client.py) and the daemon's (control/trace_process.py, control/trace_program.py, and
control/trace_pieces.py between these) on real services, images and users.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scenarios.place import Place, Service, until
from scenarios.test_diff import by_path
from support import images
from support.needs import root, tool
from support.nobody import AS_NOBODY
from watcher.control.trace_process import pieces
from watcher.records import schema
from watcher.records.schema import Failed

pytestmark = [root, tool("mksquashfs"), tool("setpriv")]

GROUP = 4711
MEMBER = ("setpriv", "--reuid=4700", "--regid=4700", f"--groups={GROUP}")
# The daemon, on a host that has the group.
WITH_GROUP = (
    sys.executable,
    "-c",
    f"import sys; from watcher.control import peers; peers._gid = lambda: {GROUP}\n"
    "from watcher.cli.main import main; sys.exit(main(sys.argv[2:]))",
)
TOKEN = "s3cret"
MANY = "many-" * 40


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """With a daemon that knows the group, and a directory that the member can reach."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        with Place(Path(path)) as made:
            made.start_daemon(*WITH_GROUP)
            yield made


@pytest.fixture(scope="module")
def service(place: Place) -> Service:
    """That has had 1.3, and then 1.4."""
    return changed(place)


@pytest.fixture(scope="module")
def large(place: Place) -> Service:
    return changed(place, 1200)


def drop(service: Service, version: str, count: int = 0) -> None:
    """A version of the image with files of which the member may read some."""
    word = f"{TOKEN}-{version}\n".encode()
    files = {
        "open": word,
        "closed": word,
        "groups": word,
        "listed": word,
        "dir/below": word,
        "turns": word,
        **{f"{MANY}/{number}": b"%d %s %s" % (number, b"x" * 2000, word) for number in range(count)},
    }
    tree = images.confext(
        service.place.path / f"tree-{service.name}-{version}",
        "web",
        {f"etc/{n}": t for n, t in files.items()},
    )
    etc = tree / "etc"
    (etc / "closed").chmod(0o640)
    os.chown(etc / "groups", 0, GROUP)
    (etc / "groups").chmod(0o640)
    (etc / "dir" / "link").symlink_to(f"/{TOKEN}/{version}")
    (etc / "dir").chmod(0o700)
    (etc / "turns").chmod(0o644 if version == "1.3" else 0o600)
    made = images.image(tree, service.place.path / f"{service.name}-{version}.squashfs")
    service.place.bring(made, service.versions / f"web_{version}.raw")


def changed(place: Place, count: int = 0) -> Service:
    """A service that has had 1.3 and then 1.4."""
    service = place.start()
    for version in ("1.3", "1.4"):
        drop(service, version, count)
        service.logged("web (.* -> )?" + version)
    return service


def test_a_member_is_told_what_root_is(place: Place, service: Service) -> None:
    mine = place.run("origin", service.name, "closed", "dir", "/usr", prefix=MEMBER).stdout
    assert mine == place.run("origin", service.name, "closed", "dir", "/usr").stdout
    assert "/usr: not below /etc" in mine


def test_but_no_names_that_he_could_not_list(place: Place, service: Service) -> None:
    inner = ("/etc/dir/below", "/etc/dir/link")
    mine, roots = (
        json.loads(place.run("origin", "--json", service.name, prefix=prefix).stdout)["files"]
        for prefix in (MEMBER, ())
    )
    assert {file["path"] for file in roots} >= {*inner}
    left = [file for file in roots if file["path"] not in inner]
    assert [file | {"note": ""} for file in mine] == left
    assert [file["path"] for file in mine if file["note"]] == ["/etc/dir"]
    for words in ((), ("--stat",), ("--json",)):
        asked = ("diff", *words, service.name, "--from", "none")
        mine, roots = (place.run(*asked, prefix=prefix, check=False).stdout for prefix in (MEMBER, ()))
        assert "below" in roots and "below" not in mine and "/etc/dir" in mine
        assert "not shown to a user who could not list it" in mine or words == ("--stat",)
    said = place.run("origin", service.name, "/etc/dir/below", "dir/absent", prefix=MEMBER).stdout
    assert said.count("not shown to a user who could not look up names in /etc/dir") == 2
    assert "nothing is there" not in said and "web 1.4: file" not in said


def test_what_a_directory_of_the_hosts_has_is_for_who_could_look_there(place: Place) -> None:
    """An image that replaces it would have a stranger learn what the host keeps in it."""
    private = place.path / "etc/private"
    private.mkdir(mode=0o700, parents=True)
    (private / "key-of-the-host").write_text("")
    on_it = f'mount --bind {shlex.quote(str(private.parent))} /etc && exec "$@"'
    service = place.start(prefix=["unshare", "--mount", "sh", "-c", on_it, "sh"])
    tree = images.confext(place.path / "opaque", "web", {"etc/private/own": b""})
    os.setxattr(tree / "etc/private", "trusted.overlay.opaque", b"y")
    place.bring(images.image(tree, place.path / "opaque.squashfs"), service.versions / "web_1.raw")
    service.logged("web 1 added")
    for words in (("origin",), ("origin", "--json"), ("diff", "--from", "none")):
        mine, roots = (
            place.run(*words, service.name, prefix=prefix, check=False).stdout for prefix in (MEMBER, ())
        )
        assert "key-of-the-host" in roots and "private" in mine
        assert "key-of-the-host" not in mine and "could not list it" in mine
    path = "/etc/private/key-of-the-host"
    said = place.run("origin", service.name, path, prefix=MEMBER).stdout
    assert "nothing is there" in said and "the host's /etc" not in said
    assert "covered by" in place.run("origin", service.name, path).stdout


def test_contents_that_a_member_could_not_read_are_not_shown(place: Place, service: Service) -> None:
    done = place.run("diff", "--json", service.name, "--from", "1", "--to", "0", prefix=MEMBER, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    files = by_path(json.loads(done.stdout))
    shown = {path for path, file in files.items() if file["diff"]}
    assert shown == {"/etc/open", "/etc/groups", "/etc/listed"}
    assert files["/etc/open"]["diff"] == f"@@ -1 +1 @@\n-{TOKEN}-1.3\n+{TOKEN}-1.4\n"
    file = files["/etc/closed"]
    assert file["diff"] is None and "could not read" in file["note"], file
    # A digest of a secret that is short tells the secret.
    assert file["before"]["sha256"] == file["after"]["sha256"] == ""
    # What he could read before he cannot any more: he is told what it was, and not what became of it.
    turns = files["/etc/turns"]
    assert turns["diff"] is None and turns["before"]["sha256"] and not turns["after"]["sha256"]
    text = place.run("diff", service.name, "--from", "1", "--to", "0", prefix=MEMBER, check=False).stdout
    assert text.count(f"+{TOKEN}") == 3 and "/etc/closed: contents are not shown" in text
    roots = place.run("diff", service.name, "--from", "1", "--to", "0", check=False).stdout
    assert roots.count(f"+{TOKEN}") == 6 and "not shown" not in roots


def test_without_arguments_it_is_what_would_change_now(place: Place, service: Service) -> None:
    done = place.run("diff", service.name, prefix=MEMBER)
    assert "no difference" in done.stdout


def test_what_cannot_be_is_said_in_the_same_words(place: Place, service: Service) -> None:
    for words in (
        ["diff", service.name, "--from", "7"],
        ["diff", "nobody.service"],
        ["origin", "nobody.service"],
        ["diff", service.name, "--to", "0", "1"],
    ):
        mine, roots = (place.run(*words, check=False, prefix=prefix) for prefix in (MEMBER, ()))
        assert (mine.returncode, mine.stderr, mine.stdout) == (roots.returncode, roots.stderr, "")


def test_images_are_for_root(place: Place, service: Service) -> None:
    """The kernel would mount whatever a member makes."""
    done = place.run("diff", service.name, "--to", "./web_1.5.raw", prefix=MEMBER, check=False)
    assert (
        done.returncode == 2 and "--to: images that are not dropped yet only root may compare" in done.stderr
    )
    (error,) = call(place, "Compare", {"service": service.name, "after": "/etc/web.raw"})
    assert "only root may" in error["parameters"]["reason"]


def test_strangers_are_told_what_to_do(place: Place, service: Service) -> None:
    for words, status in ((["origin", service.name], 1), (["diff", service.name], 2)):
        done = place.run(*words, prefix=AS_NOBODY, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert "only root may, and members of the group confext-watcher" in done.stderr


def test_without_a_daemon_only_root_may(open_place: Place) -> None:
    open_place.runtime.mkdir()
    for words, status in ((["origin", "web.service"], 3), (["diff", "web.service"], 2)):
        done = open_place.run(*words, prefix=MEMBER, check=False)
        assert (done.returncode, done.stdout) == (status, "")
        assert "is not running" in done.stderr and "use sudo" in done.stderr


# In a process of its own, with that user's credentials; prints each reply.
CALL = """
import json, os, socket, sys
method, parameters, more, path = json.loads(sys.argv[1])
stream = socket.socket(socket.AF_UNIX)
stream.connect(path)
order = {"method": "io.confext.Watcher." + method, "parameters": parameters, "more": more}
stream.sendall(json.dumps(order).encode() + b"\\0")
received = b""
while True:
    part = stream.recv(1 << 20)
    received += part
    *replies, received = received.split(b"\\0")
    for reply in replies:
        print(reply.decode(), flush=True)
    if not part or (replies and not json.loads(replies[-1]).get("continues")):
        break
"""


def words_of(place: Place, method: str, parameters: dict[str, Any], more: bool = False) -> list[str]:
    asked = json.dumps([method, parameters, more, str(place.runtime / schema.SOCKET)])
    return [*MEMBER, sys.executable, "-Ic", CALL, asked]


def call(place: Place, method: str, parameters: dict[str, Any], more: bool = False) -> list[dict[str, Any]]:
    done = subprocess.run(
        words_of(place, method, parameters, more), capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_much_comes_in_pieces_and_is_cut_where_one_reply_is_asked_for(place: Place, large: Service) -> None:
    *first, last = call(place, "Trace", {"service": large.name}, more=True)
    assert first and all(reply["continues"] for reply in first) and "continues" not in last
    origins = [reply["parameters"]["origin"] for reply in (*first, last)]
    assert [bool(one["layers"]) for one in origins] == [True, *(False for _ in origins[1:])]
    whole = json.loads(place.run("origin", "--json", large.name, prefix=MEMBER).stdout)
    assert [file for one in origins for file in one["files"]] == whole["files"]
    (alone,) = call(place, "Trace", {"service": large.name})
    assert alone["parameters"] == {"origin": whole, "truncated": False, "redacted": False}
    asked = {"service": large.name, "before": "1", "after": "0"}
    replies = call(place, "Compare", asked, more=True)
    assert len(replies) > 1 and all(reply["parameters"]["diff"]["differs"] for reply in replies)
    (alone,) = call(place, "Compare", asked)
    assert alone["parameters"]["truncated"]
    assert 100 < len(alone["parameters"]["diff"]["files"]) < 1206
    mine = place.run("diff", "--stat", large.name, "--from", "1", "--to", "0", prefix=MEMBER, check=False)
    assert "1206 paths differ" in mine.stdout


def lookers(place: Place) -> list[int]:
    """The processes that look for the daemon."""
    assert place.daemon is not None
    children = Path(f"/proc/{place.daemon.pid}/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]


def test_a_client_that_goes_away_takes_its_look_with_it_and_others_do_not_wait(
    place: Place, large: Service
) -> None:
    with socket.socket(socket.AF_UNIX) as stream:
        # Root's, so that it has no turn to wait for.
        stream.connect(str(place.runtime / schema.SOCKET))
        asked = {"service": large.name, "before": "none"}
        stream.sendall(
            json.dumps({"method": "io.confext.Watcher.Compare", "parameters": asked, "more": True}).encode()
            + b"\0"
        )
        until(lambda: lookers(place))
        os.kill(lookers(place)[0], signal.SIGSTOP)
        begun = time.monotonic()
        assert large.status()["layers"][0]["version"] == "1.4"
        assert time.monotonic() - begun < 20
    until(lambda: not lookers(place))


def test_a_look_that_is_killed_is_said(place: Place, large: Service) -> None:
    words = words_of(place, "Compare", {"service": large.name, "before": "none"}, True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as client:
        until(lambda: lookers(place))
        os.kill(lookers(place)[0], signal.SIGKILL)
        out, _ = client.communicate()
    error = json.loads(out.splitlines()[-1])
    assert "the process that looked" in error["parameters"]["reason"]
    assert place.run("origin", large.name, "open", prefix=MEMBER).stdout


# In the place of trace_program.py's own: an answer without an end.
ENDLESS = """
from watcher.control import trace_program
def answer(settings, asked, say):
    while True:
        say(b"+", "x" * (1 << 20))
trace_program.answer = answer
trace_program.main()
"""


def test_an_answer_has_an_end(tmp_path: Path) -> None:
    order = json.dumps({"settings": {}, "asked": {}})
    with open(tmp_path / "answer", "w+b") as answer:
        subprocess.run([sys.executable, "-c", ENDLESS], input=order, stdout=answer, text=True, check=True)
        answer.seek(0)
        assert os.fstat(answer.fileno()).st_size < 34 << 20
        with pytest.raises(Failed, match="it is more than 32 MiB: have root ask"):
            for _, is_last in pieces(answer):
                assert not is_last


# It takes nothing of what it has asked for.
HANG = """
import json, socket, sys, time
stream = socket.socket(socket.AF_UNIX)
stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
stream.connect(sys.argv[1])
asked = {"service": sys.argv[2], "before": "none"}
order = {"method": "io.confext.Watcher.Compare", "parameters": asked, "more": True}
stream.sendall(json.dumps(order).encode() + b"\\0")
time.sleep(600)
"""


def test_members_that_take_nothing_are_in_the_way_of_nobody(place: Place, large: Service) -> None:
    hanging = []
    try:
        for uid in range(4701, 4706):
            member = ("setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={GROUP}")
            order = (sys.executable, "-Ic", HANG, str(place.runtime / schema.SOCKET), large.name)
            hanging.append(subprocess.Popen([*member, *order]))
        until(lambda: lookers(place))
        time.sleep(1)
        for words, prefix in ((["status"], AS_NOBODY), (["origin"], MEMBER), (["diff"], MEMBER)):
            begun = time.monotonic()
            assert "web 1.4" in place.run(*words, large.name, prefix=prefix).stdout
            assert time.monotonic() - begun < 20, words
    finally:
        for one in hanging:
            one.kill()
            one.wait()
    until(lambda: not lookers(place))
