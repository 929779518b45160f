#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Installs the program and its units: what `make install`, the Debian package and the test beds have in common.

    install.py [--destdir DIR] [--prefix /usr/local] [--python /usr/bin/python3] [--vendor NAME]...
    install.py --uninstall [--destdir DIR] [--prefix /usr/local]

The program lives in a private directory, PREFIX/lib/confext-watcher: the name `watcher` is another package's in Debian.
There too are the modules that the distribution does not have (`--vendor`, by default inotify-simple), as they are
installed for the Python that runs this. Everything else is the distribution's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
NAME = "confext-watcher"
WRAPPER = """\
#!{python} -I
import sys
sys.path.insert(0, "{libdir}")
from watcher.cli.main import main
sys.exit(main())
"""
# Where below PREFIX/lib each file of units/ goes, and whether it is a program.
UNITS = {
    "confext-watcher.service.in": ("systemd/system/confext-watcher.service", False),
    "confext-watcher-generator.in": ("systemd/system-generators/confext-watcher-generator", True),
    "confext-watcher.preset": ("systemd/system-preset/80-confext-watcher.preset", False),
    "confext-watcher.catalog": ("systemd/catalog/confext-watcher.catalog", False),
    "confext-watcher.tmpfiles": ("tmpfiles.d/confext-watcher.conf", False),
    "confext-watcher.sysusers": ("sysusers.d/confext-watcher.conf", False),
}
# What people read and type with, and where it goes below PREFIX/share. Debian's zsh looks elsewhere than a local one.
DOCUMENTS = {
    "man/confext-watcher.1": "man/man1/confext-watcher.1",
    "man/confext-watcher.8": "man/man8/confext-watcher.8",
    "man/confext-watcher.service.8": "man/man8/confext-watcher.service.8",
    "man/confext-watcher-recipes.7": "man/man7/confext-watcher-recipes.7",
    "man/watcher.conf.5": "man/man5/watcher.conf.5",
    "completions/confext-watcher.bash": "bash-completion/completions/confext-watcher",
    "completions/_confext-watcher": "zsh/{zsh}/_confext-watcher",
    "completions/confext-watcher.fish": "fish/vendor_completions.d/confext-watcher.fish",
}


def documents(prefix: str) -> dict[str, str]:
    """Where each of `DOCUMENTS` goes."""
    zsh = "vendor-completions" if prefix == "/usr" else "site-functions"
    return {source: f"{prefix}/share/{target}".format(zsh=zsh) for source, target in DOCUMENTS.items()}


def install(destdir: Path, prefix: str, python: str, vendor: Iterable[str]) -> None:
    """Put everything below `destdir`, for a system on which that will be the root directory.

    Raises:
        OSError: something cannot be written.
        importlib.metadata.PackageNotFoundError: a module to be brought along is not installed here.
    """
    words = {"@python@": python, "@libdir@": f"{prefix}/lib/{NAME}", "@bindir@": f"{prefix}/bin"}
    library = below(destdir, words["@libdir@"])
    if library.exists():
        shutil.rmtree(library)
    shutil.copytree(SOURCE / "watcher", library / "watcher", ignore=shutil.ignore_patterns("__pycache__"))
    for name in vendor:
        copy_distribution(name, library)
    write(
        below(destdir, f"{words['@bindir@']}/{NAME}"),
        WRAPPER.format(python=python, libdir=words["@libdir@"]),
        program=True,
    )
    for source, (target, program) in UNITS.items():
        text = (SOURCE / "units" / source).read_text()
        for word, value in words.items():
            text = text.replace(word, value)
        write(below(destdir, f"{prefix}/lib/{target}"), text, program)
    for document, place in documents(prefix).items():
        write(below(destdir, place), (SOURCE / "contrib" / document).read_text(), program=False)
    remove_recipes(destdir, prefix)
    for recipe in (SOURCE / "contrib/recipes").glob("*.conf"):
        write(
            below(destdir, f"{prefix}/share/{NAME}/recipes/{recipe.name}"), recipe.read_text(), program=False
        )


def remove_recipes(destdir: Path, prefix: str) -> None:
    """Also those that are no longer ours; an administrator's own are in /etc."""
    recipes = below(destdir, f"{prefix}/share/{NAME}")
    if recipes.exists():
        shutil.rmtree(recipes)


def byte_compile(destdir: Path, prefix: str, python: str) -> None:
    """For the Python that will run it; never checked again: the directory changes only as a whole.

    Raises:
        subprocess.CalledProcessError: that Python has said why.
    """
    library = f"{prefix}/lib/{NAME}"
    told = ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(destdir), "-p", "/"]
    subprocess.run([python, "-m", "compileall", *told, str(below(destdir, library))], check=True)


def uninstall(destdir: Path, prefix: str) -> None:
    """Remove it again; the state directory stays."""
    library = below(destdir, f"{prefix}/lib/{NAME}")
    if library.exists():
        shutil.rmtree(library)
    below(destdir, f"{prefix}/bin/{NAME}").unlink(missing_ok=True)
    for target, _ in UNITS.values():
        below(destdir, f"{prefix}/lib/{target}").unlink(missing_ok=True)
    for place in documents(prefix).values():
        below(destdir, place).unlink(missing_ok=True)
    remove_recipes(destdir, prefix)


def below(destdir: Path, path: str) -> Path:
    return destdir / path.lstrip("/")


def write(path: Path, text: str, program: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Never in place: the one that is there may be running.
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.chmod(0o755 if program else 0o644)
    new.rename(path)


def copy_distribution(name: str, target: Path) -> None:
    """The modules of an installed distribution, without its metadata and tests."""
    for file in importlib.metadata.files(name) or []:
        source = Path(str(file.locate()))
        beside = {"..", "tests", "_tests"}.intersection(file.parts) or ".dist-info" in file.parts[0]
        if beside or file.suffix == ".pyc" or not stat.S_ISREG(source.stat().st_mode):
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install confext-watcher.")
    parser.add_argument("--destdir", type=Path, default=Path("/"))
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--python", default="/usr/bin/python3", help="that will run it")
    parser.add_argument("--vendor", action="append", metavar="NAME", help="distribution to bring along")
    parser.add_argument("--no-compile", action="store_true", help="do not byte-compile")
    parser.add_argument("--uninstall", action="store_true")
    options = parser.parse_args()
    if options.uninstall:
        uninstall(options.destdir, options.prefix)
        next_step(options.destdir, "systemctl daemon-reload")
        return
    install(options.destdir, options.prefix, options.python, options.vendor or ["inotify-simple"])
    if not options.no_compile:
        byte_compile(options.destdir, options.prefix, options.python)
    next_step(
        options.destdir,
        "systemd-sysusers && systemctl daemon-reload && journalctl --update-catalog"
        f" && systemctl enable --now {NAME}",
    )


def next_step(destdir: Path, command: str) -> None:
    """Say what is left to do, on the system itself."""
    if destdir == Path("/"):
        print(f"on a host with systemd, now: {command}")


if __name__ == "__main__":
    main()
