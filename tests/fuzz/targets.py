# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is fuzzed, and what is claimed of it.

A target takes bytes and returns, whatever they are: the exceptions that a parser documents are caught in it; anything
else is a finding. What a parser gives is within its bounds, and where there is a formatter, parsing what was formatted
gives the same again. That the work is linear is counted by `steps.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import varlink
from jeepney import HeaderFields, Message
from jeepney.low_level import Endianness, Header, MessageType

from watcher.cli import show
from watcher.control import conversation, server, transport
from watcher.control.client import Client
from watcher.images import hash_tree, signature, tries
from watcher.images.formats import btrfs, disk, erofs, ext4, gpt, verity
from watcher.images.formats.base import HEAD, Extent
from watcher.images.formats.crc32c import crc32c
from watcher.images.formats.probe import probe
from watcher.managers import cgroup
from watcher.managers import registration as registrations
from watcher.managers.systemd import dbus, drop_ins, ends, manager, sandbox_settings, systemd1
from watcher.managers.systemd.wire import Received
from watcher.model import Candidate, Event, Kind, Outcome, Refused, Sysext, Unsupported, shown
from watcher.mounts import table
from watcher.mounts.mountinfo import Mount, mounts
from watcher.records import ledger, schema
from watcher.records import state as records_state
from watcher.records.schema import CallError, PlannedChange, Quarantined, ServiceStatus
from watcher.resolve import release, vpick
from watcher.settings import config, signals, syntax, unit_names, values
from watcher.settings.config import Settings
from watcher.settings.os_release import parse_os_release
from watcher.settings.syntax import Assignment
from watcher.text import telling

CORPUS = Path(__file__).parent.parent / "corpus"


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        run: raises nothing but for a finding.
        words: what its inputs are made of.
    """

    name: str
    run: Callable[[bytes], None]
    words: tuple[bytes, ...]

    def corpus(self) -> list[Path]:
        """The inputs that are kept: seeds, and what was once a finding."""
        return sorted((CORPUS / self.name).iterdir())


TARGETS: dict[str, Target] = {}


def target(words: str) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Enters a function as a target under its own name.

    Args:
        words: separated by spaces; with Python's escapes.
    """
    found = tuple(word.encode().decode("unicode_escape").encode("latin-1") for word in words.split())

    def enter(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[run.__name__] = Target(run.__name__, run, found)
        return run

    return enter


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _fields(data: bytes, count: int) -> list[str]:
    """The input cut into texts at its NULs; the last gets the rest."""
    parts = [_text(part) for part in data.split(b"\0", count - 1)]
    return parts + [""] * (count - len(parts))


@contextlib.contextmanager
def only(*kinds: type[Exception]) -> Iterator[None]:
    """These exceptions may come, with one line for a person."""
    try:
        yield
    except kinds as error:
        assert type(error) in kinds or not isinstance(error, UnicodeError | RecursionError), repr(error)
        if isinstance(error, Refused | records_state.Damaged):
            assert str(error) and "\n" not in str(error), repr(str(error))


# --- images ---


@target(
    r"""
    hsqs sqsh EFI\x20PART \xe2\xe1\xf5\xe0 \x00\x00\x02\x00 \x04\x00\x00\x00
    \xff\xff\xff\xff\xff\xff\xff\xff \x1f\x8b \xfd7zXZ\x00 ustar \x53\xef _BHRfS_M
    """
)
def superblock(data: bytes) -> None:
    """squashfs, erofs, ext4, btrfs: said to be whole only where all that it claims is there."""
    for content in (data, _sealed(data)):
        fd = os.memfd_create("image", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            with only(Refused):
                found = probe(fd, len(content))
                assert found.format.name in ("squashfs", "erofs", "ext4", "btrfs")
                assert 96 <= found.end <= len(content)
                assert found.offset + found.size <= found.end
        finally:
            os.close(fd)


def _sealed(data: bytes) -> bytes:
    """With the checksum that a superblock should have: what lies behind it is to be tried too."""
    sealed = bytearray(data)
    if len(data) >= 1024 + 1024 and ext4.EXT4.recognises(data):
        sealed[1024 + 1020 : 1024 + 1024] = ext4.checksum(data).to_bytes(4, "little")
    elif len(data) >= HEAD and btrfs.BTRFS.recognises(data):
        sealed[(1 << 16) + 196 : (1 << 16) + 198] = bytes(2)
        made = crc32c(bytes(sealed[(1 << 16) + 32 : HEAD])) ^ 0xFFFFFFFF
        sealed[1 << 16 : (1 << 16) + 4] = made.to_bytes(4, "little")
    elif len(data) >= 1024 + 128:
        sealed[1024 + 4 : 1024 + 8] = erofs.checksum(data[:HEAD]).to_bytes(4, "little")
    return bytes(sealed)


@target(
    r"""
    EFI\x20PART \x00\x00\x01\x00 \x5c\x00\x00\x00 \x80\x00\x00\x00 \x00\x02\x00\x00 hsqs \x55\xaa \xee
    \xe3\xbc\x68\x4f\xcd\xe8\xb1\x4d\x96\xe7\xfb\xca\xf9\x84\xb7\x09 _\x00e\x00m\x00p\x00t\x00y\x00
    \xff\xff\xff\xff\xff\xff\xff\xff \x01\x00\x00\x00\x00\x00\x00\x00 \x00\x00\x00\x00\x00\x00\x00\x80
    """
)
def partition_table(data: bytes) -> None:
    """Partitions, hash tree and signature are within the file, in order and apart, whatever is said of them."""
    for content in (data, *(_with_checksums(data, sector) for sector in (512, 4096))):
        fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            head = content[:HEAD]
            if not gpt.recognises(head):
                continue
            with only(Refused, Sysext):
                table = gpt.read(fd, head, len(content))
                assert table.end <= len(content)
                in_order = sorted(table.partitions, key=lambda one: one.start)
                assert all(2 * table.sector < one.start < one.end < table.end for one in in_order)
                assert all(before.end <= after.start for before, after in itertools.pairwise(in_order))
                assert disk.root(table, "x86-64").partition in table.partitions
            with only(Refused, Sysext):
                found = probe(fd, len(content))
                assert found.offset + found.size <= found.end <= len(content)
                if found.brought is not None:
                    assert found.brought.offset + found.brought.size <= found.end
                    assert len(found.brought.root_hash) >= 16
        finally:
            os.close(fd)


def _with_checksums(data: bytes, sector: int) -> bytes:
    """With the checksums that a partition table should have: what lies behind them is to be tried too."""
    sealed = bytearray(data)
    for _ in range(2):  # the first header says where the second is
        for lba in (1, int.from_bytes(sealed[sector + 32 : sector + 40], "little")):
            at = lba * sector
            if at + 92 > len(sealed):
                continue
            size, count = (int.from_bytes(sealed[at + i : at + i + 4], "little") for i in (12, 80))
            array = int.from_bytes(sealed[at + 72 : at + 80], "little") * sector
            if count <= 256 and 92 <= size <= sector:
                sealed[at + 88 : at + 92] = zlib.crc32(sealed[array : array + count * 128]).to_bytes(
                    4, "little"
                )
                sealed[at + 16 : at + 20] = bytes(4)
                sealed[at + 16 : at + 20] = zlib.crc32(sealed[at : at + size]).to_bytes(4, "little")
    return bytes(sealed)


@target(
    r"""
    verity\x00\x00 \x01\x00\x00\x00 sha256 sha512 \x00\x02\x00\x00 \x00\x10\x00\x00 \x00\x00\x08\x00 \x20\x00
    \xff\xff\xff\xff\xff\xff\xff\xff \x00\x00\x00\x00\x00\x00\x00\x80
    """
)
def verity_superblock(data: bytes) -> None:
    """A hash tree is read within the bytes that are there, whatever it claims, and no random one is right."""
    fd = os.memfd_create("tree", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        tree, image = Extent(fd, 0, len(data)), Extent(fd, 0, len(data))
        with only(Refused):
            found = verity.read(tree, image.size)
            assert 0 < found.data_size <= image.size and 512 <= found.end <= tree.size
            below = [level.start + level.blocks for level in found.levels[1:]]
            assert [
                level.start for level in found.levels[:-1]
            ] == below  # the highest level comes first, no gaps
            hash_tree.verify(image, tree, data[: found.digest_size].ljust(found.digest_size, b"\0"))
            raise AssertionError("a root hash that nobody has computed is right")
    finally:
        os.close(fd)


@target(
    r"""
    {"rootHash":" ","signature":" "} 00112233445566778899aabbccddeeff MAA= null [ ] { \x00 \xff
    \x30\x80 \x30\x82 \x30\xff \x30\x00
    """
)
def signature_partition(data: bytes) -> None:
    """The content of a signature partition, or a signature by itself: what is taken has the form that it should."""
    with only(Refused):
        made = signature.parse(data)
        assert len(made.root_hash) >= 16 and made.signature
        assert len(made.signature) <= signature.SIGNATURE_MAX
    with only(Refused):
        signature.require_form(data)
        assert data[0] == 0x30 and len(data) <= signature.SIGNATURE_MAX


# --- extension-release ---


@target(
    r"""
    ID= VERSION_ID= ARCHITECTURE= CONFEXT_LEVEL= _any debian " ' \\ \\\n \n \x20 $ ` # \\\\\n
    """
)
def os_release(data: bytes) -> None:
    """os-release and extension-release files: what was read and is written down again is the same."""
    found = parse_os_release(_text(data))
    for key, value in found.items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key)
        assert len(value) <= len(data)
    again = "".join(f"{key}={_release_quoted(value)}\n" for key, value in found.items())
    assert parse_os_release(again) == found
    with only(Refused):
        release.match(found, {"ID": "debian", "VERSION_ID": "13"}, "x86-64")
    with only(Refused):
        release.match({"ID": "debian", "VERSION_ID": "13"}, found, "x86-64")


def _release_quoted(value: str) -> str:
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


@target(
    r"""
    extension-release. web _1.4 +3 .raw .confext.raw .v \x00 \n \xff .. .# .xz
    """
)
def release_names(data: bytes) -> None:
    """Which release file belongs to an image: one of those that are there, or a reason."""
    filename, *names = _fields(data, 6)
    for kind in Kind:
        for strict_false in ((), names):
            with only(Refused):
                assert release.choose_release_file(filename, names, strict_false, kind) in names
        assert filename.startswith(release.image_name(filename, kind))
        assert release.image_name(filename, kind).startswith(release.base_name(filename, kind))


# --- unit files, and the values in them ---


@target(
    r"""
    [Service] [X-Confext] ExtensionImages= Reload= Check= = \n \\\n # ; [ ] \r \x00 \xef\xbb\xbf \xff \x20
    \\
    """
)
def unit_file(data: bytes) -> None:
    """A file's assignments, written down again, are the same; the generator's short cut finds what all of it does."""
    parsed = syntax.parse(_text(data), "/a")
    for each in parsed.assignments:
        assert each.section and each.key and "\n" not in "".join(each[:3]) and 0 < each.line <= len(data) + 1
    # A backslash and blanks at the end of a line go on nowhere (257, 262), and cannot be written without the blanks.
    kept = [each for each in parsed.assignments if (len(each.value) - len(each.value.rstrip("\\"))) % 2 == 0]
    text = "".join(f"[{each.section}]\n{each.key}={each.value}\n" for each in kept)
    again = syntax.parse(text, "/a").assignments
    assert [each[:3] for each in again] == [each[:3] for each in kept]
    keys = ("ExtensionImages", "Check")
    short = syntax.parse_only(data, "/a", syntax.lines_of(keys))
    assert _chosen(short, keys) == _chosen(parsed, keys)
    for key in keys:
        syntax.assigned(parsed.assignments, "Service", key)
        syntax.last(parsed.assignments, "Service", key)


def _chosen(parsed: syntax.Parsed, keys: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [(each.section, each.key, each.value) for each in parsed.assignments if each.key in keys]


@target(
    r"""
    yes no 1 5s min \x20 . infinity 18446744073709551615 64M G SIGHUP SIGRTMIN +2 signal: /a :b - + " ' \\
    \\x20 \\u00e9 %i %n %% % .. / \n \x00 \xff \t
    """
)
def unit_values(data: bytes) -> None:
    """Values of settings: a value within its bounds, or ValueError."""
    text = _text(data.replace(b"\0", b""))  # it ends a line
    for read in (values.boolean, signals.signal_number, config.reload_kind):
        with only(ValueError):
            read(text)
    for measure in (values.time_span, values.size, values.number):
        with only(ValueError):
            assert 0 <= measure(text) <= values.INFINITY
    with only(ValueError):
        number = signals.signal_number(text)
        if not signals.signal_name(number).startswith("signal "):  # the C library's own
            assert signals.signal_number(signals.signal_name(number)) == number
    for escapes in (False, True):
        with only(ValueError):
            words = values.split(text, escapes=escapes)
            assert sum(map(len, words)) <= len(text)
            assert values.split(" ".join(map(_quoted, words))) == words
    specifiers = unit_names.Specifiers("a-b@c\\x2dd.service", "/etc/systemd/system/a-b@.service")
    paths = [path for path, _, _ in values.extension_images(text, specifiers.expand)]
    paths += [path for path, _ in values.extension_directories(text, specifiers.expand)]
    for path in paths:
        assert path.startswith("/") and "\0" not in path and ".." not in path.split("/")
        os.fsencode(path)


def _quoted(word: str) -> str:
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


@target(
    r"""
    Reload= Check= HealthCheck= SettleSec= RolloutParallel= Rollback= ImagePolicy= Enabled= StoreMax=
    KeepStacks= LogLevel= X-a= =\n \n yes auto signal:HUP /bin/true 5s %n % 1 \x00
    """
)
def settings(data: bytes) -> None:
    """[X-Confext] and [Watcher]: nothing that is written there is fatal, and what is bad is said with its line."""
    lines = [line.partition("=")[::2] for line in _text(data).split("\n")]
    for section in (config.SERVICE_SECTION, config.WATCHER_SECTION):
        assignments = [
            Assignment(section, key.strip(), value.strip(), "/a", at)
            for at, (key, value) in enumerate(lines, 1)
        ]
        if section == config.SERVICE_SECTION:
            specifiers = unit_names.Specifiers("web.service")
            found, remarks = config.service_settings(assignments, specifiers.expand)
            assert all(values.split(command) for command in (*found.check, *found.health_check))
        else:
            watchers, remarks = config.watcher_settings(assignments)
            assert watchers.keep_stacks >= 1
        assert all(remark.path.startswith("/a:") and remark.text.isprintable() for remark in remarks)


@target(
    r"""
    web @ - .service .socket \\x2d \\x00 : _ \\ . @. -- a-b- \xff \n
    """
)
def unit_name(data: bytes) -> None:
    """Names of units; what `%` makes of one is a text that could be part of a path."""
    text = _text(data)
    unit_names.unescape(text)
    with only(ValueError):
        name = unit_names.UnitName(text)
        assert text.isascii() and text.isprintable() and "/" not in text
        assert name.full == text and text.endswith(f".{name.type}")
        assert name.template is None or unit_names.UnitName(name.template).template is None
        names = unit_names.drop_in_names(text)
        assert names[0] == text and len(names) == len(set(names)) <= 3 * (text.count("-") + 1)
        specifiers = unit_names.Specifiers(text)
        for letter in "nNpPiIjJf":
            with only(ValueError):
                assert "\0" not in specifiers.expand(f"%{letter}")


@target(
    r"""
    /srv/a " \\ % : \n \r \t \x20 - + \xff \xc3\xa9 [Service] ExecStartPre=+ # ; ' \x00 = \x7f \xc2\x85 ${A} .. . ,
    """
)
def drop_in(data: bytes) -> None:
    """What is written into a drop-in says exactly what was meant, whatever a path is called; or it is refused."""
    path, options = _fields(data, 2)
    expand = unit_names.Specifiers("web.service").expand
    with only(drop_ins.Unwritable):
        text = _assigned("ExtensionImages", drop_ins.image(f"/{path}", options, optional=True))
        (found,) = values.extension_images(text, expand)
        assert found == (f"/{path}", options.lstrip(":"), True)
    with only(drop_ins.Unwritable):
        text = _assigned("ExtensionDirectories", drop_ins.path(f"/{path}"))
        assert values.extension_directories(text, expand) == [(f"/{path}", False)]
    for key in ("ReadOnlyPaths", "BindPaths"):
        with only(drop_ins.Unwritable):
            _assigned(key, drop_ins.path(f"/{path}", "/usr", options=options, optional=True))


def _assigned(key: str, word: drop_ins.Word) -> str:
    """The value that is read of one assignment that was written; it is the only one."""
    written = drop_ins.DropIn("By us")
    written.assign("Service", key, word)
    written.assign("Service", "Check", drop_ins.token("end"))
    parsed = syntax.parse(str(written), "/a")
    assert not parsed.remarks
    first, last = parsed.assignments
    assert (first.section, first.key, last.key, last.value) == ("Service", key, "Check", "end")
    return first.value


@target(
    r"""
    ProtectSystem=full\n BindPaths= BindReadOnlyPaths= TemporaryFileSystem= MountImages= ReadOnlyPaths= /usr /etc :
    \" \\ \n \x20 %
    """
)
def sandbox(data: bytes) -> None:
    """What is said again of a unit's sandbox is one setting to a line, and nothing else."""
    parsed = syntax.parse("[Service]\n" + _text(data), "/a")
    kept = sandbox_settings.repair(parsed.assignments, lambda directory: ("bin", 'a"b\\c%d', "a\nb"))
    for key, paths, options in kept.again:
        assert key in ("ReadOnlyPaths", "BindPaths", "BindReadOnlyPaths")
        with only(drop_ins.Unwritable):
            _assigned(key, drop_ins.path(*paths, options=options, optional=True))


# --- names of versions ---


@target(
    r"""
    web_ 1.4 +3 -1 +010 +09 .raw .v / ___ _x86-64 _arm64 ~ ^ - . \x00 \n \xff .tmp 99999999999
    """
)
def versions(data: bytes) -> None:
    """Picking from a `.v/` directory: each name is either one of those to choose from or is passed over."""
    path, *names = _fields(data.replace(b"/", b""), 8)  # no name of a directory has one
    for kind in Kind:
        spec = vpick.parse_path(f"/srv/{path}.v", kind)
        assert spec is not None
        dirents = [
            vpick.Dirent(name, "file" if kind is Kind.IMAGE else "directory") for name in names if name
        ]
        picked = vpick.pick(spec, dirents, "x86-64")
        passed = vpick.passed_over(spec, dirents, "x86-64")
        assert sorted([*(each.filename for each in picked), *(each.name for each in passed)]) == sorted(
            dirent.name for dirent in dirents
        )
        for candidate in picked:
            assert re.fullmatch(vpick.pattern(spec), candidate.filename)
            if kind is Kind.IMAGE:
                _count_is_the_same(candidate)
        for name in names:
            vpick.split(name, kind)
    for one in names:
        for other in names:
            assert _sign(one, other) == -_sign(other, one)


def _count_is_the_same(candidate: Candidate) -> None:
    """The count that is kept up by renaming is the one that was picked by."""
    counters = tries.counted(candidate.path)
    if counters is None:
        assert candidate.tries_left is None
    else:
        assert (counters.left, counters.done) == (candidate.tries_left, candidate.tries_done)


def _sign(one: str, other: str) -> int:
    from watcher.resolve import version

    return version.compare(one, other)


# --- the control socket ---


@cache
def _server() -> server._Server:
    return server._Server(cast(Any, None), cast(Any, None))


@target(
    r"""
    {"method":" io.confext.Watcher. org.varlink.service. Status History Wait GetInfo GetInterfaceDescription
    ","parameters": {"service":" "} "limit":1e999 true null [ ] } { , : "more":true \\ud800 \\u0000 1e5 NaN
    -1 \x00 \xff\xfe \xef\xbb\xbf
    """
)
def varlink_call(data: bytes) -> None:
    """A call: one that the interface has, or refused as Varlink has it; never taken for a mistake of the program."""
    with only(ValueError):
        try:
            request = transport.Request.parse(data)
        except UnicodeDecodeError:
            return
        with only(varlink.VarlinkError):
            name, parameters = conversation.checked(_server()._service, request)
            assert all(isinstance(value, str | int) for value in parameters.values())
            if not request.method.startswith(f"{schema.INTERFACE}."):
                for reply in _server()._service.handle(request.raw):
                    json.loads(reply)
            else:
                assert f"method {name}(" in schema.DESCRIPTION
        json.dumps(schema.utf8(request.method)).encode()


@target(
    r"""
    \x00 {} a\x00 \x00\x00 {\"method\":\"a\"}\x00
    """
)
def varlink_frames(data: bytes) -> None:
    """Frames come out as they were sent, in whatever pieces they arrive; one that is too long ends the connection."""
    size = 1 + (data[0] if data else 0) * 97
    chunks = [data[at : at + size] for at in range(0, len(data), size)]

    async def receive_some(_: int) -> bytes:
        return chunks.pop(0) if chunks else b""

    connection = transport.Connection(
        cast(Any, SimpleNamespace(receive_some=receive_some)), cast(Any, None), cast(Any, None)
    )
    found = []
    try:
        while (message := _now(connection.receive())) is not None:
            found.append(message)
    except ValueError:
        assert len(data) > transport.REQUEST_MAX
        return
    assert found == data.split(b"\0")[:-1]


def _now(coroutine: Any) -> Any:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


@target(
    r"""
    {"parameters": {"services":[ {"events":[ "service":"a" "outcome":"applied" "layers":[ "kind":"image"
    "when": null , } ] true 1 -1 1e3 99999999999999999999 "error":"io.confext.Watcher.Failed" "reason":1
    \\ud800 \x00 [ {
    """
)
def varlink_reply(data: bytes) -> None:
    """Whatever answers at the socket: an answer of its type, or one line for a person."""
    client = Client.__new__(Client)
    client._buffer = bytearray(data.replace(b"\0", b" ") + b"\0")
    with only(CallError, *CallError.__subclasses__()):
        answer = client._answer(client._receive())
        for cls, key in (
            (ServiceStatus, "services"),
            (Event, "events"),
            (PlannedChange, "changes"),
            (Quarantined, "x"),
        ):
            with only(CallError, *CallError.__subclasses__()):
                for item in client._list(cast(type[Any], cls), key, answer):
                    again = schema.from_dict(cls, json.loads(json.dumps(schema.to_dict(item))))
                    assert schema.to_dict(again) == schema.to_dict(item)
                    if isinstance(item, Event):
                        show.when(item.when)


# --- the bus ---

_SIGNALS = ("PropertiesChanged", "Reloading", "NameOwnerChanged", "UnitNew", "JobRemoved")


@target(
    r"""
    \x01s\x00 \x01b\x00 \x02ss\x00 \x03sss\x00 \x02so\x00 \x04uoss\x00 \x01v\x00 \x06sa{sv}as\x00
    a.service\x00 \x01\x00\x00\x00 \x00\x00\x00\x00
    """
)
def dbus_signal(data: bytes) -> None:
    """A signal whose body is anything that D-Bus can carry is passed over."""
    if len(data) < 2:
        return
    message = _message(data[1:], _SIGNALS[data[0] % len(_SIGNALS)])
    if message is not None:
        systemd = manager.Systemd(Settings())
        systemd._tracker._facts = cast(Any, {"a@.service": None})
        systemd._tracker._names = {"/a": "a.service"}
        systemd._on_signal(message)
        systemd.close()


def _message(data: bytes, member: str) -> Received | None:
    """A message with the signature that its first bytes give and the body of the rest; None where that is none."""
    length, rest = data[0], data[1:]
    signature, body = rest[:length], rest[length:].removeprefix(b"\0")
    fields = {HeaderFields.member: member, HeaderFields.path: "/a", HeaderFields.sender: ":1.1"}
    if b"()" in signature:
        return None  # jeepney 0.9 never comes to the end of an array of nothing; no bus lets one pass
    if signature:
        try:
            fields[HeaderFields.signature] = signature.decode("ascii")
        except UnicodeDecodeError:
            return None
    try:
        header = Header(Endianness.little, MessageType.signal, 0, 1, len(body), 1, fields)
        message = Received(header.serialise() + body)
        _ = message.body
    except Exception:  # noqa: BLE001 -- the connection is given up then (dbus.py)
        return None
    return message


class _Answering(dbus.Bus):
    """A bus on which every call gets the same answer."""

    def __init__(self, answer: Received) -> None:
        self._answer = answer
        self._heard, self._owners = set(), {}

    async def _exchange(self, message: Message, timeout: float) -> Received:
        return self._answer


@target(
    r"""
    \x01v\x00 \x01s\x00 \x01u\x00 \x01o\x00 \x0da(ssssssouso)\x00 \x05a{sv}\x00 \x01s\x00 \x02as\x00 \x02ay\x00
    \x04(uo)\x00 \x0ea(sasbttttuii)\x00 MainPID ExecReload \x01\x00\x00\x00 \x00\x00\x00\x00 262 active
    """
)
def dbus_reply(data: bytes) -> None:
    """An answer that is anything that D-Bus can carry: what was asked for, of its type, or an error of the bus."""
    message = _message(data, "") if data else None
    if message is None:
        return
    asked = systemd1.Systemd1(_Answering(message))
    with only(dbus.Error):
        for name, state in _now(asked.loaded(["a.service"])).items():
            assert isinstance(name, str) and isinstance(state, str)
    with only(dbus.Error):
        ends.failed_command(_now(asked.service_properties("a.service")), "ExecReload", "ExecReloadPost")
    with only(dbus.Error):
        assert re.fullmatch(r"(?:[0-9a-f]{2})*", _now(asked.invocation("a.service")))
    for name, kind in (item for kinds in systemd1._PROPERTIES.values() for item in kinds.items()):
        with only(dbus.Error):
            value = _now(asked.get("a.service", name))
            assert isinstance(value, {"s": str, "u": int, "i": int, "(uo)": tuple}.get(kind, list | bytes))
    for member in systemd1._ANSWERS:
        with only(dbus.Error):
            _now(asked.manager(member))
    for ask in (asked.check_version, asked.unit_paths, asked.follow):
        with only(dbus.Error, Unsupported):
            _now(ask())


# --- records of our own, which somebody may have damaged ---


@target(
    r"""
    {"version":1 "accepted":{ "stack":{"layers":[ "entries":[ "when":1 "mounted":{ "slot":"a" "name":"a" "version":"1"
    "digest":"d" "kind":"image" "source":"/a" "path":"/a" "optional":true "trial":{"stack":"a" "wasDown":true
    "verdict":"good" "undoing":{ "why":"a" "quarantine":[ "reason":"a" "forNow":false "heldFor":"a" "fell":true
    "pin":"a" "counted":{ "sysexts":[ } ] , { [ null 1e3 \\ud800 \xff
    """
)
def stack_record(data: bytes) -> None:
    """`.state.json`: a record of which everything has its type, or Damaged."""
    with only(records_state.Damaged):
        state = records_state.decoded(data, "/a")
        assert len(state.accepted.stack.id) in (0, 16) and type(state.accepted.when) is int
        assert all(type(value) is str for pair in state.accepted.mounted.items() for value in pair)
        assert all(isinstance(entry.kind, Kind) for entry in state.accepted.entries)
        assert all(type(done) is int for done in state.counted.values())
        assert all(type(one.for_now) is bool for one in state.quarantine)
        assert state.pin is None or type(state.pin) is str
        assert records_state.decoded(records_state.encoded(state), "/a") == state


@target(
    r"""
    {"name":"a" "pid":1 "started":1 "namespace":[1,2] "confext_dirs":["/a"] "reload_signal":"SIGHUP"
    "settings":["A=b"] "check":[] , } { [ ] null true 1e3 \\ud800 \\u0000 "reload_command":["a"]
    """
)
def registration(data: bytes) -> None:
    """What `exec` has registered: everything of its type, or ValueError."""
    with only(ValueError):
        made = registrations.parse(_text(data), "a")
        assert len(tuple(made.namespace)) == 2
        made.declared.images  # noqa: B018 -- can be made
        assert made.own_settings is not None
        for path in (*made.confext_dirs, *made.images, *made.directories):
            assert b"\0" not in os.fsencode(path)
        assert registrations.parse(json.dumps(asdict(made)), "a") == made


@target(
    r"""
    [{"slot":"a","name":"a","version":"","digest":"d","kind":"image","source":"/"}] [ ] { } null \x00
    applied failed 1 -1 x
    """
)
def history_row(data: bytes) -> None:
    """A row of the history: an outcome, or LedgerError."""
    given = _fields(data, len(ledger._COLUMNS))
    row: list[Any] = [int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text or None for text in given]
    with only(ledger.LedgerError):
        event = ledger._event(row)
        assert type(event.outcome) is Outcome
        assert type(event.when) is int
        assert ledger._event(ledger._event_row(event)).outcome is event.outcome
    good = ledger._event_row(Event("a", Outcome.APPLIED, "a", 1))
    with only(ledger.LedgerError):
        ledger._event([*good[:-1], given[-1]])


# --- mount tables, and what else the kernel says in lines ---


@target(
    r"""
    1\x201\x200:1\x20/\x20/\x20rw\x20-\x20tmpfs\x20a\x20rw\n
    2\x201\x200:2\x20/\x20/etc\x20rw\x20-\x20overlay\x20systemd-extensions\x20 lowerdir+=cover
    ,lowerdir+=layers/web_1@d ,lowerdir+=base@0:1 \\040 \\134 \n \r \v \x20 - /etc/a \xff %5F , @
    """
)
def mountinfo(data: bytes) -> None:
    """A mount table: what it says of `/etc`, or ValueError; other readers of it neither fail nor see other rows."""
    text = _text(data)
    with only(ValueError):
        found = table.Table(text)
        assert found.chain[-1:] in ([], [found.top]) and 0 <= found.surplus <= found.liftable <= len(
            found.stacks
        )
        mounted = found.mounted()
        assert (mounted.layers == ()) or mounted.overlay
        assert mounted.stack is None or len(mounted.stack) in (0, 16)
        assert found.base_path.startswith("base@") and len(os.fsencode(found.base_path)) <= 255
        assert found.same_etc(table.Table(text))
        found.carries(found.top, found.under)
        list(found.above(found.top))
        found.points_on(found.top)
    cgroup.mount_point(text)
    list(mounts(text.split("\n")))


@target(
    r"""
    web 1.4 _ % , \x20 @ \\ / : + ^ \n \xff \xc3\xa9 \x00
    """
)
def layer_path(data: bytes) -> None:
    """The name of a layer comes back from the mount table as it went in, unless it had to be cut."""
    name, version = _fields(data, 2)
    digest = "d" * 64
    path = table.layer_path(name, version, digest)
    assert len(path) <= 255 and path.isascii() and not set(path) & set(" ,\\\n\t:")
    options = f"rw,lowerdir+=cover,lowerdir+={path},lowerdir+=base@0:1"
    mount = Mount(1, 1, "0:1", "/", "/etc", (), "overlay", table.SOURCE, options)
    (layer,) = table.layers_of(mount) or ()
    assert layer.digest == digest
    if len(path) < 255 - 16:
        assert (layer.name, layer.version) == (name, version)


@target(
    r"""
    0:: 1:name=systemd: / system.slice web.service _web.service \n \v \r \x1c \xc2\x85 .. : \xff
    """
)
def control_group(data: bytes) -> None:
    """/proc/PID/cgroup: the unit's group is part of the one path that the kernel gave."""
    group = cgroup.unit_group(_text(data), "web.service")
    rows = [_text(row).split(":", 2)[-1] for row in data.split(b"\n")]
    assert group == "" or any(row.startswith(group) for row in rows)
    assert not group or group.rpartition("/")[2] in ("web.service", "_web.service")


@target(
    r"""
    \x1b[2J \n \\ \xff \xc2\x85 \xe2\x80\xa8 a \x00 \xe2\x80\xae
    """
)
def shown_text(data: bytes) -> None:
    """Whatever strangers call their files is one printable line, and JSON and SQLite can carry it."""
    text = _text(data)
    assert shown(text).isprintable()
    assert "\0" not in schema.utf8(text)
    schema.utf8(text).encode()


@target(
    r"""
    [emerg] Error: FATAL warning: deprecated /etc/x:1 (1) \x20line\x201 \x20of\x20/ : \n \x20 \x1b \xff
    """
)
def command_output(data: bytes) -> None:
    """Whatever a command prints, one printable line says what was wrong, and it is of what was printed."""
    text = _text(data)
    line = telling(text)
    assert line.isprintable() and bool(line) == bool(text.strip())
    assert any(line.startswith(shown(printed.strip()[:99])) for printed in text.splitlines()) or not line


def grown(data: bytes) -> bytes:
    """A long input made of a short one, for work that grows faster than its input."""
    return data * max(1, 2048 // max(1, len(data)))
