# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two programs that write to one file at once: what they leave may be a mix that can be read.

A lease (`lease.py`) says that nobody writes now, and not how many did. The alternatives for that:

- inotify: it names no process, and merges opens.
- /proc: who has the file open for writing at this moment. To know when to look one would need an event for each open;
  and a program that has come and gone is not seen.
- fanotify with FAN_MODIFY: exact to the write. But each write of an upload would wake us.

So fanotify tells of opens and of closes, by process. If a process closes the file after writing, and another had it
open at that moment and closes it later, after writing, too, then they wrote at once. Who has closed it without writing
has it open no more, as far as we know: it has read it, and may write to it later. A process that opens the file several
times is one writer, so is one with its children, whoever closes the file for it.

Of a process that is gone when we read of it nobody can tell whose child it was (the kernel makes no pidfd for it). It
counts as a child of those that have the file open and have waited for one since they were looked at last. If these are
gone as well, two programs have written, as far as we know.

Of a close by a process that has not opened the file we know whose it is only if that is its parent, and it has the file
open no more. Else it may be a loop device that is detached, or somebody who began before we did: nobody is accused
then.

**Afterwards the file does not count until a program alone has had it open for writing**: whoever copies it again, or
touches it because he knows that it is whole. A file that is renamed into place is another one.

What nobody can tell: two writers that are one process (a server with threads), or of which our PID namespace has none;
a server in the kernel (NFS); and who takes turns, and closes the file each time.

The record of such files is kept in the state directory. Who writes while the watcher is not there is not seen; who
still writes when it comes is found in /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

from watcher.mounts import fanotify
from watcher.mounts.fanotify import Event, Handle
from watcher.records import durable, journal
from watcher.settings import config
from watcher.text import problem, shown
from watcher.watch import processes
from watcher.watch.turns import Turns

RECORD = "blends.json"

_FILES_MAX = 4096
_OPEN_MAX = 16
_NAMED_MAX = 4
_RECORDED_MAX = 1000
# Who opens files again and again costs one read in this time, and some more at once after a rest.
_PAUSE_SEC = 0.002
_AT_ONCE = 8
# It is read again while there is news. Somebody may open files faster than that.
_READS_MAX = 8
# For a look through /proc, which is made when a file is being written that we have not seen opened.
_SEARCH_SEC = 0.25
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Opened:
    """A process that has opened a file.

    Attributes:
        beside: writers that ended meanwhile, with their names; by PID. Not all, if there were many.
        kin: those of its ancestors and children that have the file open, too.
        idle: it has closed the file without writing, and not opened it again.
        waited_for: `processes.waited_for()` when a process was last seen to open the file, 0 before that.
    """

    beside: dict[int, str] | None = None
    kin: frozenset[int] = frozenset()
    idle: bool = False
    waited_for: int = 0

    def note(self, ended: Mapping[int, str]) -> None:
        """Writers have ended."""
        if not self.idle:
            news = ((pid, name) for pid, name in ended.items() if pid not in self.kin)
            self.beside = dict(islice({**(self.beside or {}), **dict(news)}.items(), _NAMED_MAX))


@dataclass(slots=True)
class _File:
    """One file.

    Attributes:
        open: processes that have opened it and may be writing, by PID. The first one first.
        blend: who wrote at once when it was written last, in words.
    """

    open: dict[int, _Opened] = field(default_factory=dict)
    blend: str = ""


class Writers:
    """Who writes to files in the directories that are watched. Threads may share it. A context manager.

    Args:
        state_directory: where the record is. Without `begin()` nothing is known but that.
    """

    def __init__(self, state_directory: str) -> None:
        self._directory = state_directory
        self._path = f"{state_directory}/{RECORD}"
        self._group: int | None = None
        self._turns = Turns()
        self._lock = threading.Lock()
        self._files: dict[Handle, _File] = {}
        self._names: dict[int, str] = {}
        self._recorded = self._load()
        self._stop = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._group is None or self._thread is None:
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        with self._lock:
            os.close(self._group)
            self._group = None
            self._turns.close()
        os.close(self._stop)

    def begin(self) -> None:
        """Begin to listen, where we may: without privilege nothing is told (a user namespace)."""
        try:
            self._group = fanotify.init()
        except OSError as error:
            say = journal.log.warning if config.is_root() else journal.log.debug
            say(f"two writers at once to one file are not noticed, there is no fanotify: {problem(error)}")
            return
        self._turns.begin()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, name="writers", daemon=True)
        self._thread.start()

    def watch(self, directories: Iterable[str]) -> None:
        """From now on listen to files in these directories, too; blocks on their paths."""
        if self._group is None:
            return
        for directory in directories:
            with contextlib.suppress(OSError):  # it is not there, or its file system does not tell
                fanotify.mark(self._group, directory)
                with self._lock:
                    self._turns.watch(directory)

    def writing(self, fd: int) -> str:
        """Who is writing to a file that is open as `fd`, in words; "" if that is not known. Blocks."""
        if (handle := _handle(fd)) is None:
            return ""
        with self._lock:
            self._read()
            file = self._files.get(handle)
            known = list(file.open) if file is not None else []
        found, name = os.fstat(fd), "/" + os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        writers = [pid for pid in known if processes.is_writing(pid, name, found)]
        if not writers:
            until = time.monotonic() + _SEARCH_SEC
            writers = [pid for pid in processes.others(until) if processes.is_writing(pid, name, found)]
            with self._lock:
                for pid in writers if self._group is not None else ():
                    self._opened(self._file(handle), pid)
        return ", ".join(filter(None, map(processes.introduced, writers)))

    def blend(self, fd: int, *, alone: bool) -> str:
        """Who wrote to a file at once that is open as `fd`, in words; "" if nobody did that we know of. Blocks.

        Args:
            alone: nobody can be writing to it now: we hold a lease.
        """
        if (handle := _handle(fd)) is None:
            return ""
        changed_ns = os.fstat(fd).st_ctime_ns
        with self._lock:
            self._read()
            file = self._files.get(handle)
            if file is None:
                ctime_ns, blend = self._recorded.get(handle, (0, ""))
                blend = blend if ctime_ns == changed_ns else ""
                if blend:
                    self._file(handle).blend = blend
            else:
                blend = file.blend
                if alone:
                    file.open.clear()
                    if not blend:
                        del self._files[handle]
            self._note(handle, (changed_ns, blend) if blend else None)
        return blend

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._group or 0, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        left, last = float(_AT_ONCE), time.monotonic()
        while self._stop not in dict(poll.poll()):
            with self._lock:
                self._read()  # soon: a process that is gone cannot be asked whose child it was
            now = time.monotonic()
            left, last = min(left + (now - last) / _PAUSE_SEC, _AT_ONCE) - 1, now
            if left < 1:
                time.sleep(_PAUSE_SEC)  # `Turns` keeps the order meanwhile

    def _read(self) -> None:
        """Take note of all that has happened up to now. Hold the lock."""
        if self._group is None:
            return
        new: dict[Handle, dict[int, Event]] = {}
        for event in self._events():
            if event.mask & fanotify.Q_OVERFLOW:
                # Nothing is put down to anybody whose end may have been lost. What was recorded of a file counts
                # while nobody has changed it, as after a restart.
                self._files.clear()
                new.clear()
            elif event.handle is not None and event.pid > 0 and event.pid != os.getpid():
                self._take(event.handle, event, new.setdefault(event.handle, {}))
        self._turns.read_after()
        for handle, events in new.items():
            if events:
                file = self._file(handle)
                self._unmerge(file, events)
                for pid, one in file.open.items():
                    one.waited_for = processes.waited_for(pid)

    def _events(self) -> list[Event]:
        """All that fanotify tells, as of a moment at which inotify has told the same."""
        assert self._group is not None
        self._turns.read_before()
        events = list(fanotify.read(self._group))
        for _ in range(_READS_MAX):
            if not self._turns.read_after():
                break
            events += fanotify.read(self._group)
        return events

    def _take(self, handle: Handle, event: Event, new: dict[int, Event]) -> None:
        """Take note of an event.

        Args:
            new: of each process that has opened the file since the last read: what it did.
        """
        file, pid = self._file(handle), event.pid
        if event.mask & fanotify.OPEN:
            is_new = pid not in file.open
            self._opened(file, pid)
            if is_new and pid in file.open:
                new.setdefault(pid, event._replace(mask=0))
        if pid in new:
            new[pid] = new[pid]._replace(mask=new[pid].mask | event.mask)
        if event.mask & fanotify.CLOSE_WRITE:
            self._closed(file, event)
        elif event.mask & fanotify.CLOSE_NOWRITE and pid in file.open:
            file.open[pid].idle = True
        if not (file.open or file.blend or handle in self._recorded):
            del self._files[handle]

    def _unmerge(self, file: _File, new: Mapping[int, Event]) -> None:
        """Find out what the events of processes do not tell that have opened a file since the last read."""
        closed = (pid for pid, one in new.items() if one.mask & fanotify.CLOSE_WRITE)
        ended = {pid: self._names.get(pid, "") for pid in closed if pid not in file.open}
        places = {one.place for one in new.values()}
        place = places.pop()
        if place is None or not ended or places:
            return
        turns = self._turns.count(place)
        if 0 < turns < len(ended):
            programs = [pid for pid in ended if processes.ancestors(pid).isdisjoint(ended)]
            if turns < len(programs):
                file.blend = _listed({pid: ended[pid] for pid in programs[:_NAMED_MAX]})
        if self._turns.has_just_ended(place):
            for pid in new.keys() & file.open.keys():  # it was open before the end
                file.open[pid].note(ended)

    def _file(self, handle: Handle) -> _File:
        file = self._files.pop(handle, None)
        if file is None:
            file = _File()
            if len(self._files) >= _FILES_MAX:
                del self._files[next(iter(self._files))]
        self._files[handle] = file
        return file

    def _opened(self, file: _File, pid: int) -> None:
        if pid in file.open:
            file.open[pid].idle = False
            return
        if (name := processes.name(pid)) is None:
            return
        if len(file.open) >= _OPEN_MAX:
            idle = (pid for pid, one in file.open.items() if one.idle)
            del file.open[next(idle, next(iter(file.open)))]
        kin = self._kin(file, pid) if file.open else frozenset()
        for one in kin:
            file.open[one].kin |= {pid}
        file.open[pid] = _Opened(kin=kin)
        self._names[pid] = name

    @staticmethod
    def _kin(file: _File, pid: int) -> frozenset[int]:
        """Whose child a process may be, of those that have the file open."""
        if ancestors := processes.ancestors(pid):
            return ancestors & file.open.keys()
        return frozenset(
            one for one, opened in file.open.items() if processes.waited_for(one) > opened.waited_for
        )

    def _closed(self, file: _File, event: Event) -> None:
        """A process has closed the file after writing."""
        pid, name = event.pid, event.place[1] if event.place is not None else ""
        seen = pid in file.open
        if not seen:
            if not file.open or processes.name(pid) is None:
                return
            parent = next((one for one in file.open if one in processes.ancestors(pid)), None)
            # A parent that has it open still did not leave it to the child: that closes it for a loop device.
            if parent is None or processes.has_open(parent, name):
                file.open.clear()
                return
            pid = parent
        beside = file.open.pop(pid).beside
        program = self._names.get(pid, "")
        for other in file.open.values():
            other.note({pid: program})
        if beside:
            file.blend = _listed(beside | {pid: program})
        elif seen:
            file.blend = ""
        self._forget_names()

    def _forget_names(self) -> None:
        if len(self._names) > _FILES_MAX:
            open_ = {pid for file in self._files.values() for pid in file.open}
            self._names = {pid: name for pid, name in self._names.items() if pid in open_}

    def _load(self) -> dict[Handle, tuple[int, str]]:
        try:
            with open(self._path, encoding="utf-8") as file:
                rows = json.load(file)
            return {(int(kind), bytes.fromhex(name)): (int(when), str(who)) for kind, name, when, who in rows}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            journal.log.warning(
                f"which files two programs wrote to at once is not known any more: {problem(error)}"
            )
            return {}

    def _note(self, handle: Handle, what: tuple[int, str] | None) -> None:
        """Record a blend, or that there is none. Only what listens writes. Hold the lock."""
        if self._group is None or self._recorded.get(handle) == what:
            return
        self._recorded.pop(handle, None)
        if what is not None:
            self._recorded[handle] = what
            if len(self._recorded) > _RECORDED_MAX:
                del self._recorded[next(iter(self._recorded))]
        rows = [(kind, name.hex(), when, who) for (kind, name), (when, who) in self._recorded.items()]
        temporary = f"{self._path}.new"
        try:
            with open(os.open(temporary, _NEW, 0o600), "w", encoding="utf-8") as file:
                json.dump(rows, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._path)
            durable.fsync(self._directory)
        except OSError as error:
            text = "which files two programs wrote to at once is known until the watcher ends"
            journal.log.warning(f"{text}: {problem(error)}")


def _listed(writers: Mapping[int, str]) -> str:
    return ", ".join(f"{shown(name) or 'pid'} {pid}" for pid, name in writers.items())


def _handle(fd: int) -> Handle | None:
    try:
        return fanotify.name_to_handle_at(fd)
    except OSError:
        return None
