# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person sees: a command in a real terminal, and the screens kept in tests/screens/.

    seen = look([COMMAND, "status"], columns=80, environment=place.environment)
    keep("status-80", seen, place.path)

`make screens` writes them anew, so that a reviewer sees the change of a screen as the diff of a text file. The terminal
is pyte's: a well-kept emulator of a VT102 in plain Python (Debian: python3-pyte), which keeps each sign's colours.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import selectors
import struct
import tempfile
import termios
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyte

from support import CHECKOUT, fork_server

SCREENS = CHECKOUT / "tests/screens"
REWRITE = "CONFEXT_WATCHER_REWRITE_SCREENS"
"""Environment variable: screens are written, not compared. For `make screens`."""

_ROWS = 200
_SECONDS = 60
_HOST = "/etc/systemd/system"
# What is another in each run; each of the length that it had, since the layout depends on that.
_DIGEST = re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{8,64}\b")
_TIME = re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_AGO = re.compile(r" *\b\d+ (?:s|min) ago")
_PID = re.compile(r"\bPID +\d+|\bpid=\d+")
_SIZE = re.compile(r"\bof \d{5} bytes")
_DURATION = re.compile(r"\b\d+(?:\.\d+)? (?:us|ms|s)\b(?! ago)")


@dataclass(frozen=True)
class Look:
    """What a command has left on a terminal.

    Attributes:
        written: all that it has written, with control sequences.
        columns: of the terminal.
        status: exit status of the command, as `subprocess` has it.
    """

    written: str
    columns: int
    status: int

    @property
    def text(self) -> str:
        """Its lines without the blanks at their ends."""
        return _lines(line.rstrip() for line in self._screen.display)

    @property
    def styled(self) -> str:
        """The same with each stretch that is not plain in braces, after its style: "{bold:SERVICE}"."""
        screen = self._screen
        return _lines(_row(screen.buffer[number], screen.columns) for number in range(screen.lines))

    @property
    def styles(self) -> set[str]:
        """The styles that occur."""
        return set(re.findall(r"\{([a-z ]+):", self.styled))

    @property
    def _screen(self) -> pyte.Screen:
        screen = pyte.Screen(self.columns, _ROWS)
        pyte.Stream(screen).feed(self.written)
        return screen


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(row: Any, columns: int) -> str:
    signs = groupby((row[column] for column in range(columns)), _style)
    stretches = ((style, "".join(one.data for one in some)) for style, some in signs)
    return "".join(f"{{{style}:{text}}}" if style else text for style, text in stretches).rstrip()


def _style(sign: pyte.screens.Char) -> str:
    words = [name for name in ("bold", "reverse", "underscore", "italics") if getattr(sign, name)]
    words += [sign.fg] if sign.fg != "default" else []
    words += [f"on {sign.bg}"] if sign.bg != "default" else []
    return " ".join(words)


@contextmanager
def place_path() -> Iterator[Path]:
    """A directory whose path is as long in each run: where a line is folded may depend on it."""
    with tempfile.TemporaryDirectory(prefix="place-", dir="/tmp") as path:
        assert len(path) == len(_HOST)
        os.chmod(path, 0o755)
        yield Path(path)


class Terminal:
    """A command in a terminal; `end()` waits for its end."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        columns: int = 80,
        environment: Mapping[str, str] = os.environ,
        utf8: bool = True,
        colour: bool = True,
        inside: int | None = None,
    ) -> None:
        self.screen = pyte.Screen(columns, _ROWS)
        self._stream = pyte.ByteStream(self.screen)
        self._written = bytearray()
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        kept = {name: value for name, value in environment.items() if name not in _OF_A_TERMINAL}
        kept |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8" if utf8 else "C", "TZ": "UTC"}
        kept |= {} if colour else {"NO_COLOR": "1"}
        try:
            self.process = fork_server.Popen(
                [os.fspath(word) for word in words],
                inside=inside,
                env=kept,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
        finally:
            os.close(theirs)

    def until(self, true: Callable[[str], object]) -> str:
        """Read on until the text on the screen is as expected."""
        deadline = time.monotonic() + _SECONDS
        while not true(text := "\n".join(line.rstrip() for line in self.screen.display)):
            assert time.monotonic() < deadline and self._read(0.1) is not None, (
                f"not seen on:\n{text.strip()}"
            )
        return text

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def end(self) -> Look:
        """What it looks like once the command has ended."""
        deadline = time.monotonic() + _SECONDS
        while self._read(0.1) is not None:
            assert time.monotonic() < deadline, f"still running: {self.screen.display}"
        status = self.process.wait(timeout=_SECONDS)
        os.close(self._fd)
        return Look(self._written.decode(errors="replace"), self.screen.columns, status)

    def _read(self, seconds: float) -> int | None:
        """How many bytes have come; None at the end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._fd, selectors.EVENT_READ)
            if not selector.select(seconds):
                return 0
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # EIO: nobody has the other end open any more
            return None
        self._written += data
        self._stream.feed(data)
        return len(data)


# What the program would believe rather than the terminal.
_OF_A_TERMINAL = frozenset(
    "COLUMNS LINES TERM NO_COLOR FORCE_COLOR COLORTERM LANG LC_ALL LC_CTYPE TZ".split()
)


def look(words: Sequence[str | Path], **options: Any) -> Look:
    """What a command leaves on a terminal. For the options see `Terminal`."""
    return Terminal(words, **options).end()


def keep(name: str, seen: Look, place: Path | None = None, *, styled: bool = False) -> None:
    """Compare what is seen with what is kept under this name in tests/screens/, or write it: `make screens`.

    Args:
        place: what stands as /etc/systemd/system on the screen, see `place_path()`.
        styled: with colours and the like, see `Look.styled`.
    """
    seen = replace(seen, written=_masked(seen.written, place))
    path, now = SCREENS / f"{name}.txt", seen.styled if styled else seen.text
    if os.environ.get(REWRITE):
        path.write_text(now, encoding="utf-8")
        return
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    assert now == before, f"{name} looks another way now (`make screens` writes it down):\n{now}"


def _masked(written: str, place: Path | None) -> str:
    """Without what is another in each run: digests, times, durations, PIDs, paths. Before it is drawn: once a line is
    folded, nothing can be told any more."""
    known: dict[str, str] = {}

    def digest(found: re.Match[str]) -> str:
        # By the first digits: it may be cut.
        sign = known.setdefault(found[0][:8], f"{len(known) % 16:x}")
        return sign * len(found[0])

    def mask(text: str) -> str:
        text = text.replace(str(place), _HOST) if place is not None else text
        text = _TIME.sub("2026-01-02 03:04:05", _DIGEST.sub(digest, text))
        text = _AGO.sub(lambda found: "5 s ago".rjust(len(found[0])), text)
        text = _PID.sub(lambda found: re.sub(r"\d+", "4711", found[0]), text)
        return _DURATION.sub("3 ms", _SIZE.sub("of 20000 bytes", text))

    parts = re.split(r"(\x1b\[[0-9;?]*[A-Za-z])", written)
    return "".join(part if part.startswith("\x1b") else mask(part) for part in parts)
