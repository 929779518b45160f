# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: services, daemons, images, a file system that hangs, and what is asked of the machine."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The directory that README.md is in."""
