# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that parses strangers' bytes, fuzzed: `targets.py` says what is claimed.

`test_fuzz.py` runs the targets under hypothesis and on the corpus, in `make test`; `__main__.py` runs them under
atheris (libFuzzer), in `make fuzz`.
"""
