# SPDX-License-Identifier: LGPL-2.1-or-later
"""The formats of images, each an object with one interface (base.py). No other room asks for one by its name.

In comes a file of which nothing is known (probe.py). Out comes its format: it says whether all of the file is there,
and mounts it. A further format is a module here, and known to probe.py. This room never believes what a
superblock says: strangers wrote it.
"""
