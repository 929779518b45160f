# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the watcher remembers and says: the log, the history, the record of each service, the schema of its answers.

In come events, and what was decided. Out come entries in the journal, rows of the ledger, the content of records, and
JSON in one form for the socket and for `--json`. durable.py gets files onto the disk. This room never decides anything.
"""
