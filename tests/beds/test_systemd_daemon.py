# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole program as a service on real systemd: what a dropped file does, and what never happens."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from beds.bed import Bed
from beds.host import SECONDS, SLEEP, UNITS, Entry, Host, Journal, install
from support import needs
from watcher.managers.systemd.unit_files import DROPIN
from watcher.mounts.table import Table

pytestmark = needs.bed

# Tells what it sees at each step of its life; the running process is asked by nsenter.
TALKS = """[Service]
Type=notify
NotifyAccess=all
ExecStartPre=/bin/sh -c 'cat /etc/web.txt >/run/seen-pre; :'
ExecStart=/bin/sh -c 'cat /etc/web.txt >/run/seen-start; systemd-notify --ready; exec sleep infinity'
ExecReload=/bin/sh -c 'cat /etc/web.txt >/run/seen-reload; :'
"""
VERSIONS = "web.raw.v"


@pytest.fixture
def host(bed: Bed) -> Iterator[Host]:
    install(bed)
    with contextlib.ExitStack() as stack:
        yield Host(bed, stack)


def drop_version(host: Host, unit: str, version: str, text: str | None = None) -> None:
    source = host.image(f"web_{version}", {"web.txt": text or version})
    host.drop(source, unit, f"{VERSIONS}/{source.name}")


def seen(host: Host, step: str) -> str:
    path = host.bed.path(f"/run/seen-{step}")
    return path.read_text().strip() if path.exists() else ""


def test_a_dropped_file_reaches_the_running_service(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    drop_version(host, "talks.service", "1")
    journal.applied("talks.service")
    assert (host.see("talks.service", "/etc/web.txt"), seen(host, "reload")) == ("1", "1")
    pid = host.main_pid("talks.service")
    drop_version(host, "talks.service", "2")
    assert "web 1 -> 2" in journal.applied("talks.service")["MESSAGE"]
    assert (host.see("talks.service", "/etc/web.txt"), seen(host, "reload")) == ("2", "2")
    assert host.main_pid("talks.service") == pid
    assert not host.bed.path("/etc/web.txt").exists()


def test_every_process_of_a_unit_shows_the_last_accepted_stack(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    drop_version(host, "talks.service", "1")
    journal.applied("talks.service")
    drop_version(host, "talks.service", "2")
    journal.applied("talks.service")
    # Something that was never accepted: it must not be seen by anything, whoever runs.
    whole = host.image("web_3", {"web.txt": "3", "noise": os.urandom(50_000).hex()}).read_bytes()
    (host.confext_dir("talks.service") / VERSIONS / "web_3.raw").write_bytes(whole[:20_000])
    journal.outcome("talks.service", "incomplete")
    for watcher in ("running", "away"):
        if watcher == "away":
            host.no_watcher()
        for verb in ("restart", "reload"):
            host.bed.run(["sh", "-c", "rm -f /run/seen-*"])
            host.systemctl(verb, "talks.service")
            steps = ("pre", "start") if verb == "restart" else ("reload",)
            views = [seen(host, step) for step in steps] + [host.see("talks.service", "/etc/web.txt")]
            assert views == ["2"] * len(views), (watcher, verb)
    host.assert_no_watcher()


def test_what_was_dropped_while_the_watcher_was_away_is_applied_and_nothing_else_is_touched(
    host: Host,
) -> None:
    host.units({name: TALKS.replace("/run/seen", f"/run/{name}") for name in ("one.service", "two.service")})
    host.watch()
    journal = host.journal()
    for name in ("one.service", "two.service"):
        host.systemctl("start", name)
        drop_version(host, name, "1")
        journal.applied(name)
    host.systemctl("kill", "--signal=KILL", "confext-watcher")
    host.systemctl("stop", "confext-watcher")
    host.bed.path("/run/two.service-reload").unlink()
    assert host.see("one.service", "/etc/web.txt") == "1"
    drop_version(host, "one.service", "2")
    host.systemctl("start", "confext-watcher")
    journal.applied("one.service")
    assert host.see("one.service", "/etc/web.txt") == "2"
    assert not host.bed.path("/run/two.service-reload").exists()
    assert host.see("two.service", "/etc/web.txt") == "1"


def test_a_service_waits_for_what_was_dropped_before_its_first_start(host: Host) -> None:
    host.unit("talks.service", TALKS)
    drop_version(host, "talks.service", "1")
    host.systemctl("daemon-reload")
    host.stack.callback(host.bed.run, ["sh", "-c", "rm -rf /var/lib/confext-watcher/*"])
    host.stack.callback(host.systemctl, "stop", "confext-watcher")
    host.systemctl("start", "talks.service")
    assert host.bed.property("confext-watcher", "ActiveState") == "active"
    assert (seen(host, "pre"), host.see("talks.service", "/etc/web.txt")) == ("1", "1")


def test_the_watcher_is_up_before_what_a_service_still_does_with_its_stack(host: Host) -> None:
    """Nothing that a service does keeps it from being ready: longer than TimeoutStartSec=, and it never would be."""
    host.unit("slow.service", SLEEP + "ExecReload=/bin/sh -c 'mkfifo /run/slow; cat /run/slow'\n")
    host.watch()
    host.systemctl("start", "slow.service")
    host.systemctl("stop", "confext-watcher")
    drop_version(host, "slow.service", "1")
    host.stack.callback(host.bed.run, ["rm", "-f", "/run/slow"])
    journal = host.journal()
    host.systemctl("start", "confext-watcher")
    assert host.bed.property("confext-watcher", "ActiveState") == "active"
    host.bed.run(["sh", "-c", "until [ -p /run/slow ]; do sleep 0.1; done; echo go >/run/slow"])
    assert "reload done" in journal.applied("slow.service")["MESSAGE"]


def test_removal_goes_back_and_to_the_original_at_last(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    for version in ("1", "2"):
        drop_version(host, "talks.service", version)
        journal.applied("talks.service")
    directory = host.confext_dir("talks.service") / VERSIONS
    (directory / "web_2.raw").unlink()
    journal.applied("talks.service")
    assert host.see("talks.service", "/etc/web.txt") == "1"
    host.bed.run(["rm", "-r", f"{UNITS}/talks.service.confext.d"])
    journal.applied("talks.service")
    assert host.see("talks.service", "/etc/web.txt") == ""
    assert host.see("talks.service", "/etc/hostname") == host.bed.name


def test_an_entry_more_brings_one_daemon_reload_and_a_version_more_brings_none(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    drop_version(host, "talks.service", "1")
    journal.applied("talks.service")
    drop_in = host.bed.path(f"/run/systemd/generator/talks.service.d/{DROPIN}")
    before = drop_in.stat().st_mtime_ns
    drop_version(host, "talks.service", "2")
    journal.applied("talks.service")
    assert drop_in.stat().st_mtime_ns == before
    host.drop(host.image("more", {"more.txt": "more"}), "talks.service")
    journal.applied("talks.service")
    assert drop_in.stat().st_mtime_ns != before
    host.systemctl("restart", "talks.service")
    assert host.see("talks.service", "/etc/more.txt") == "more"
    assert host.see("talks.service", "/etc/web.txt") == "2"


def test_what_a_unit_declares_itself_goes_the_same_way(host: Host) -> None:
    host.bed.path("/srv/declared.raw.v").mkdir(parents=True)
    host.stack.callback(host.bed.run, ["rm", "-r", "/srv/declared.raw.v"])
    host.unit("declares.service", TALKS + "ExtensionImages=-/srv/declared.raw.v\n", takes_part=False)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "declares.service")
    for version in ("1", "2"):
        source = host.image(f"declared_{version}", {"web.txt": version})
        host.bed.path(f"/srv/declared.raw.v/{source.name}").write_bytes(source.read_bytes())
        journal.applied("declares.service")
        assert host.see("declares.service", "/etc/web.txt") == version
    host.systemctl("reload", "declares.service")
    assert seen(host, "reload") == "2"


def eventually(condition: Callable[[], bool], what: str, said: Callable[[], object] = lambda: "") -> None:
    """Wait for what no entry of the journal announces."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} {said()}"
        time.sleep(0.1)


SANDBOX = """
InaccessiblePaths=/etc/hidden
BindReadOnlyPaths=/etc/os-release:/etc/bound
ReadOnlyPaths=/etc/app
TemporaryFileSystem=/etc/temporary
"""


def is_systemds(host: Host, unit: str) -> bool:
    """Whether it was systemd that made the stack which a unit's main process shows."""
    (row,) = (row for row in host.mounts(unit) if row[4] == "/etc")
    return "lowerdir=/run/systemd/unit-extensions/" in row[-1]


@pytest.mark.parametrize("where", ["dropped", "declared"])
def test_directory_trees_go_the_same_way_and_systemd_starts_on_their_slots(host: Host, where: str) -> None:
    host.bed.run(["mkdir", "-p", "/srv/trees/web.v"])
    host.stack.callback(host.bed.run, ["rm", "-r", "/srv/trees"])
    unit, place = TALKS, f"{UNITS}/trees.service.confext.d"
    if where == "declared":
        unit, place = unit + "ExtensionDirectories=-/srv/trees/plain -/srv/trees/web.v\n", "/srv/trees"
    host.unit("trees.service", unit, takes_part=where == "dropped")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "trees.service")
    host.drop_tree(host.tree("plain", {"plain.txt": "plain", "web.txt": "beneath"}), f"{place}/plain")
    journal.applied("trees.service")
    host.bed.run(["mkdir", "-p", f"{place}/web.v"])
    for version in ("1", "2"):
        host.drop_tree(host.tree(f"web_{version}", {"web.txt": version}), f"{place}/web.v/web_{version}")
        journal.applied("trees.service")

    def shows() -> None:
        assert [host.see("trees.service", f"/etc/{name}.txt") for name in ("plain", "web")] == ["plain", "2"]

    shows()
    assert not is_systemds(host, "trees.service")
    host.no_watcher()
    for verb, step in (("restart", "start"), ("reload", "reload")):
        host.systemctl(verb, "trees.service")
        shows()
        assert seen(host, step) == "2" and is_systemds(host, "trees.service")


def boxed(host: Host) -> None:
    """What `SANDBOX` needs on the host."""
    prepare = "mkdir -p /etc/app /etc/temporary; echo secret >/etc/hidden; touch /etc/bound"
    host.bed.run(["sh", "-c", prepare])
    host.stack.callback(host.bed.run, ["sh", "-c", "rm -r /etc/app /etc/temporary /etc/hidden /etc/bound"])


def in_force(host: Host, unit: str) -> None:
    """All of `SANDBOX` is."""
    assert host.see(unit, "/etc/hidden") == ""
    assert "ID=" in host.see(unit, "/etc/bound")
    flags = {row[4]: row[5].split(",") for row in host.mounts(unit)}
    assert "ro" in flags["/etc"] and "ro" in flags["/etc/app"] and "/etc/temporary" in flags


def on_etc(host: Host, unit: str) -> tuple[int, dict[str, tuple[str, ...]]]:
    """The mount that a unit's main process sees on `/etc`: its ID, and the flags of all that is there, by path."""
    table = Table("".join(" ".join(row) + "\n" for row in host.mounts(unit)))
    return table.top.id, {row.point: row.options for row in (table.top, *table.above(table.top))}


class Declared:
    """Directories that a unit itself says it has images from (`UNIT`), in `.v/` form."""

    UNIT = "ExtensionImages=-/srv/lower.raw.v -/srv/upper.raw.v\n"

    def __init__(self, host: Host) -> None:
        self._host = host
        host.bed.run(["mkdir", "/srv/lower.raw.v", "/srv/upper.raw.v"])
        host.stack.callback(host.bed.run, ["rm", "-r", "/srv/lower.raw.v", "/srv/upper.raw.v"])

    def drop(self, name: str, version: str) -> None:
        """Both have `web.txt`, and each a file of its own."""
        source = self._host.image(f"{name}_{version}", {"web.txt": name, f"{name}.txt": version})
        shutil.copyfile(source, self._host.bed.path(f"/srv/{name}.raw.v/{source.name}"))


def test_one_drop_is_one_swap_that_no_reload_by_hand_undoes_or_repeats(host: Host) -> None:
    """systemd 262 refreshes what is in `.v/` form: upside down, and without the mounts of the sandbox."""
    boxed(host)
    images = Declared(host)
    for name in ("lower", "upper"):
        images.drop(name, "1")
    host.unit("boxed.service", TALKS + "ProtectSystem=full\n" + Declared.UNIT + SANDBOX, takes_part=False)
    host.watch()
    host.systemctl("start", "boxed.service")

    def shows(lower: str) -> None:
        shown = [host.see("boxed.service", f"/etc/{name}.txt") for name in ("web", "lower", "upper")]
        assert shown == ["upper", lower, "1"]
        in_force(host, "boxed.service")

    shows("1")
    started, flags = on_etc(host, "boxed.service")
    journal = host.journal()
    images.drop("lower", "2")
    journal.applied("boxed.service")
    shows("2")
    swapped, kept = on_etc(host, "boxed.service")
    assert swapped != started and kept == flags
    for _ in range(2):
        host.systemctl("reload", "boxed.service")
        assert seen(host, "reload") == "upper"
        shows("2")
        assert on_etc(host, "boxed.service") == (swapped, flags)
    host.systemctl("restart", "boxed.service")
    shows("2")
    assert on_etc(host, "boxed.service")[1] == flags
    images.drop("lower", "3")
    journal.applied("boxed.service")
    shows("3")
    assert [one.get("CONFEXT_OUTCOME") for one in journal.seen].count("applied") == 2


class Guests:
    """Services on a host that merges confexts of its own into its `/etc`, with systemd-confext.

    That makes `/etc` read-only, so what the services have is declared from elsewhere.
    """

    UNIT = (
        "[Service]\nExecStart=/bin/sleep infinity\nExecReload=/bin/sh -c 'echo >>/run/reloads-%n'\n"
        "ExtensionImages=-/srv/guest.raw.v\nExtensionImages=-/srv/static.raw\n"
    )
    NAMES = ("guest-plain.service", "guest-full.service")
    FOLLOWED = "the host's /etc has changed, same stack applied anew in"

    def __init__(self, host: Host) -> None:
        self.host = host
        boxed(host)
        host.bed.run(["mkdir", "-p", "/var/lib/confexts", "/srv/guest.raw.v"])
        remove = "rm -rf /var/lib/confexts /srv/guest.raw.v /srv/static.raw /run/reloads-*"
        host.stack.callback(host.bed.run, ["sh", "-c", remove])
        more = ("", "ProtectSystem=full\n")
        texts = {name: self.UNIT + SANDBOX + one for name, one in zip(self.NAMES, more, strict=True)}
        host.units(texts, takes_part=False)
        shutil.copyfile(host.image("static", {"static.txt": "s"}), host.bed.path("/srv/static.raw"))
        self.drop("1")
        host.stack.callback(host.bed.run, ["sh", "-c", "systemd-confext unmerge; :"])

    def start(self) -> None:
        """Start them, and wait until what they were started on has proved good."""
        self.host.watch()
        self.journal = self.host.journal()
        self.host.systemctl("start", *self.NAMES)
        for _ in self.NAMES:
            self.journal.until(lambda entry: "started well" in entry["MESSAGE"])

    def drop(self, version: str) -> None:
        source = self.host.image(f"guest_{version}", {"guest.txt": version})
        shutil.copyfile(source, self.host.bed.path(f"/srv/guest.raw.v/{source.name}"))

    def host_has(self, text: str, verb: str) -> None:
        """The host's own `/etc` gets a file with this text."""
        target = self.host.bed.path("/var/lib/confexts/wide.raw")
        # Not into the file that is mounted.
        new = shutil.copyfile(self.host.image("wide", {"wide.txt": text}), target.with_name(".new"))
        new.rename(target)
        self.host.bed.run(["systemd-confext", verb])

    def applied(self, words: str) -> None:
        """All of them say that next."""
        self.journal.all_applied(self.NAMES, words)

    def show(self, version: str, host: str) -> None:
        """They have their own stack on what the host has, and all that their sandbox has there."""
        for name in self.NAMES:
            shown = [self.host.see(name, f"/etc/{file}.txt") for file in ("guest", "static", "wide")]
            assert shown == [version, "s", host], name
            in_force(self.host, name)

    def reloads(self) -> list[int]:
        files = (self.host.bed.path(f"/run/reloads-{name}") for name in self.NAMES)
        return [file.read_text().count("\n") for file in files]


def test_what_the_host_has_merged_itself_stays_beneath_the_stack(host: Host) -> None:
    guests = Guests(host)
    guests.host_has("host", "merge")
    guests.start()
    guests.show("1", "host")
    guests.drop("2")
    guests.applied("guest 1 -> 2 applied in")
    guests.show("2", "host")
    for verb in ("reload", "restart", "reload"):
        host.systemctl(verb, *Guests.NAMES)
        guests.show("2", "host")


def test_what_the_host_merges_later_is_followed_without_a_drop(host: Host) -> None:
    guests = Guests(host)
    guests.start()
    guests.show("1", "")
    steps = [("a", "merge"), ("b", "refresh"), ("c", "refresh"), ("", "unmerge"), ("d", "merge")]
    for text, verb in steps:
        guests.host_has(text, verb)
        guests.applied(Guests.FOLLOWED)
        guests.show("1", text)
    # On a stack that systemd has made from what the host has now.
    host.systemctl("restart", *Guests.NAMES)
    guests.show("1", "d")
    guests.host_has("e", "refresh")
    guests.applied(Guests.FOLLOWED)
    guests.show("1", "e")
    # Where nothing has changed nothing happens, however often it is looked at.
    for verb in ("reload", "restart"):
        host.systemctl(verb, "confext-watcher")
    host.bed.run(["sh", "-c", "mount -t tmpfs none /mnt && umount /mnt"])
    guests.drop("2")
    guests.applied("guest 1 -> 2 applied in")
    guests.show("2", "e")
    assert guests.reloads() == [len(steps) + 1 + 1] * 2


def test_what_the_host_has_merged_while_nobody_was_looking_is_followed_too(host: Host) -> None:
    guests = Guests(host)
    guests.start()
    for text, made_by in (("a", "systemd"), ("b", "us")):
        host.systemctl("stop", "confext-watcher")
        guests.host_has(text, "merge" if made_by == "systemd" else "refresh")
        host.systemctl("start", "confext-watcher")
        guests.applied(Guests.FOLLOWED)
        guests.show("1", text)
    assert guests.reloads() == [2, 2]


def writable(host: Host, unit: str, path: str) -> bool:
    inside = ["nsenter", "--target", str(host.started(unit)), "--mount", "--root", "--"]
    return host.bed.run([*inside, "test", "-w", path], check=False).returncode == 0


def test_what_was_read_only_stays_so_on_a_stack_too(host: Host) -> None:
    settings = {"full": "ProtectSystem=full", "yes": "ProtectSystem=yes", "paths": "ReadOnlyPaths=/usr"}
    names = {f"guarded-{kind}.service": setting for kind, setting in settings.items()}
    host.units({name: SLEEP + "ExecReload=/bin/true\n" + setting + "\n" for name, setting in names.items()})
    host.watch()
    journal = host.journal()
    host.systemctl("start", *names)
    for name, setting in names.items():
        assert not writable(host, name, "/usr")
        assert writable(host, name, "/etc") is (setting != "ProtectSystem=full")
    for name in names:
        drop_version(host, name, "1")
        journal.applied(name)
    for _ in range(2):
        for name in names:
            assert host.see(name, "/etc/web.txt") == "1"
            assert not writable(host, name, "/usr/lib")
            assert not writable(host, name, "/usr/bin")
        host.systemctl("restart", *names)


def test_what_systemd_would_forget_keeps_a_unit_from_its_drop_in_but_not_from_its_stack(host: Host) -> None:
    host.bed.run(["sh", "-c", "mkdir -p /opt; touch /opt/secret"])
    host.stack.callback(host.bed.run, ["rm", "/opt/secret"])
    host.unit("hides.service", SLEEP + "ExecReload=/bin/cat /etc/web.txt\nTemporaryFileSystem=/opt\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "hides.service")
    drop_version(host, "hides.service", "1")
    journal.until(lambda entry: entry.get("CONFEXT_SERVICE") == "hides.service" and "web" in entry["MESSAGE"])
    host.systemctl("restart", "hides.service")
    pid = str(host.started("hides.service"))
    assert host.bed.run(["ls", f"/proc/{pid}/root/opt"]).stdout == ""


HARDENED = {
    "strict": "ProtectSystem=strict\nReadWritePaths=/etc/app\n",
    "full": "ProtectSystem=full\n",
    "private-users": "PrivateUsers=yes\n",
    "dynamic-user": "DynamicUser=yes\n",
    "private-devices": "PrivateDevices=yes\nProtectKernelTunables=yes\nNoNewPrivileges=yes\n",
    "protect-proc": "ProtectProc=invisible\nProcSubset=pid\nUser=nobody\n",
    "bind": "BindPaths=/etc/os-release:/etc/app/os-release\n",
    "credential": "LoadCredential=secret:/etc/os-release\nPrivateMounts=yes\n",
    "private-tmp": "PrivateTmp=yes\nProtectHome=yes\nPrivateIPC=yes\n",
}


def kept(host: Host, unit: str) -> object:
    """What the unit's own settings have done to `/etc` and with it, as its main process sees it."""
    looks: dict[str, Callable[[], object]] = {
        "strict": lambda: writable(host, unit, "/etc/app"),
        "bind": lambda: host.see(unit, "/etc/app/os-release"),
        "credential": lambda: host.see(unit, f"/run/credentials/{unit}/secret"),
        "private-users": lambda: host.bed.run(["cat", f"/proc/{host.main_pid(unit)}/uid_map"]).stdout,
        "dynamic-user": lambda: writable(host, unit, "/etc/app"),
    }
    look = looks.get(unit.removeprefix("hard-").removesuffix(".service"))
    return look() if look is not None else None


def test_services_as_people_harden_them(host: Host) -> None:
    host.bed.run(["sh", "-c", "mkdir -p /etc/app; touch /etc/app/os-release"])
    host.stack.callback(host.bed.run, ["rm", "-r", "/etc/app"])
    names = {f"hard-{how}.service": settings for how, settings in HARDENED.items()}
    host.units({name: SLEEP + "ExecReload=/bin/cat /etc/web.txt\n" + names[name] for name in names})
    host.watch()
    journal = host.journal()

    def drop(version: str) -> None:
        source = host.image(f"web_{version}", {"web.txt": version})
        for name in names:
            host.drop(source, name, f"{VERSIONS}/{source.name}")
        journal.all_applied(names)
        for name in names:
            assert host.see(name, "/etc/web.txt") == version

    host.systemctl("start", *names)
    mounts = {name: host.mounts(name) for name in names}
    first = {name: (kept(host, name), on_etc(host, name)[1]) for name in names}
    assert first["hard-strict.service"][0] is True and first["hard-dynamic-user.service"][0] is False
    assert "ID=" in str(first["hard-bind.service"][0]) and "ID=" in str(first["hard-credential.service"][0])
    for version in ("1", "2"):
        drop(version)
        for name, (before, flags) in first.items():
            assert kept(host, name) == before, name
            now = on_etc(host, name)[1]
            assert {"ro", "nosuid", "nodev"} <= set(now.pop("/etc")), name
            assert now == {path: flags[path] for path in flags if path.startswith("/etc/")}, name
    host.systemctl("restart", *names)
    restarted = {name: (kept(host, name), on_etc(host, name)[1]) for name in names}
    assert "nosuid" in restarted["hard-dynamic-user.service"][1]["/etc"]
    assert all("ro" in flags["/etc"] for _, flags in restarted.values())
    for name in names:
        assert host.see(name, "/etc/web.txt") == "2"
        # Nothing of the sandbox outside of /etc is lost; /usr is kept by its parts (sandbox_settings.py).
        after = {row[4] for row in host.mounts(name)}
        assert {row[4] for row in mounts[name] if elsewhere(row)} <= after, name
        if (
            name != "hard-strict.service"
        ):  # what ReadWritePaths= says of a part of its own overlay systemd overrules
            assert restarted[name][0] == first[name][0], name
    drop("3")
    assert {name: (kept(host, name), on_etc(host, name)[1]) for name in names} == restarted


def test_a_writable_path_shows_what_a_stack_brings_there_and_is_the_hosts_until_then(host: Host) -> None:
    host.bed.run(["mkdir", "/etc/app"])
    host.stack.callback(host.bed.run, ["rm", "-r", "/etc/app"])
    host.unit("writes.service", SLEEP + "ExecReload=/bin/true\n" + HARDENED["strict"])
    host.watch()
    journal = host.journal()
    host.systemctl("start", "writes.service")
    drop_version(host, "writes.service", "1")
    journal.applied("writes.service")
    inside = ["nsenter", "--target", str(host.started("writes.service")), "--mount", "--"]
    host.bed.run([*inside, "touch", "/etc/app/mine"])
    assert host.bed.path("/etc/app/mine").exists()
    host.drop(host.image("app", {"app/own.conf": "brought"}), "writes.service")
    journal.until(lambda entry: "/etc/app: the unit's mount there would hide" in entry["MESSAGE"])
    journal.applied("writes.service")
    for restarted in (False, True):
        if restarted:
            host.systemctl("restart", "writes.service")
        assert host.see("writes.service", "/etc/app/own.conf") == "brought"
        assert not writable(host, "writes.service", "/etc/app")


def elsewhere(row: list[str]) -> bool:
    # The credentials of another unit are mounted when that is started, the kernel's own when somebody looks at them.
    return not row[4].startswith(("/etc", "/usr", "/run/credentials", "/sys", "/dev/mqueue"))


ELSEWHERE = "ID=elsewhere\nVERSION_ID=1\n"


def make_root(host: Host) -> None:
    """/srv/root, a system that is another than the host, and has not much more than `SLEEP` needs."""
    make = """
        mkdir -p /srv/root && cd /srv/root
        mkdir -p etc proc dev run tmp var sys root usr/bin usr/lib usr/lib64
        ln -s usr/bin usr/lib usr/lib64 .
        libraries=$(ldd /usr/bin/sleep /usr/bin/cat | grep -o '/[^ :]*' | sort -u)
        cp --parents --dereference /usr/bin/sleep /usr/bin/cat $libraries .
        cat >etc/os-release
    """
    host.bed.run(["sh", "-e", "-c", make], input=ELSEWHERE)
    host.stack.callback(host.bed.run, ["rm", "-r", "/srv/root"])


def goes_by_its_own_release(host: Host, journal: Journal, unit: str) -> None:
    """What was made for its root gets in, what was made for the host does not, before a restart and after."""
    assert "elsewhere" in host.see(unit, "/etc/os-release")
    host_release = host.bed.path("/usr/lib/os-release").read_text()

    def drop(version: str, release: str) -> None:
        source = host.image(f"web_{version}", {"web.txt": version}, release=release)
        host.drop(source, unit, f"{VERSIONS}/{source.name}")

    for first in (1, 3):
        drop(str(first), ELSEWHERE)
        journal.applied(unit)
        drop(str(first + 1), host_release)
        assert "made for" in journal.outcome(unit, "refused")["MESSAGE"]
        assert host.see(unit, "/etc/web.txt") == str(first)
        host.systemctl("restart", unit)
        assert host.see(unit, "/etc/web.txt") == str(first)
        assert "elsewhere" in host.see(unit, "/etc/os-release")
    assert not host.bed.path("/srv/root/etc/web.txt").exists()


def test_a_root_image_has_its_own_etc_and_its_own_os_release(host: Host) -> None:
    make_root(host)
    host.bed.run(["mksquashfs", "/srv/root", "/srv/root.raw", "-quiet", "-no-progress", "-noappend"])
    host.stack.callback(host.bed.run, ["rm", "/srv/root.raw"])
    host.unit("imaged.service", SLEEP + "MountAPIVFS=yes\nRootImage=/srv/root.raw\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "imaged.service")
    goes_by_its_own_release(host, journal, "imaged.service")


def test_a_root_directory_has_its_own_etc_and_its_own_os_release(host: Host) -> None:
    make_root(host)
    host.unit("rooted.service", SLEEP + "MountAPIVFS=yes\nRootDirectory=/srv/root\n")
    host.watch()
    journal = host.journal()
    host.systemctl("start", "rooted.service")
    goes_by_its_own_release(host, journal, "rooted.service")


def test_a_service_in_the_hosts_namespace_is_never_touched_until_its_restart(host: Host) -> None:
    host.unit("plain.service", TALKS, takes_part=False)
    host.watch()
    host.systemctl("start", "plain.service")
    journal = host.journal()
    mounts = host.own_mounts()
    host.confext_dir("plain.service").mkdir()
    drop_version(host, "plain.service", "1")
    journal.outcome("plain.service", "needs-restart")
    drop_version(host, "plain.service", "2")
    assert host.own_mounts() == mounts
    host.systemctl("restart", "plain.service")
    assert host.see("plain.service", "/etc/web.txt") in ("1", "2")
    drop_version(host, "plain.service", "3")
    journal.until(lambda entry: "applied in" in entry["MESSAGE"])
    assert host.see("plain.service", "/etc/web.txt") == "3"
    outcomes = [entry.get("CONFEXT_OUTCOME") for entry in journal.said()]
    assert outcomes.count("needs-restart") == 1


def test_a_file_that_only_the_services_user_may_read_can_be_read_by_it(host: Host) -> None:
    unit = "[Service]\nUser=nobody\nExecStart=/bin/sleep infinity\nExecReload=/bin/cat /etc/private.txt\n"
    host.unit("private.service", unit)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "private.service")
    source = host.image("private", {"private.txt": "mine"}, mode={"private.txt": (65534, 0o600)})
    host.drop(source, "private.service")
    journal.applied("private.service")
    pid = str(host.main_pid("private.service"))
    as_nobody = ["nsenter", "--target", pid, "--mount", "--setuid", "65534", "--setgid", "65534", "--"]
    assert host.bed.run([*as_nobody, "cat", "/etc/private.txt"]).stdout.strip() == "mine"


def test_the_journal_has_the_fields_and_explains_them(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    drop_version(host, "talks.service", "1")
    journal.applied("talks.service")
    drop_version(host, "talks.service", "2")
    entry = journal.applied("talks.service")
    assert (entry["CONFEXT_IMAGE"], entry["CONFEXT_VERSION"]) == ("web", "2")
    assert len(entry["CONFEXT_DIGEST"]) == 64 and entry["CONFEXT_STACK"] != entry["CONFEXT_PREVIOUS"]
    assert int(entry["CONFEXT_SWAP_USEC"]) < int(entry["CONFEXT_TOTAL_USEC"])
    assert entry["OBJECT_SYSTEMD_UNIT"] == "talks.service" and entry["PRIORITY"] == "6"
    asked = host.bed.run(["journalctl", "CONFEXT_SERVICE=talks.service", "--output=json", "--lines=1"]).stdout
    assert json.loads(asked)["MESSAGE"] == entry["MESSAGE"]
    assert entry["MESSAGE"] in host.bed.journal("--unit=talks.service")
    assert "is in place for talks.service" in host.bed.journal("--unit=talks.service", "--catalog")


def test_a_reload_that_fails_is_told_with_its_output(host: Host) -> None:
    reload = "ExecReload=/bin/sh -c 'grep -q bad /etc/web.txt || exit 0; echo it is bad; exit 3'\n"
    host.unit("picky.service", SLEEP + reload)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "picky.service")
    drop_version(host, "picky.service", "1", "good")
    journal.applied("picky.service")
    drop_version(host, "picky.service", "2", "bad")
    entry = journal.until(lambda entry: entry.get("CONFEXT_OUTCOME") in ("failed", "rolled-back"))
    assert "exited with status 3" in entry["MESSAGE"]
    assert entry["CONFEXT_OUTPUT"].strip() == "it is bad"


def test_sigterm_leaves_every_service_its_stack(host: Host) -> None:
    host.unit("talks.service", TALKS)
    host.watch()
    journal = host.journal()
    host.systemctl("start", "talks.service")
    drop_version(host, "talks.service", "1")
    journal.applied("talks.service")
    host.bed.run(["systemctl", "kill", f"--signal={signal.SIGTERM.name}", "confext-watcher"])
    assert host.see("talks.service", "/etc/web.txt") == "1"


def test_the_watcher_reloads_its_settings_as_a_job(host: Host) -> None:
    host.watch()
    host.systemctl("reload", "confext-watcher")
    assert host.bed.property("confext-watcher", "ActiveState") == "active"


STORM = {
    "simple": "",
    "exec": "ProtectSystem=full\n",
    "notify": "NotifyAccess=all\n",
    "notify-reload": "NotifyAccess=all\nInaccessiblePaths=/etc/machine-id\n",
    "forking": "PrivateTmp=yes\n",
    "oneshot": "",
    "idle": "ProtectSystem=strict\n",
    "dbus": "BusName=org.example.Storm\n",
    "rooted": "Type=exec\nRootDirectory=/srv/root\nMountAPIVFS=yes\n",
}
"""Services of each `Type=`, and of one with a root of its own, with some of what makes a namespace larger."""


STORM_TREES = (
    "storm-exec.service",
    "storm-notify-reload.service",
    "storm-oneshot.service",
    "storm-rooted.service",
)
STORM_BUS = """<busconfig><policy user="root"><allow own="org.example.Storm"/></policy></busconfig>"""
STORM_DBUS = """
import signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection
bus = open_dbus_connection("SYSTEM")
bus.send_and_get_reply(message_bus.RequestName("org.example.Storm"))
signal.pause()
"""


def storm_unit(kind: str) -> str:
    reload = 'trap "systemd-notify --reloading; systemd-notify --ready" HUP; systemd-notify --ready'
    start = {
        "notify": "/bin/sh -c 'systemd-notify --ready; exec sleep infinity'",
        "notify-reload": f"/bin/sh -c '{reload}; while :; do sleep infinity & wait; done'",
        "forking": "/bin/sh -c 'sleep infinity & '",
        "oneshot": "/bin/sh -c 'cat /etc/web.txt >/run/storm-saw; sleep 0.2'",
        "dbus": "/usr/bin/python3 /root/storm.py",
    }.get(kind, "/bin/sleep infinity")
    count = "ExecStartPre=+/bin/sh -c 'echo %n >>/run/storm-starts'\n"
    if kind == "rooted":
        count = ""  # it has no shell
    service = f"Type={kind}\n" * (kind != "rooted") + STORM[kind]
    settings = "[X-Confext]\nSettleSec=0\n"
    return f"[Unit]\nStartLimitIntervalSec=0\n[Service]\n{service}{count}ExecStart={start}\n{settings}"


def storm_drop(host: Host, units: Sequence[str], version: int, *, last: bool) -> None:
    """Some of them get images, one over the other, some trees in versions; all of them the last image."""
    image = host.image(f"web_{version}", {"web.txt": str(version)})
    tree = host.tree(f"tree_{version}", {"tree.txt": str(version)})
    for unit in units:
        if unit in STORM_TREES and not last:
            host.bed.run(["mkdir", "-p", f"{UNITS}/{unit}.confext.d/tree.v"])
            host.drop_tree(tree, f"{UNITS}/{unit}.confext.d/tree.v/tree_{version}")
        else:
            host.drop(image, unit, "web.raw")


def last_words(host: Host, unit: str) -> str:
    """What a unit shows, and what was said of it."""
    said = host.bed.journal("--lines=15", "SYSLOG_IDENTIFIER=confext-watcher", f"CONFEXT_SERVICE={unit}")
    return f"{host.main_pid(unit)} {host.see(unit, '/etc/web.txt')!r}\n{said}"


def is_outcome(unit: str, entry: Entry) -> bool:
    return entry.get("CONFEXT_SERVICE") == unit and "CONFEXT_OUTCOME" in entry


@pytest.mark.limit(600)
def test_a_storm_of_starts_never_touches_the_hosts_etc(host: Host) -> None:
    make_root(host)
    host.stack.callback(host.bed.run, ["sh", "-c", "rm -f /run/storm-* /etc/dbus-1/system.d/storm.conf"])
    host.bed.path("/etc/dbus-1/system.d/storm.conf").write_text(STORM_BUS)
    host.bed.path("/root/storm.py").write_text(STORM_DBUS)
    host.systemctl("reload", "dbus")
    units = {f"storm-{kind}.service": storm_unit(kind) for kind in STORM}
    host.units(units)
    host.watch()
    journal = host.journal()
    mounts = host.own_mounts()
    last = 40
    for version in range(1, last + 1):
        # For one half of them while they are being started, for the other just after; and the next starts come as soon
        # as one has taken it.
        names = [*units]
        names = names[version % len(names) :] + names[: version % len(names)]
        restarting = host.bed.popen(["systemctl", "restart", *names])
        storm_drop(host, names[::2], version, last=version == last)
        assert restarting.wait(timeout=60) == 0, version
        storm_drop(host, names[1::2], version, last=version == last)
        journal.until(functools.partial(is_outcome, names[1]))
    starts = Counter(host.bed.path("/run/storm-starts").read_text().split())
    assert starts.total() >= 300, starts
    running = [unit for unit in units if unit != "storm-oneshot.service"]

    def shows_the_last(unit: str) -> bool:
        return host.see(unit, "/etc/web.txt") == str(last)

    for unit in running:
        said = functools.partial(last_words, host, unit)
        eventually(functools.partial(shows_the_last, unit), unit, said)
    swaps = Counter(one.get("CONFEXT_SERVICE") for one in journal.said() if "applied in" in one["MESSAGE"])
    assert set(swaps) >= set(running)

    def sees_the_last() -> bool:
        host.systemctl("restart", "storm-oneshot.service")
        return host.bed.path("/run/storm-saw").read_text().strip() == str(last)

    eventually(sees_the_last, "storm-oneshot.service")
    host.systemctl("restart", *running)
    assert all(map(shows_the_last, running))
    assert host.own_mounts() == mounts
    assert not host.bed.path("/etc/web.txt").exists() and not host.bed.path("/etc/tree.txt").exists()
    assert not host.bed.path("/srv/root/etc/web.txt").exists()
    assert host.bed.property("confext-watcher", "NRestarts") == "0"
