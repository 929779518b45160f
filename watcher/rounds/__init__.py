# SPDX-License-Identifier: LGPL-2.1-or-later
"""One service, one round: observe, decide, take one step, and again, until nothing is left to do.

In comes the name of a service of which something changed. Out comes the time of the next round, or none. A round starts
from what is on disk and what is mounted now, so that a lost event, a kill or a restart all lead to the same end:
another round. This room never gives a running service a stack that its next start would not get.
"""
