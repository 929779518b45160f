# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who runs the services: systemd, or `confext-watcher exec` where there is no systemd.

In come requests: reload, start again, run a command as the service would run it. Out come services as they are now
(base.py), the same for every manager. enter.py and what it imports run with the rights of a service: the standard
library alone. This room never looks at images and never mounts.
"""
