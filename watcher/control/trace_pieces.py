# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a message of the process that looks begins with, for both ends of its pipe: trace_process.py, trace_program.py.

A message ends with a NUL; JSON has none in it.
"""

from __future__ import annotations

MORE, LAST, ERROR = b"+", b".", b"!"
