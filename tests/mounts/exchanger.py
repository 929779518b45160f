# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user without rights who owns a service's root directory and exchanges two names in it, as fast as possible or once
for each line that is read. He stands outside of the service, where no mount of the service holds a name in place.

    exchanger.py DIRECTORY ONE OTHER once|racing

Says "ready" when it starts, and how often it has exchanged them when its standard input ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys

NOBODY = 65534
RENAME_EXCHANGE = 2


def main() -> None:
    directory, one, other, how = sys.argv[1:]
    os.chdir(directory)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    count = 0

    def exchange() -> None:
        nonlocal count
        if libc.renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE) < 0:
            raise OSError(ctypes.get_errno(), "renameat2")
        count += 1

    print("ready", flush=True)
    if how == "once":
        for _ in sys.stdin:
            exchange()
            print("done", flush=True)
    else:
        poll = select.poll()
        poll.register(0, select.POLLIN | select.POLLHUP)
        while count % 2 or count % 64 or not poll.poll(0):
            exchange()
    print(count, flush=True)


if __name__ == "__main__":
    main()
