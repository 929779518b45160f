# SPDX-License-Identifier: LGPL-2.1-or-later
"""Services that systemd runs: over D-Bus, and through drop-ins that make a unit start on its slots.

In come unit files, and what systemd answers about their units. Out come services, jobs, and the text of drop-ins.
The generator uses unit_files.py, unit_drop_in.py and what they import, while systemd waits: the standard library alone.
This room never assumes a state of systemd that it has not asked for.
"""
