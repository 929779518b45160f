# SPDX-License-Identifier: LGPL-2.1-or-later
"""A race: the owner of a drop directory, who does all that he can, against a daemon that applies what lies in it.

Whatever he does, the service's `/etc` is always exactly one of the contents that were whole: no mixture of two, no half
of one, and nothing of root's. `make race` runs it for a minute; `test_race.py` for a few seconds, and on daemons that
were broken on purpose, so that the harness is known to see it.
"""
