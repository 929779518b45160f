# SPDX-License-Identifier: LGPL-2.1-or-later
"""confext-watcher: changing a service's configuration is copying one file."""

__version__ = "0.1.0"
