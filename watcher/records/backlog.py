# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to a socket whose other end may be slow: the sender never waits.

A backlog keeps what the socket does not take at once, in its order, and a thread sends it as soon as there is room. The
backlog has a bound. It counts what is beyond, and sends the count as a message: no message is lost in silence.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

MESSAGES_MAX = 1000


def wait_for_room(sock: socket.socket) -> None:
    """Wait until a connected socket takes another message, for a second at most: then there may be a new socket."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    poll.poll(1000)


class Backlog:
    """The messages of one socket; usable from any thread.

    Args:
        send: sends a message now; raises BlockingIOError when there is no room, OSError if the socket refuses it.
        wait: waits until there is room, or for a moment; see `wait_for_room()`.
        refused: gets each message that the socket refuses, and why.
        lost: makes the message that says how many did not fit.
    """

    def __init__(
        self,
        send: Callable[[bytes], None],
        wait: Callable[[], None],
        refused: Callable[[bytes, OSError], None],
        lost: Callable[[int], bytes],
    ) -> None:
        self._send = send
        self._wait = wait
        self._refused = refused
        self._lost = lost
        self._waiting: deque[bytes] = deque()
        self._count = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, message: bytes) -> None:
        """Send a message, now or later."""
        with self._lock:
            if self._thread is None and not self._waiting and self._sent(message):
                return
            if len(self._waiting) >= MESSAGES_MAX:
                self._count += 1
                return
            self._waiting.append(message)
            if self._thread is None:
                thread = threading.Thread(target=self._drain, name="backlog", daemon=True)
                with contextlib.suppress(RuntimeError):  # the limit of threads: the next message tries again
                    thread.start()
                    self._thread = thread

    def flush(self, seconds: float) -> list[bytes]:
        """Wait until all is sent, for so long at most; returns what is left, which is sent no more."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        return left

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and self._count:
                    self._waiting.append(self._lost(self._count))
                    self._count = 0
                while self._waiting and self._sent(self._waiting[0]):
                    self._waiting.popleft()
                if not self._waiting and not self._count:
                    self._thread = None
                    return
            try:
                self._wait()
            except OSError:
                time.sleep(1)  # the other end is gone: the next send says so

    def _sent(self, message: bytes) -> bool:
        try:
            self._send(message)
        except BlockingIOError:
            return False
        except OSError as error:
            self._refused(message, error)
        return True
