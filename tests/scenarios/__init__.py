# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole line without systemd, as people use it: the real commands, real programs, real images and trees."""
