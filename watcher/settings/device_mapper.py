# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is a device mapper, by which systemd sets up dm-verity when it starts a unit. Standard library only."""

from __future__ import annotations

import errno
import os

CONTROL = "/dev/mapper/control"


def is_there() -> bool:
    """Containers have none, nor have kernels without dm_mod. At boot its device may come later than the generator.

    That the node is there does not say it: libdevmapper makes it when systemd has asked in vain, and a static one is
    there before the module. So it is opened, which loads that.
    """
    try:
        os.close(os.open(CONTROL, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EACCES  # a user may not; EPERM is that of a container that must not
    return True
