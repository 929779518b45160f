# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel grants too few inotify watches: that is said at once, whoever has to look from time to time."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.place import Place
from support.needs import userns

pytestmark = userns


@pytest.mark.parametrize("watches", [0, 3])
def test_too_few_to_find_services_by(tmp_path: Path, watches: int) -> None:
    with Place(tmp_path, trees=True) as place:
        place.inside("sh", "-c", f"echo {watches} > /proc/sys/user/max_inotify_watches")
        daemon = place.start_daemon()
        (said,) = [line for line in daemon.log.read() if "max_user_watches" in line]
        assert f"{place.runtime}/services: cannot be watched" in said and "level=warning" in said
        assert "Until then it is looked at every 30 s" in said
