# SPDX-License-Identifier: LGPL-2.1-or-later
"""Man pages and completions say what the program does: all of it, and nothing else."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from support.needs import tool, which
from watcher.images import tries
from watcher.model import Event, Kind, Layer, Outcome, Protection, Trust, Verdict
from watcher.records import journal
from watcher.settings import config

CONTRIB = Path(__file__).parent.parent / "contrib"
MAN = CONTRIB / "man"
PAGES = sorted(path for path in MAN.iterdir() if path.suffix[1:].isdigit())
COMPLETIONS = CONTRIB / "completions"


@cache
def help_of(*command: str) -> str:
    words = [sys.executable, "-m", "watcher", *command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def commands() -> list[str]:
    listed = help_of().partition("COMMAND\n")[2]
    return re.findall(r"^ {4}(\w+)", listed, re.MULTILINE)


def options(*command: str) -> set[str]:
    """What `--help` of a command lists: "--json", "-n"."""
    listed = re.findall(r"^ {2}(-.*?)(?: {2,}|$)", help_of(*command), re.MULTILINE)
    return {option for line in listed for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line)}


ALL = {option for command in commands() for option in options(command)} | options()


def flags(text: str) -> set[str]:
    """The options that mdoc source marks as such."""
    return {f"-{flag}" for flag in re.findall(r"\bFl (-?[a-z][a-z-]*)", text)}


def section(page: str, start: str, end: str) -> str:
    return page[page.index(start) : page.index(end)]


# --- man pages ---


OF_THE_DAEMON = {"run", "exec"}  # these are in confext-watcher(8), what people type is in confext-watcher(1)
COMMAND_PAGES = [MAN / "confext-watcher.1", MAN / "confext-watcher.8"]


def page_of(command: str) -> str:
    return COMMAND_PAGES[command in OF_THE_DAEMON].read_text()


@pytest.mark.parametrize("path", COMMAND_PAGES, ids=lambda path: path.name)
def test_every_command_is_in_one_man_page(path: Path) -> None:
    page = path.read_text()
    wanted = sorted(command for command in commands() if page_of(command) == page)
    listed = re.findall(r"^\.It Cm (\w+)$", section(page, ".Sh COMMANDS", ".Sh ENVIRONMENT"), re.MULTILINE)
    assert sorted(listed) == wanted
    synopsis = section(page, ".Sh SYNOPSIS", ".Sh DESCRIPTION")
    assert sorted(re.findall(r"^\.Cm (\w+)$", synopsis, re.MULTILINE)) == wanted


def test_every_option_is_in_a_man_page_and_no_other() -> None:
    described = [section(path.read_text(), ".Sh COMMANDS", ".Sh ENVIRONMENT") for path in COMMAND_PAGES]
    items = "\n".join(re.findall(r"^\.It Fl .*$", "\n".join(described), re.MULTILINE))
    assert flags(items) == ALL


@pytest.mark.parametrize("command", commands())
def test_the_synopsis_has_the_options_of_(command: str) -> None:
    synopsis = section(page_of(command), ".Sh SYNOPSIS", ".Sh DESCRIPTION")
    lines = next(part for part in synopsis.split(".Nm\n") if part.startswith(f".Cm {command}\n"))
    own = options(command) - {"-h", "--help", "-f", "-n", "-v"}
    assert flags(lines) == ({"--name"} if command == "exec" else own)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_references_to_our_own_pages_lead_somewhere(page: Path) -> None:
    ours = {tuple(path.name.rsplit(".", 1)) for path in PAGES}
    text = page.read_text()
    found = set(re.findall(r"\bXr (\S*watcher\S*) (\d)", text))
    assert found <= ours
    text = re.sub(r"(?: [,.;:])?\n(?=in\n\.Xr )", " No ", text).replace(" No in\n.Xr ", " No in Xr ")
    sections = r"\bSx ([^,\n]*?)(?: No in Xr (\S+ \d))?(?: [,.;:].*)?$"
    for name, title in re.findall(sections, text, re.MULTILINE):
        there = (MAN / title.replace(" ", ".")).read_text() if title else text
        assert f"\n.Ss {name}\n" in there or f"\n.Sh {name}\n" in there, name


def test_references_from_elsewhere_to_our_pages_lead_somewhere() -> None:
    ours = {path.name for path in PAGES}
    units = CONTRIB.parent / "units"
    for path in (*units.iterdir(), *CONTRIB.parent.glob("*.md")):
        for name, number in re.findall(r"((?:confext-)?watcher[a-z.-]*)\((\d)\)", path.read_text()):
            assert f"{name}.{number}" in ours, path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@tool("mandoc")
def test_it_fits_a_terminal_of_80_columns(page: Path) -> None:
    words = ["mandoc", "-T", "utf8", "-O", "width=78", page]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert max(len(re.sub(".\b", "", line)) for line in shown.splitlines()) <= 80


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("WATCHER SETTINGS", config._WATCHER_KEYS),
        ("SERVICE SETTINGS", config._SERVICE_KEYS),
    ],
)
def test_every_setting_is_in_the_man_page_and_no_other(heading: str, keys: dict[str, object]) -> None:
    page = (MAN / "watcher.conf.5").read_text()
    described = page.partition(f".Sh {heading}\n")[2].partition("\n.Sh ")[0]
    items = re.findall(r"^\.It Va (.*)$", described, re.MULTILINE)
    assert sorted(key for item in items for key in re.findall(r"(\w+)=", item)) == sorted(keys)


def test_counted_tries_are_in_the_man_page_as_they_are_made() -> None:
    page = (MAN / "confext-watcher.8").read_text()
    text = page.partition(".Ss Counted tries\n")[2].partition("\n.Ss ")[0]
    first, then, good = re.findall(r"^\.Pa (web_1\.4.*\.raw) ?[:.,]?$", text, re.MULTILINE)
    counters = tries.counted(f"/srv/web.raw.v/{first}")
    assert counters is not None
    assert (counters.next(), counters.good()) == (then, good)
    for words in ("Services that share a directory share it", ".Cm rollback Fl -forget", ".Pa +0\n"):
        assert words in text


def test_the_fields_of_the_journal_are_in_the_man_page() -> None:
    values: dict[str, Any] = {field.name: field.name for field in dataclasses.fields(Event)}
    layer = Layer("", "", "", "digest", Kind.IMAGE, "", Trust(Protection.SIGNED, "CN=ops"))
    event = Event(**values | {"outcome": Outcome.APPLIED, "layers": (layer,)})
    with capture_logs() as entries:
        journal.record(event)
    fields = set(entries[0]) - {"event", "log_level", "message_id", "notice"}
    page = (MAN / "confext-watcher.service.8").read_text()
    assert set(re.findall(r"\bCONFEXT_(\w+)=(?= ,|$)", page, re.MULTILINE)) == {
        name.upper() for name in fields
    }


@pytest.mark.parametrize(("name", "values"), [("OUTCOME", Outcome), ("VERDICT", Verdict)])
def test_the_words_in_the_journal_are_in_the_man_page(name: str, values: type[enum.Enum]) -> None:
    page = (MAN / "confext-watcher.service.8").read_text()
    item = page.partition(f"\n.It Va CONFEXT_{name}=\n")[2].partition("\n.It ")[0]
    listed = re.findall(r"[a-z-]+", " ".join(re.findall(r"^\.Li (.*)$", item, re.MULTILINE)))
    assert listed == [value.value for value in values]


def test_the_journals_catalog_names_verdicts_that_there_are() -> None:
    catalog = (CONTRIB.parent / "units/confext-watcher.catalog").read_text()
    assert set(re.findall(r"\bCONFEXT_VERDICT=([a-z-]+)", catalog)) == {Verdict.CHECK_FAILED.value}


def test_the_journals_catalog_names_commands_that_there_are() -> None:
    catalog = (CONTRIB.parent / "units/confext-watcher.catalog").read_text()
    assert set(re.findall(r"\bconfext-watcher ([a-z]+)", catalog)) <= set(commands())


def test_the_recipes_are_in_their_man_page_as_they_are() -> None:
    script = CONTRIB / "recipes_page.py"
    page = MAN / "confext-watcher-recipes.7"
    assert runpy.run_path(str(script))["page"](page.read_text()) == page.read_text(), f"run {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@tool("groff")
def test_groff_has_nothing_to_say_about_(page: Path) -> None:
    done = subprocess.run(
        ["groff", "-ww", "-mdoc", "-Tutf8", "-z", page], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@tool("mandoc")
def test_mandoc_has_nothing_to_say_about_(page: Path) -> None:
    done = subprocess.run(["mandoc", "-T", "lint", page], capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "referenced manual not found" not in line]
    assert said == []


# --- completions ---


def complete(shell: str, *words: str, state: Path | None = None) -> set[str]:
    """What a shell offers for the last of the words."""
    if shell == "bash":
        script = (
            f'source {COMPLETIONS}/confext-watcher.bash; COMP_WORDS=(confext-watcher "$@"); COMP_CWORD=$#;'
            " _confext_watcher 2>/dev/null; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        arguments = ["bash", "-c", script, "bash", *words]
    else:
        line = " ".join(("confext-watcher", *words))
        arguments = ["fish", "-c", f"source {COMPLETIONS}/confext-watcher.fish; complete -C'{line}'"]
    environment = os.environ | ({"STATE_DIRECTORY": str(state)} if state else {})
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


SHELLS = [pytest.param(shell, marks=tool(shell)) for shell in ("bash", "fish")]


@pytest.mark.parametrize("shell", SHELLS)
def test_all_commands_are_completed(shell: str) -> None:
    assert {word for word in complete(shell, "") if not word.startswith("-")} == set(commands())


@pytest.mark.parametrize("command", commands())
@pytest.mark.parametrize("shell", SHELLS)
def test_all_options_are_completed(shell: str, command: str) -> None:
    wanted = {option for option in options(command) if option.startswith("--")}
    assert {word for word in complete(shell, command, "--") if word != "--"} == wanted


@pytest.mark.parametrize("shell", SHELLS)
def test_names_of_services_are_completed(shell: str, tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    for slots in ("web.service", "web-app.exec"):  # of a unit, and of a service that `exec` started
        (tmp_path / "units" / slots).symlink_to(f"../stacks/{slots}/00000001-empty")
    assert complete(shell, "status", "w", state=tmp_path) == {"web.service", "web-app"}


def test_zsh_has_all_commands_and_options() -> None:
    path = COMPLETIONS / "_confext-watcher"
    text = path.read_text()
    assert re.findall(r"^ {8}'(\w+):", text, re.MULTILINE) == commands()
    assert set(re.findall(r"(?<![\w(-])--[a-z][a-z-]*(?=[\[}])", text)) == {
        option for option in ALL if option.startswith("--")
    }
    if which("zsh"):
        subprocess.run(["zsh", "-n", path], check=True)
