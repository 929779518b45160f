# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stays and is kept up to date, for `status --follow` and `wait`.

On a terminal that is rich's Live, which knows how to draw over itself and to give the cursor back; loaded there alone.
Elsewhere each change is one line. Ctrl-C ends it: `main` has the exit status.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from watcher.cli import show, show_status, terminal
from watcher.control.client import Closed, NotRunning
from watcher.model import printable, shown
from watcher.records.schema import ServiceStatus, to_dict

_LOOK_SEC = 1.0
_DRAWN_PER_SEC = 5.0
_AWAY = "confext-watcher does not run; it is waited for"


class Spinner:
    """A line that turns, at the end of what was printed: what goes on, and for how long.

    Attributes:
        words: what goes on.
    """

    def __init__(self) -> None:
        self.words = ""
        self._since = time.monotonic()

    def say(self, words: str) -> None:
        """Something else goes on from now on, or the same."""
        if words != self.words:
            self.words, self._since = words, time.monotonic()

    def __str__(self) -> str:
        signs = (
            "\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f" if terminal.is_utf8() else "|/-\\"
        )
        sign = signs[int(time.monotonic() * _DRAWN_PER_SEC) % len(signs)]
        return f"{sign} {self.words}, {int(time.monotonic() - self._since)} s"


def write(lines: Sequence[str]) -> None:
    """Print lines at once, also into a pipe."""
    print("\n".join(lines), flush=True)


@contextlib.contextmanager
def spinning(text: Callable[[], str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """Draws the text several times a second on a terminal, beneath what is printed. Yields what prints lines there.

    What is drawn is gone at the end.
    """
    if not terminal.is_terminal():
        yield write
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)

    def drawn() -> Text:
        return Text.from_ansi(text(), overflow="fold")

    def live() -> Live:
        return Live(
            console=console,
            get_renderable=drawn,
            transient=True,
            refresh_per_second=_DRAWN_PER_SEC,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    shown_now = live()
    shown_now.start()

    def say(lines: Sequence[str]) -> None:
        nonlocal shown_now
        shown_now.stop()
        write(lines)
        shown_now = live()
        shown_now.start()

    try:
        yield say
    finally:
        shown_now.stop()


def status(
    services: Sequence[ServiceStatus], look: Callable[[], Sequence[ServiceStatus]], *, as_json: bool = False
) -> None:
    """Follows services until it is interrupted.

    Args:
        services: as they are at first.
        look: how they are now. Raises NotRunning, Closed: the daemon is being restarted.
        as_json: one JSON object a line for each service that is another than it was.
    """
    now, away = list(services), ""

    def drawn() -> str:
        lines = [*show_status.glance(now), "", *([away] if away else [])]
        return "\n".join([*lines, "Ctrl-C ends this"])

    on_terminal = terminal.is_terminal() and not as_json
    told: dict[str, str] = {}
    with contextlib.ExitStack() as held:
        if on_terminal:
            held.enter_context(spinning(drawn))
        while True:
            if not on_terminal:
                _tell(now, told, as_json=as_json)
            time.sleep(_LOOK_SEC)
            try:
                now, away = list(look()), ""
            except (NotRunning, Closed):
                if not away and not on_terminal:
                    print(f"confext-watcher: {_AWAY}", file=sys.stderr)
                away = _AWAY


def _tell(services: Sequence[ServiceStatus], told: dict[str, str], *, as_json: bool) -> None:
    """A line for each service that is another than it was told before."""
    for service in services:
        line = show.as_json(to_dict(service), compact=True) if as_json else _line(service)
        if told.get(service.service) != line:
            told[service.service] = line
            print(line if as_json else f"{show.when(time.time_ns() // 1000)}  {line}", flush=True)
    for name in told.keys() - {service.service for service in services}:
        del told[name]
        if not as_json:
            print(f"{show.when(time.time_ns() // 1000)}  {shown(name)}: takes no part any more", flush=True)


def _line(service: ServiceStatus) -> str:
    labels = ", ".join(layer.label for layer in reversed(service.layers))
    runs_on = labels or ("its own /etc" if service.pid else service.state)
    words = [runs_on, show_status.outcome(service), *([service.step] if service.step else [])]
    wrong = [printable(text) for text, _ in show_status.problems(service, elapsed=False)]
    return f"{shown(service.service)}: {', '.join(words)}" + "".join(f"; {text}" for text in wrong)
