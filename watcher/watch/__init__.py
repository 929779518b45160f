# SPDX-License-Identifier: LGPL-2.1-or-later
"""Something changed: which paths matter, and when they have been quiet for long enough.

In come interests, the paths that a look at a service's directories depends on. Out goes the name of each service whose
paths changed; settle.py tells the daemon when the burst of changes is over. Threads follow links to where they lead,
because any path may hang: the event loop never looks one up. This room never decides what a change means.

Apart from that, base.py and freshness.py keep services up to date with the host's own `/etc`, on which stacks lie.
"""
