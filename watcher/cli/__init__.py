"""The command line.

What comes in are the words of one command; what goes out are its lines, or one JSON object, and an exit status.
`main.py` runs the module that has the command's name; that module imports what the command alone needs, so that each
command starts fast. This room never decides what becomes of a service: it asks the daemon, or looks by itself.
"""
