"""What makes a unit take part, and no longer.

What comes in are the name of a unit and what a person wants of it; what goes out are directories, first images and
drop-ins beside the unit's files, made so that they can be taken away again. This room never restarts a service and
never touches a mount: the daemon and systemd do that, when they see what was made.
"""
