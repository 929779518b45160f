# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel does: system calls, mount namespaces, overlays, and the swap of one stack for another.

In come a process of a service and a stack of copies. Then the service shows this stack on `/etc`, in all of its mount
namespaces, or still the one that it had. What a service shows is always read from its mount table. This room never
mounts in a namespace that it has not just proved to be the service's, and never talks to a service or its manager.
"""
