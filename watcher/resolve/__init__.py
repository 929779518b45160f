# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service should have, by the files alone: `.confext.d/`, `.v/`, versions, counters, release files.

In comes what a unit declares. Out comes a `Look`: for each entry its candidates, best first, and what must be watched
to notice that the answer changes. Pure, but for the one look at the directories (scan.py), which also judges who could
change what they lead to (strict_modes.py). This room never opens an image and never changes a file.
"""
