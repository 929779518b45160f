# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m watcher`: the command line, from a checkout."""

import sys

from watcher.cli.main import main

sys.exit(main())
