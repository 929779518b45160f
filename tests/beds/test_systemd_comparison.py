# SPDX-License-Identifier: LGPL-2.1-or-later
"""What COMPARISON.md says of path units, of `systemctl reload` and of this program is what they do, on systemd 262.

Three services run the same program. `files` has a plain file in the host's `/etc`, and a path unit that reloads it.
`image` has `ExtensionImages=` with versions; whoever deploys types `systemctl reload`, which picks the newest. `ours`
has a `.confext.d/`. All have the same check: the first two in `ExecReload=`, before the service is told, as
`nginx -s reload` reads the configuration first.

A cell is made of two looks: what the service runs on some time after the drop, and what a restart gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from beds import site
from beds.bed import Bed
from beds.host import UNITS, Host
from support import CHECKOUT, needs

pytestmark = [needs.bed, needs.tool("mksquashfs")]

SIDES = ("files", "image", "ours")
Found = dict[str, str]
"""What came of it for each side, in the words of COMPARISON.md."""

BESIDE = "/etc/renewed"
# Loads its configuration when it starts and when it is told to, and writes down which. "down": it ends; "stuck": its
# reload never ends. What does not end with "end" it cannot read: it keeps what it has, or does not start, as nginx.
# Loading takes 0.4 s.
PROGRAM = """
import os, signal, socket, sys, time
name, path = sys.argv[1:]
def load(*signal_and_frame):
    with open(path) as file:
        words = file.read().split()
    if words[-1:] != ["end"]:
        return bool(signal_and_frame)
    with open(f"/srv/cmp/{name}.loaded", "a") as file:
        file.write(" ".join(words) + chr(10))
    if "down" in words:
        os._exit(7)
    time.sleep(0.4)
    if "stuck" not in words:
        open(f"/srv/cmp/{name}.done", "w").close()
    return True
signal.signal(signal.SIGHUP, load)
if not load():
    sys.exit("cannot read it")
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect(os.environ["NOTIFY_SOCKET"])
    notify.send(b"READY=1")
while True:
    signal.pause()
"""
TELL = (
    "rm -f /srv/cmp/%p.done; kill -HUP $MAINPID;"
    " until [ -e /srv/cmp/%p.done ]; do kill -0 $MAINPID || exit 1; sleep 0.02; done"
)
UNIT = """[Unit]
StartLimitBurst=3
[Service]
Type=notify
ExecStart=/usr/bin/python3 -ISB /srv/cmp/program.py %p {path}
{check}
ExecReload=/bin/sh -c '{tell}'
Restart=on-failure
RestartSec=100ms
TimeoutStartSec=4
[Install]
WantedBy=multi-user.target
[Service]
{more}
"""
CHECK = "/bin/grep -q end$ {path}"


class Three:
    """The three services in one bed."""

    def __init__(self, host: Host) -> None:
        self.host, self.bed = host, host.bed
        self._version = 0

    def set_up(self) -> None:
        bed = self.bed
        bed.run(["mkdir", "-p", "/srv/cmp", "/etc/files", "/srv/image/web.raw.v"])
        bed.path("/srv/cmp/program.py").write_text(PROGRAM)
        paths = {"files": "/etc/files/web.conf", "image": "/etc/web.conf", "ours": "/etc/web.conf"}
        more = {
            "files": "",
            "image": "ExtensionImages=/srv/image/web.raw.v\n[X-Confext]\nEnabled=no",
            "ours": f"[X-Confext]\nCheck={CHECK.format(path='/etc/web.conf')}",
        }
        for side, path in paths.items():
            check = "" if side == "ours" else f"ExecReload={CHECK.format(path=path)}"
            text = UNIT.format(path=path, check=check, tell=TELL, more=more[side])
            self.host.unit(f"{side}.service", text, takes_part=side == "ours")
        reload = "[Service]\nType=oneshot\nExecStart=/usr/bin/systemctl reload files.service\n"
        bed.path(f"{UNITS}/files-reload.service").write_text(reload)
        bed.path(f"{UNITS}/files-reload.path").write_text(
            "[Path]\nPathChanged=/etc/files/web.conf\nUnit=files-reload.service\n[Install]\nWantedBy=paths.target\n"
        )
        bed.path("/etc/web.conf").write_text("version-0 end\n")  # the host's own, below any image
        self.host.systemctl("daemon-reload")
        self.host.watch()
        for side in SIDES:
            self.drop(side, self.version(), told=False)
        self.host.systemctl("enable", "--now", "files-reload.path", *SIDES)
        self.bed.run(["confext-watcher", "wait", "--timeout", "30", "ours", f"web_{self._version}.raw"])

    def version(self, *words: str) -> str:
        """The content of a new version."""
        self._version += 1
        return " ".join([f"version-{self._version}", *words, "end"])

    def drop(self, side: str, text: str, *, part: int | None = None, told: bool = True) -> None:
        """Deploy a version as people do: copy it in place; for `image`, `systemctl reload` is the next line.

        Args:
            part: how many bytes of it come; the connection breaks then.
            told: `image` gets its `systemctl reload`.
        """
        if side == "files":
            self.bed.path("/etc/files/web.conf").write_bytes(f"{text}\n".encode()[:part])
            return
        name = f"web_{self._version}.raw"
        data = self.host.image(name.removesuffix(".raw"), {"web.conf": f"{text}\n"}).read_bytes()[:part]
        if side == "ours":
            place = self.host.confext_dir("ours.service") / "web.raw.v"
            place.mkdir(exist_ok=True)
        else:
            place = self.bed.path("/srv/image/web.raw.v")
        (place / name).write_bytes(data)
        if side == "image" and told:
            self.bed.run(["systemctl", "reload", "--no-block", "image"], check=False)

    def loaded(self, side: str) -> list[str]:
        """What it has loaded, first to last; a version each."""
        return self.bed.run(["sh", "-c", f"cat /srv/cmp/{side}.loaded"], check=False).stdout.splitlines()

    def runs(self, side: str) -> bool:
        return self.bed.property(f"{side}.service", "ActiveState") in ("active", "reloading")

    def stands(self, side: str, text: str) -> str:
        """Which it has loaded last: "it", "half of it" or "the one before"; or "nothing": it does not run."""
        if not self.runs(side):
            return "nothing"
        last = self.loaded(side)[-1:]
        if last == [text]:
            return "it"
        return "half of it" if last and text.startswith(last[0]) else "the one before"

    def found(self, texts: Found, seconds: float) -> Found:
        """What came of a drop for each, and of a restart after it."""
        time.sleep(seconds)  # what may happen after a drop is to have happened; there is no end to wait for
        running = {side: self.stands(side, text) for side, text in texts.items()}
        units = [f"{side}.service" for side in texts]
        self.bed.run(["systemctl", "reset-failed", *units], check=False)
        self.bed.run(["systemctl", "restart", *units], check=False)
        time.sleep(1)
        return {
            side: f"runs on {running[side]}; a restart: {self.stands(side, text)}"
            for side, text in texts.items()
        }

    def mend(self) -> None:
        """A good version for each, and all as new."""
        text = self.version()
        for side in SIDES:
            self.drop(side, text, told=False)
        helpers = ["files-reload.path", "files-reload.service"]
        units = [f"{side}.service" for side in SIDES]
        self.bed.run(["systemctl", "reset-failed", *units, *helpers], check=False)
        self.bed.run(["confext-watcher", "wait", "--timeout", "30", "ours", f"web_{self._version}.raw"])
        self.bed.run(["systemctl", "restart", *units, "files-reload.path"])


@pytest.fixture
def three() -> Iterator[Three]:
    with Bed("262") as bed, site.host(bed) as host:
        made = Three(host)
        made.set_up()
        yield made


def bad_drop(three: Three, words: str, seconds: float) -> Found:
    text = three.version(*words.split())
    text = text.removesuffix(" end") if words == "broken" else text
    for side in SIDES:
        three.drop(side, text)
    return three.found(dict.fromkeys(SIDES, text), seconds)


def broken_off(three: Three) -> Found:
    text = three.version()
    for side in SIDES:
        three.drop(side, text, part=9 if side == "files" else 300)
    return three.found(dict.fromkeys(SIDES, text), 2)


def in_a_row(three: Three) -> Found:
    """Of 10 drops, one a second, how many were loaded, and whether the last one was."""
    texts = []
    for _ in range(10):
        texts.append(three.version())
        for side in SIDES:
            three.drop(side, texts[-1])
        time.sleep(0.9)
    time.sleep(2)
    seen = {side: [text for text in texts if text in three.loaded(side)] for side in SIDES}
    return {
        side: f"{len(some)} of 10, the last one {'too' if texts[-1] in some else 'not'}"
        for side, some in seen.items()
    }


def two(three: Three) -> Found:
    """The second while the service still loads the first."""
    second = {}
    for side in SIDES:
        three.drop(side, three.version())
        time.sleep(0.25)
        second[side] = three.version()
        three.drop(side, second[side])
    time.sleep(2)
    return {
        side: f"runs on {'the second' if three.loaded(side)[-1] == text else 'the first'}"
        for side, text in second.items()
    }


def renewed(three: Three) -> Found:
    """What each sees of a file of the host's that a rename has replaced."""
    three.bed.path(BESIDE).write_text("old\n")
    three.bed.run(["systemctl", "restart", *SIDES])
    for side in SIDES:
        three.host.see(f"{side}.service", BESIDE)
    three.bed.run(["sh", "-c", f"echo new >{BESIDE}.new; mv {BESIDE}.new {BESIDE}"])
    time.sleep(1)
    return {side: f"sees the {three.host.see(f'{side}.service', BESIDE)} one" for side in SIDES}


def killed(three: Three) -> Found:
    """What deploys is killed once the file is there, by SIGKILL: of `image`, before `systemctl reload` is typed."""
    text = three.version()
    for side in SIDES:
        three.drop(side, text, told=False)
    time.sleep(0.1)
    for unit in ("files-reload", "confext-watcher"):
        three.bed.run(["systemctl", "kill", "--signal=KILL", unit], check=False)
    return three.found(dict.fromkeys(SIDES, text), 4)


SITUATIONS: dict[str, Callable[[Three], Found]] = {
    "an upload breaks off half-way": broken_off,
    "the check would refuse it": lambda three: bad_drop(three, "broken", 2),
    "the service goes down on it": lambda three: bad_drop(three, "down", 4),
    "its reload never ends": lambda three: bad_drop(three, "stuck", 12),
    "two drops within a second": two,
    "10 drops in 10 seconds": in_a_row,
    "a file of the host is replaced by rename": renewed,
    "what deploys is killed": killed,
}
REBOOT = "a reboot after a drop it goes down on"


def cells() -> dict[str, Found]:
    """What COMPARISON.md has measured."""
    measured = (CHECKOUT / "COMPARISON.md").read_text().partition("## Measured\n")[2].partition("\n## ")[0]
    lines = [line for line in measured.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(SIDES, row[1:], strict=True)) for row in rows[1:]}


@pytest.mark.limit(400)
def test_the_table_says_what_is_measured(three: Three) -> None:
    found = {}
    for situation, measure in SITUATIONS.items():
        found[situation] = measure(three)
        print(situation, found[situation])
        three.mend()
    bad = three.version("down")
    for side in SIDES:
        three.drop(side, bad)
    time.sleep(4)
    three.bed.reboot()
    time.sleep(4)
    found[REBOOT] = {side: f"runs on {three.stands(side, bad)}" for side in SIDES}
    assert cells() == found
