"""What is wrong with this host, and what to do about it.

What comes in are the settings; what goes out are findings: ok, a warning or an error, each with what helps. It asks the
kernel, systemd and the files themselves, so that it answers also where the daemon does not run, for whatever reason.
This room never changes anything.
"""
