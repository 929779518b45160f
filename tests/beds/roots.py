# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root file systems with systemd, built once by mmdebstrap and kept in a cache outside the checkout.

`python -m beds.roots` builds all of them, so that `make test` can show that it is at it.

The cache is `$CONFEXT_BEDS_CACHE`, by default /var/cache/confext-watcher-beds. A root is kept under a name that
carries a digest of its recipe: a changed list of packages is another root, and the outdated one goes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from support import needs

SUITES = {"262": "forky", "257": "trixie", "254": "bookworm-backports"}
"""Debian's suite by the version of systemd in it."""

_BASE = """
    systemd systemd-sysv dbus python3 procps mount kmod iproute2
    squashfs-tools erofs-utils e2fsprogs rsync openssl attr
""".split()
# What tests run in there besides, and what the project needs of Debian.
_MORE = """
    libseccomp2 systemd-container systemd-repart libcryptsetup12 nginx-light openssh-server openssh-client strace curl
    python3-trio python3-psutil python3-structlog python3-jeepney python3-rich python3-varlink
""".split()

_PACKAGES = {"forky": _BASE + _MORE, "trixie": _BASE + _MORE, "bookworm-backports": _BASE}

SERVICES = """
    apache2 haproxy bind9 unbound postfix dovecot-core dovecot-imapd chrony rsyslog prometheus
    prometheus-node-exporter postgresql redis-server valkey-server mosquitto squid keepalived caddy systemd-resolved
""".split()
"""What `contrib/recipes/` has recipes for, besides what each root has."""

_OPTIONS = [
    "--mode=root",
    "--variant=essential",
    "--skip=check/qemu",
    # A suite in the making may carry a Release file past its date.
    "--aptopt=Acquire::Check-Valid-Until false",
    "--aptopt=APT::Install-Recommends false",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/info/*",
    # Services start when a test starts them; what a container cannot have must not make its state "degraded".
    "--customize-hook=for unit in nginx ssh rsync; do chroot \"$1\" systemctl --quiet disable $unit || :; done",
    "--customize-hook=chroot \"$1\" systemctl --quiet mask sys-kernel-debug.mount sys-kernel-tracing.mount"
    " dev-mqueue.mount dev-hugepages.mount systemd-udevd.service getty.target",
]  # fmt: skip

# None of the many that the packages enable starts before a test starts it.
_DISABLE_ALL = [
    '--customize-hook=mkdir -p "$1/etc/systemd/system-preset"'
    " && echo 'disable *' >\"$1/etc/systemd/system-preset/00-bed.preset\""
    ' && chroot "$1" systemctl --quiet preset-all --preset-mode=disable-only',
]


class BuildFailed(Exception):
    """A root file system could not be built: `str()` ends with what mmdebstrap said last."""


def cache_directory() -> Path:
    """Where roots are kept and containers live."""
    return Path(os.environ.get("CONFEXT_BEDS_CACHE") or "/var/cache/confext-watcher-beds")


def build(suite: str) -> Path:
    """The root file system of a suite (a value of `SUITES`), built unless it is in the cache. Never write to it.

    Raises:
        BuildFailed: no mmdebstrap, no network, or anything else that mmdebstrap says.
    """
    return cached(suite, recipe(suite), lambda root: bootstrap(suite, root))


def build_services(suite: str) -> Path:
    """The same with `SERVICES`, none of which starts by itself: 900 MB, made only for the tests that need it.

    Raises:
        BuildFailed: see `build()`.
    """
    made_of = recipe(suite, SERVICES) + repr(_DISABLE_ALL)
    return cached(
        f"{suite}-services", made_of, lambda root: bootstrap(suite, root, SERVICES, options=_DISABLE_ALL)
    )


def recipe(suite: str, more: Sequence[str] = ()) -> str:
    """All that decides what `bootstrap()` makes, but for what Debian has at that time."""
    return repr((suite, [*_PACKAGES[suite], *more], _OPTIONS))


def cached(kind: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """What is kept in the cache as `kind` by this recipe; it is made if it is not there, and outdated ones go.

    Args:
        make: called with the path at which it is to make it.
    """
    name = f"{kind}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    found = cache / name
    with _locked(cache / f".{kind}.lock"):
        if not found.exists():
            unfinished = found.with_name(f".{name}.new")
            if unfinished.exists():
                shutil.rmtree(unfinished)
            make(unfinished)
            unfinished.rename(found)
            for outdated in cache.glob(f"{kind}-" + "[0-9a-f]" * 12):
                if outdated != found:
                    shutil.rmtree(outdated)
    return found


def bootstrap(
    suite: str,
    root: Path,
    more: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> None:
    """Have mmdebstrap make a root file system.

    Args:
        root: a directory that is not there.
        more: packages besides those of the suite's containers.
        env: of mmdebstrap, and of the packages' scripts.
        options: of mmdebstrap, besides those of all roots.

    Raises:
        BuildFailed: see `build()`.
    """
    mmdebstrap = shutil.which("mmdebstrap")
    if mmdebstrap is None:
        raise BuildFailed("mmdebstrap is not installed")
    print(f"building a root file system of {suite} in {root.parent}", flush=True)
    started = time.monotonic()
    log = cache_directory() / f".{suite}{'-more' if more else ''}.log"
    with log.open("wb") as output:
        done = subprocess.run(
            [
                mmdebstrap,
                *_OPTIONS,
                *options,
                f"--include={','.join([*_PACKAGES[suite], *more])}",
                *_suite_options(suite),
                str(root),
                *_sources(suite),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            check=False,
        )
    if done.returncode != 0:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise BuildFailed(f"mmdebstrap could not build {suite} (all of it in {log}):\n{said}")
    print(f"built {suite} in {time.monotonic() - started:.0f} s", flush=True)


def _suite_options(suite: str) -> list[str]:
    base = suite.removesuffix("-backports")
    return [base] if base == suite else [f"--aptopt=APT::Default-Release {suite}", base]


def _sources(suite: str) -> list[str]:
    mirror = _mirror()
    base = suite.removesuffix("-backports")
    if base == suite:
        return [mirror] if mirror else []
    if mirror is None:
        raise BuildFailed(f"{suite} needs a Debian mirror in apt's sources")
    return [f"deb {mirror} {base} main", f"deb {mirror} {suite} main"]


def _mirror() -> str | None:
    """The machine's own Debian mirror, as its apt knows it; None where it has none (mmdebstrap has a default)."""
    listed = subprocess.run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = (line.split() for line in listed.stdout.splitlines())
    return next((row[3] for row in rows if row[:3] == ["Debian", "Debian", "main"]), None)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time, the others wait and find its work done."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build all roots; where none can be had, say why in one line."""
    reason = needs.lacking(needs.bed.mark)
    if reason:
        print(f"skipped: {reason}")
        return 0
    # Two at a time: one waits for the network while another unpacks.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tried = [pool.submit(build, suite) for suite in SUITES.values()]
    failures = [error for error in (one.exception() for one in tried) if error is not None]
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
