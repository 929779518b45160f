# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people and programs ask of the daemon over its Varlink socket, how it answers, and how people see the answer.

In come calls of clients, of which any may be hostile. Out come status, plan, history, and the outcome of what was
dropped. Each reply goes through redact.py. What is in files (`origin`, `diff`) the command reads itself, with the
rights of who asks. This room never changes a service itself: it asks for a round.
"""
