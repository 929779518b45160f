# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dropped file is: its format, whether it is complete, whether it may be a layer, and our own copy of it.

In comes a candidate, a path that strangers can change at any moment. Out comes a copy in the store, whole and named
by its digest, with what is proved of it, or one line that says why not. The accepted stacks, made of these copies,
are kept here too, each with the record of its service. `build` makes images by the same rules. For `origin` and
`diff` it says which layer a file comes from. This room never enters a service and never decides which stack is
wanted.
"""
