# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a power cut leaves of a directory: the traced system calls of a program, replayed on a disk that forgets.

The disk promises what POSIX does, and no more. fsync(2) of a file keeps its content, fsync of a directory its entries;
of all else (names made, replaced and removed; what was written) any part may be there after the cut or not: none of
it, all of it, the first steps, one step alone, all but one; and a file that has its new name may be empty, half
written, or whole. No kernel is as bad as that, and one that is not may come.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "open openat close dup fcntl creat mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir symlink symlinkat "
    "link linkat write pwrite64 ftruncate chmod fchmod fchmodat fsync fdatasync syncfs"
)
# Which arguments are paths, of the calls without a directory in front of each.
_PATHS = {
    "open": [0],
    "mkdir": [0],
    "rmdir": [0],
    "unlink": [0],
    "chmod": [0],
    "rename": [1, 0],
    "link": [1, 0],
}
_PATHS["symlink"] = [1]


@dataclass(eq=False)
class Node:
    """A file, directory or link: as it is, and as the disk has it."""

    kind: str
    mode: int = 0
    data: bytes = b""
    entries: dict[str, Node] = field(default_factory=dict)
    kept_mode: int = 0
    kept_data: bytes = b""
    kept_entries: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept_mode = self.mode


Effect = tuple[Node, str, "Node | None"]
Tree = tuple[object, ...]


@dataclass
class Disk:
    """A directory `root`, empty at first, and what a program has done to it up to now."""

    path: str
    root: Node = field(default_factory=lambda: Node("d", 0o755))
    pending: list[list[Effect]] = field(default_factory=list)
    files: dict[int, tuple[Node, int]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)

    def cuts(self) -> Iterator[tuple[list[list[Effect]], str]]:
        """Each choice of what is there after a power cut now, and how much of the files' content is."""
        ops = [op for op in self.pending if op]
        choices = [[], ops]
        choices += [ops[:number] for number in range(1, len(ops))]
        choices += [[op] for op in ops]
        choices += [ops[:number] + ops[number + 1 :] for number in range(len(ops))]
        for chosen in choices:
            for data in ("lost", "half", "whole"):
                yield chosen, data

    def after(self, chosen: Sequence[list[Effect]], data: str) -> dict[str, Tree]:
        """The entries of the root after a power cut."""
        views: dict[int, dict[str, Node]] = {}
        for op in chosen:
            for directory, name, node in op:
                view = views.setdefault(id(directory), dict(directory.kept_entries))
                if node is None:
                    view.pop(name, None)
                else:
                    view[name] = node
        return {name: _tree(node, views, data) for name, node in _entries(self.root, views)}


def _entries(node: Node, views: dict[int, dict[str, Node]]) -> list[tuple[str, Node]]:
    return sorted(views.get(id(node), node.kept_entries).items())


def _tree(node: Node, views: dict[int, dict[str, Node]], data: str) -> Tree:
    if node.kind == "d":
        inside = tuple((name, _tree(child, views, data)) for name, child in _entries(node, views))
        return ("d", node.kept_mode, inside)
    if node.kind == "l":
        return ("l", node.data)
    if data == "whole" or node.data == node.kept_data:
        return ("f", node.kept_mode, node.data)
    half = node.kept_data + node.data[len(node.kept_data) : (len(node.kept_data) + len(node.data)) // 2]
    return ("f", node.kept_mode, node.kept_data if data == "lost" else half)


def make(entries: dict[str, Tree], at: Path) -> None:
    """Entries of `Disk.after()`, for real."""
    at.mkdir(exist_ok=True)
    for name, (kind, *rest) in entries.items():
        path = at / name
        if kind == "d":
            inside = rest[1]
            assert isinstance(inside, tuple)
            make(dict(inside), path)
            path.chmod(int(str(rest[0])))
        elif kind == "l":
            assert isinstance(rest[0], bytes)
            os.symlink(rest[0], path)
        else:
            assert isinstance(rest[1], bytes)
            path.write_bytes(rest[1])
            path.chmod(int(str(rest[0])))


def replayed(code: str, arguments: Sequence[object], path: Path, trace: Path) -> Iterator[Disk]:
    """The disk after each system call of a Python program that changes something in the empty directory `path`.

    What the program writes to its standard output is in `Disk.marks`.
    """
    words = ["strace", "-f", "-qq", "-xx", "-s", "9999999", "-o", str(trace)]
    words += ["-e", "trace=" + ",".join("?" + call for call in CALLS.split())]
    words += [sys.executable, "-B", "-S", "-c", code, *map(str, arguments)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    disk = Disk(str(path))
    for call, values, result, began in _calls(trace, disk):
        if _Replay(disk).do(call, values, result, began):
            yield disk


@dataclass(frozen=True)
class _Began:
    """Of a call that took a while: what was to be synced, as it was at its begin."""

    node: Node
    data: bytes
    mode: int
    entries: dict[str, Node]
    pending: int


def _calls(trace: Path, disk: Disk) -> Iterator[tuple[str, list[str], int, _Began | None]]:
    unfinished: dict[str, tuple[str, _Began | None]] = {}
    for line in trace.read_text().splitlines():
        pid, _, text = line.partition(" ")
        text = text.lstrip()
        began = None
        if text.endswith("<unfinished ...>"):
            text = text.removesuffix("<unfinished ...>")
            if re.match(r"f(data)?sync\((\d+)", text):
                began = _Replay(disk).begin(int(re.findall(r"\d+", text)[0]))
            if text.startswith("close("):
                # Another thread may get the same number before this line is finished.
                disk.files.pop(int(re.findall(r"\d+", text)[0]), None)
            unfinished[pid] = text, began
            continue
        if text.startswith("<... "):
            first, began = unfinished.pop(pid)
            if first.startswith("close("):
                continue
            text = first + text.partition(" resumed>")[2]
        found = re.match(r"(\w+)\((.*)\)\s+= (-?\d+)", text)
        if found and int(found[3]) >= 0:
            yield found[1], found[2].split(", "), int(found[3]), began


def _bytes(value: str) -> bytes:
    return bytes.fromhex(value.strip('"').replace("\\x", ""))


class _Replay:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def begin(self, fd: int) -> _Began | None:
        if fd not in self._disk.files:
            return None
        node = self._disk.files[fd][0]
        return _Began(node, node.data, node.mode, dict(node.entries), len(self._disk.pending))

    def do(self, call: str, values: list[str], result: int, began: _Began | None) -> bool:
        """Whether the disk, or what it promises, is another now."""
        for index in _PATHS.get(call, ()):
            values.insert(index, "AT_FDCWD")
        name = {"renameat2": "rename", "fchmodat": "chmod"}.get(call, call.removesuffix("at"))
        changed: bool = getattr(self, f"_{name}")(values, result, began)
        return changed

    def _at(self, directory: str, path: str) -> tuple[Node, str] | None:
        """Node of the directory that `path` is in, and its name there; None: somewhere else."""
        text = os.fsdecode(_bytes(path))
        if through := re.match(r"/proc/self/fd/(\d+)/", text):
            directory, text = through[1], text[through.end() :]
        if text.startswith("/"):
            if not text.startswith(self._disk.path + "/"):
                return None
            node = self._disk.root
            text = text.removeprefix(self._disk.path + "/")
        elif directory.isdigit() and int(directory) in self._disk.files:
            node = self._disk.files[int(directory)][0]
        else:
            return None
        *parents, name = text.split("/")
        for parent in parents:
            node = self._follow(node, parent)
        return node, name

    def _follow(self, node: Node, name: str) -> Node:
        found = node.entries[name]
        if found.kind == "l":  # units/UNIT alone
            _, stacks, unit, stack = found.data.decode().split("/")
            return self._disk.root.entries[stacks].entries[unit].entries[stack]
        return found

    def _found(self, directory: str, path: str) -> Node | None:
        if _bytes(path) == os.fsencode(self._disk.path):
            return self._disk.root
        at = self._at(directory, path)
        return at[0].entries.get(at[1]) if at else None

    def _change(self, *changes: tuple[tuple[Node, str] | None, Node | None]) -> bool:
        effects = [(*at, node) for at, node in changes if at is not None]
        for directory, name, node in effects:
            if node is None:
                del directory.entries[name]
            else:
                directory.entries[name] = node
        self._disk.pending.append(effects)
        return bool(effects)

    def _open(self, values: list[str], result: int, _: object) -> bool:
        node = self._found(values[0], values[1])
        at = self._at(values[0], values[1])
        self._disk.files.pop(result, None)
        made = False
        if node is None and at is not None:
            node = Node("f", int(values[3], 8))
            made = self._change((at, node))
        if node is not None:
            if node.kind == "l":
                assert at is not None
                node = self._follow(*at)
            if "O_TRUNC" in values[2]:
                node.data = b""
            self._disk.files[result] = node, 0
        return made

    def _close(self, values: list[str], *_: object) -> bool:
        self._disk.files.pop(int(values[0]), None)
        return False

    def _dup(self, values: list[str], result: int, _: object) -> bool:
        if int(values[0]) in self._disk.files:
            self._disk.files[result] = self._disk.files[int(values[0])]
        return False

    def _fcntl(self, values: list[str], result: int, _: object) -> bool:
        return "F_DUPFD" in values[1] and self._dup(values, result, None)

    def _mkdir(self, values: list[str], *_: object) -> bool:
        return self._change((self._at(*values[:2]), Node("d", int(values[2], 8))))

    def _symlink(self, values: list[str], *_: object) -> bool:
        return self._change((self._at(*values[1:3]), Node("l", data=_bytes(values[0]))))

    def _link(self, values: list[str], *_: object) -> bool:
        return self._change((self._at(*values[2:4]), self._found(*values[:2])))

    def _rename(self, values: list[str], *_: object) -> bool:
        source = self._at(*values[:2])
        return self._change((self._at(*values[2:4]), self._found(*values[:2])), (source, None))

    def _unlink(self, values: list[str], *_: object) -> bool:
        return self._change((self._at(*values[:2]), None))

    _rmdir = _unlink

    def _write(self, values: list[str], result: int, _: object) -> bool:
        fd = int(values[0])
        if fd in self._disk.files:
            node, offset = self._disk.files[fd]
            self._put(node, _bytes(values[1]), offset)
            self._disk.files[fd] = node, offset + result
            return True
        if fd == 1:
            self._disk.marks.append(_bytes(values[1]).decode())
            return True
        return False

    def _pwrite64(self, values: list[str], *_: object) -> bool:
        fd = int(values[0])
        if fd not in self._disk.files:
            return False
        self._put(self._disk.files[fd][0], _bytes(values[1]), int(values[3]))
        return True

    def _put(self, node: Node, data: bytes, offset: int) -> None:
        before = node.data.ljust(offset, b"\0")
        node.data = before[:offset] + data + before[offset + len(data) :]

    def _ftruncate(self, values: list[str], *_: object) -> bool:
        fd, size = int(values[0]), int(values[1])
        if fd not in self._disk.files:
            return False
        node = self._disk.files[fd][0]
        node.data = node.data[:size].ljust(size, b"\0")
        return True

    def _chmod(self, values: list[str], *_: object) -> bool:
        return self._give_mode(self._found(*values[:2]), values[2])

    def _fchmod(self, values: list[str], *_: object) -> bool:
        return self._give_mode(self._disk.files.get(int(values[0]), (None, 0))[0], values[1])

    def _give_mode(self, node: Node | None, mode: str) -> bool:
        if node is not None:
            node.mode = int(mode, 8)
        return node is not None

    def _fsync(self, values: list[str], result: int, began: _Began | None) -> bool:
        began = began or self.begin(int(values[0]))
        if began is None:
            return False
        began.node.kept_data, began.node.kept_mode = began.data, began.mode
        began.node.kept_entries = began.entries
        for op in self._disk.pending[: began.pending]:
            op[:] = [effect for effect in op if effect[0] is not began.node]
        return True

    def _syncfs(self, *_: object) -> bool:
        """Of a program with one thread: it keeps all."""
        for effects in self._disk.pending:
            for directory, _name, node in effects:
                self._keep(directory)
                if node is not None:
                    self._keep(node)
        for node, _offset in self._disk.files.values():
            self._keep(node)
        self._disk.pending.clear()
        return True

    def _keep(self, node: Node) -> None:
        node.kept_data, node.kept_mode, node.kept_entries = node.data, node.mode, dict(node.entries)

    def _fdatasync(self, values: list[str], result: int, began: _Began | None) -> bool:
        fd = int(values[0])
        if fd not in self._disk.files:
            return False
        node = self._disk.files[fd][0]
        before = node.kept_mode
        changed = self._fsync(values, result, began)
        if node.kind == "f":
            node.kept_mode = before
        return changed
