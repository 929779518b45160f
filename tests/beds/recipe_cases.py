# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `test_systemd_recipes.py` does with each service: the smallest images, and a question that tells them apart."""

from __future__ import annotations

from dataclasses import dataclass, field

HOST = {
    "/etc/default/chrony": 'DAEMON_OPTS="-x -F 1"\n',  # -x: the clock is the whole machine's
    "/etc/default/prometheus-node-exporter": 'ARGS="--web.config.file=/etc/prometheus/web-config.yml"\n',
    "/etc/keepalived/keepalived.conf": "# The unit asks for one.\n",
}
"""Files of the host."""

SETUP = """
ip link add vrrp0 type veth peer name vrrp1; ip link set vrrp0 up; ip link set vrrp1 up
ip address add 10.98.1.1/24 dev vrrp0
postfix check
/usr/libexec/unbound-helper root_trust_anchor_update
systemctl --quiet enable rsyslog.service
"""
"""What else of the host the services need."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A service.

    Attributes:
        path: the file below /etc that differs between its images.
        text: of that file: `@` is replaced by a word, `first` or `second`.
        broken: is added to it in the third image.
        ask: a line for bash by which the service tells the word.
        first: the word of the first image.
        second: of the second, and of the third, which is broken.
        told: how the answer has the word: `@` is that.
        more: files below /etc that all images have.
        end: how the outcome of the third begins.
        restarts: it gets a new configuration by a restart.
        settings: lines of its drop-in, after those of the recipe.
    """

    recipe: str
    unit: str
    path: str
    text: str
    broken: str
    ask: str
    first: str = "one"
    second: str = "two"
    more: dict[str, str] = field(default_factory=dict)
    told: str = "@"
    end: str = "refused: "
    restarts: bool = False
    settings: str = ""

    def answer(self, version: int) -> str:
        """What is in the service's answer with that image."""
        return self.told.replace("@", self.first if version == 1 else self.second)

    def files(self, version: int) -> dict[str, str]:
        """Below /etc, of the first, the second or the third image."""
        text = self.text.replace("@", self.first if version == 1 else self.second)
        return {**self.more, self.path: text + (self.broken if version == 3 else "")}


_APACHE = """
ServerName localhost
ErrorDocument 404 "@"
"""
_HAPROXY = """
global
    chroot /var/lib/haproxy
    user haproxy
    group haproxy
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
frontend web
    bind 127.0.0.1:8003
    http-request return status 200 content-type text/plain string @
"""
_BIND = """
options {
    directory "/var/cache/bind";
    listen-on port 5301 { 127.0.0.1; };
    listen-on-v6 { none; };
    version "@";
};
"""
_UNBOUND = """
server:
    port: 5302
    interface: 127.0.0.1
    cache-max-ttl: @
"""
_CHRONY = """
local stratum @
driftfile /var/lib/chrony/chrony.drift
"""
_PROMETHEUS = """
global:
  external_labels:
    word: "@"
"""
_SQUID = """
http_port 127.0.0.1:3128
visible_hostname @
http_access deny all
shutdown_lifetime 1 second
"""
_KEEPALIVED = """
global_defs {
    router_id bed
    script_user root
    enable_script_security
}
vrrp_instance one {
    state MASTER
    interface vrrp0
    virtual_router_id 51
    priority 255
    advert_int 1
    virtual_ipaddress {
        @/32
    }
}
"""
_MOSQUITTO = """
listener 1883 127.0.0.1
log_dest syslog
allow_anonymous @
"""
# The answer to CONNECT ends with 0 where it is allowed to be without a name.
_CONNECT = r"""
exec 3<>/dev/tcp/127.0.0.1/1883
printf '\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00' >&3
head -c 4 <&3 | od -An -tx1 | sed 's/20 02 00 00/true/; s/20 02 00 05/false/'
"""
_REDIS = """
bind 127.0.0.1
port {port}
dir /var/lib/{name}
maxmemory @
"""


def _banner(port: int) -> str:
    return f"read -r line </dev/tcp/127.0.0.1/{port}; echo $line"


def _redis(name: str, port: int) -> Case:
    return Case(
        name,
        f"{name}-server.service",
        f"{name}/{name}.conf",
        _REDIS.format(name=name, port=port),
        "bogus 1\n",
        f"{name}-cli -p {port} config get maxmemory",
        first="5000001",
        second="5000002",
        restarts=True,
        settings=f"[X-Confext]\nHealthCheck=\nHealthCheck=/usr/bin/{name}-cli -p {port} ping\n",
    )


CASES = (
    Case(
        "nginx",
        "nginx.service",
        "nginx/sites-enabled/default",
        "server { listen 127.0.0.1:8001; return 200 @; }\n",
        "bogus;\n",
        "curl -s http://127.0.0.1:8001/",
    ),
    Case(
        "apache2",
        "apache2.service",
        "apache2/conf-enabled/word.conf",
        _APACHE,
        "Bogus\n",
        "curl -s http://127.0.0.1:8002/none",
        more={"apache2/ports.conf": "Listen 127.0.0.1:8002\n"},
    ),
    Case(
        "haproxy",
        "haproxy.service",
        "haproxy/haproxy.cfg",
        _HAPROXY,
        "bogus\n",
        "curl -s http://127.0.0.1:8003/",
    ),
    Case(
        "ssh", "ssh.service", "ssh/sshd_config.d/word.conf", "VersionAddendum @\n", "Bogus 1\n", _banner(22)
    ),
    Case(
        "bind9",
        "named.service",
        "bind/named.conf.options",
        _BIND,
        'zone "bogus" { type primary; file "/etc/bind/none"; };\n',
        "rndc status",
        told="(@)",
    ),
    Case(
        "unbound",
        "unbound.service",
        "unbound/unbound.conf.d/word.conf",
        _UNBOUND,
        "    bogus: 1\n",
        "unbound-control get_option cache-max-ttl",
        first="1001",
        second="1002",
    ),
    Case(
        "postfix",
        "postfix.service",
        "postfix/main.cf",
        "compatibility_level = 3.9\ninet_interfaces = loopback-only\nsmtpd_banner = @\n",
        "bogus\n",
        _banner(25),
    ),
    Case(
        "dovecot",
        "dovecot.service",
        "dovecot/conf.d/99-word.conf",
        "login_greeting = @\n",
        "bogus = 1\n",
        _banner(143),
    ),
    Case(
        "chrony",
        "chrony.service",
        "chrony/chrony.conf",
        _CHRONY,
        "bogus 1\n",
        "chronyc -n tracking | grep Stratum",
        first="7",
        second="9",
        restarts=True,
    ),
    Case(
        "rsyslog",
        "rsyslog.service",
        "rsyslog.d/word.conf",
        'local0.* action(type="omfile" file="/var/log/word-@")\n',
        "$Bogus 1\n",
        "logger -u /run/systemd/journal/syslog -p local0.info hello; sleep 0.2; cd /var/log; ls -t word-* | head -1",
        restarts=True,
    ),
    Case(
        "prometheus",
        "prometheus.service",
        "prometheus/prometheus.yml",
        _PROMETHEUS,
        "bogus: 1\n",
        "curl -s http://127.0.0.1:9090/api/v1/status/config",
    ),
    Case(
        "node-exporter",
        "prometheus-node-exporter.service",
        "prometheus/web-config.yml",
        "http_server_config:\n  headers:\n    X-Frame-Options: @\n",
        "bogus: 1\n",
        "curl -sI http://127.0.0.1:9100/",
        first="deny",
        second="sameorigin",
        end="rolled-back: ",
    ),
    Case(
        "postgresql",
        "postgresql@17-main.service",
        "postgresql/17/main/conf.d/word.conf",
        "work_mem = @\n",
        "bogus = 1\n",
        "runuser -u postgres -- psql -XAtc 'show work_mem'",
        first="5MB",
        second="6MB",
    ),
    _redis("redis", 6379),
    _redis("valkey", 6380),
    Case(
        "mosquitto",
        "mosquitto.service",
        "mosquitto/conf.d/word.conf",
        _MOSQUITTO,
        "bogus 1\n",
        _CONNECT,
        first="true",
        second="false",
        end="rolled-back: ",
    ),
    Case(
        "squid",
        "squid.service",
        "squid/squid.conf",
        _SQUID,
        "bogus\n",
        "curl -sI --proxy 127.0.0.1:3128 http://192.0.2.1/ | grep -i via",
    ),
    Case(
        "keepalived",
        "keepalived.service",
        "keepalived/keepalived.conf",
        _KEEPALIVED,
        "bogus\n",
        "ip -o -4 address show dev vrrp0",
        first="10.98.0.1",
        second="10.98.0.2",
    ),
    Case(
        "caddy",
        "caddy.service",
        "caddy/Caddyfile",
        ":8004\nrespond @\n",
        "bogus\n",
        "curl -s http://127.0.0.1:8004/",
    ),
    Case(
        "systemd-resolved",
        "systemd-resolved.service",
        "systemd/resolved.conf.d/word.conf",
        "[Resolve]\nDNS=@\n",
        "Bogus=1\n",
        "resolvectl dns",
        first="192.0.2.1",
        second="192.0.2.2",
        end="applied: ",
    ),
)
