# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's syntax and its words: unit files, values, specifiers, unit names, `watcher.conf`, `[X-Confext]`.

In come texts that any user may have written. Out come settings with their units (usec, bytes), and a remark for each
line that was not understood. The generator reads unit files with this room while systemd waits: the standard library
alone, and next to no imports. This room never fails because of what is written in a file.
"""
