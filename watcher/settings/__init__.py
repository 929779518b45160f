# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's syntax and its words: unit files, values, specifiers, unit names, `watcher.conf`, `[X-Confext]`.

In come texts that anybody may have written. Out come settings with their units (usec, bytes), and a remark for each
line that was not understood. The standard library alone, and next to no imports: the generator reads unit files
while systemd waits. This room never fails for what is written in a file.
"""
