# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine with Debian 13's own kernel: an older one than the host's, with device mapper and dm-verity."""
