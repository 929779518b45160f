# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host does in its own `/etc`, and what a service on a stack sees of it: programs that tests run in there."""

from __future__ import annotations

LIVE = "/etc/letsencrypt/live/site"
TLS = f"""
server {{
    listen 127.0.0.1:8443 ssl;
    ssl_certificate {LIVE}/fullchain.pem;
    ssl_certificate_key {LIVE}/privkey.pem;
    location / {{ return 200 ok; }}
}}
"""

# Renews the certificate of nginx as certbot does, and reloads nginx in the very next line. Prints how often nginx then
# served the new one. A worker of before may take a connection for a moment. No burst is longer than what is followed
# without pauses (watch/freshness.py): in one, nginx may read the old certificate in the pause, and keeps it then.
RENEW = """
import os, socket, ssl, subprocess, sys, time
live, archive, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
def make(number):
    if os.path.exists(f"/run/cert{number}"):
        return
    key, cert = f"{archive}/privkey{number}.pem", f"{archive}/fullchain{number}.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-keyout", f"/run/key{number}", "-out", f"/run/cert{number}", "-subj", f"/CN=number{number}"],
        check=True, capture_output=True)
def renew(number):
    for kind, made in (("privkey", "key"), ("fullchain", "cert")):
        with open(f"{archive}/{kind}{number}.pem", "w") as file:
            file.write(open(f"/run/{made}{number}").read())
    for kind in ("privkey", "fullchain"):
        os.symlink(f"../../archive/site/{kind}{number}.pem", f"{live}/.{kind}.new")
        os.rename(f"{live}/.{kind}.new", f"{live}/{kind}.pem")
def served():
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", 8443)) as plain, context.wrap_socket(plain) as tls:
        return tls.getpeercert(binary_form=True)
def shows(number):
    wanted = ssl.PEM_cert_to_DER_cert(open(f"/run/cert{number}").read())
    deadline = time.monotonic() + 2
    while served() != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
for number in range(times + 1):
    make(number)
os.makedirs(live, exist_ok=True)
os.makedirs(archive, exist_ok=True)
renew(0)
if times:
    good = 0
    for number in range(1, times + 1):
        renew(number)
        subprocess.run(["systemctl", "reload", "nginx"], check=True)
        good += shows(number)
        if number % 4 == 0:
            time.sleep(0.6)
    print(good)
"""

# Reads a file that the host replaces all the time: by path, through a directory that it holds, and another one that is
# written in place. At SIGTERM it writes down when it last saw each content.
READER = """
import json, os, signal, sys, time
etc = os.open("/etc", os.O_PATH)
last, errors, reads, going = {}, [], 0, [True]
pause = float(sys.argv[1]) if sys.argv[1:] else 0
signal.signal(signal.SIGTERM, lambda *_: going.clear())
while going:
    for way, directory, path in (("path", None, "/etc/hot"), ("held", etc, "hot")):
        now = time.monotonic()
        try:
            fd = os.open(path, os.O_RDONLY, dir_fd=directory)
            seen = os.read(fd, 64).decode()
            os.close(fd)
        except OSError as error:
            errors.append(str(error))
        else:
            last[way + seen] = now
        reads += 1
    if pause:
        time.sleep(pause)
json.dump({"last": last, "errors": errors, "reads": reads}, open("/run/reader.new", "w"))
os.rename("/run/reader.new", "/run/reader")
"""

WRITER = """
import json, os, sys, time
written = {}
for number in range(int(sys.argv[1])):
    with open("/etc/.hot", "w") as file:
        file.write(str(number))
    os.rename("/etc/.hot", "/etc/hot")
    written[number] = time.monotonic()
    time.sleep(0.02)
json.dump(written, sys.stdout)
"""
