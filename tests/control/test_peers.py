# SPDX-License-Identifier: LGPL-2.1-or-later
"""Quotas; see test_server.py and test_strangers.py for what clients do over real sockets."""

from __future__ import annotations

import contextlib

from watcher.control import peers


def test_no_user_can_take_the_place_of_another_or_of_root() -> None:
    quota = peers.Quota(peers.CONNECTIONS, peers.CONNECTIONS_PER_USER)
    with contextlib.ExitStack() as stack:

        def connects(uid: int) -> bool:
            return stack.enter_context(quota.take(peers.Peer(1, uid)))

        assert all(connects(1000) for _ in range(peers.CONNECTIONS_PER_USER))
        assert not connects(1000)
        assert connects(1001)
        assert (
            sum(connects(uid) for uid in range(2000, 2200))
            == peers.CONNECTIONS - peers.CONNECTIONS_PER_USER - 1
        )
        assert connects(0)
    assert quota.take(peers.Peer(1, 1000)).__enter__()
