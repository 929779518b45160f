# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher doctor` (cli/doctor.py, doctor/services.py) with real services."""

from __future__ import annotations

import json
import os

from scenarios.place import Place


def findings(place: Place, status: int) -> dict[str, list[tuple[str, str, str]]]:
    """(level, text, what helps), by what they are about."""
    done = place.run("doctor", "--json", check=False)
    assert done.returncode == status, done
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in json.loads(done.stdout)["findings"]:
        found.setdefault(one["about"], []).append((one["level"], one["text"], one["helps"]))
    return found


def warnings(place: Place, about: str) -> list[tuple[str, str, str]]:
    return [one for one in findings(place, 0)[about] if one[0] == "warning"]


def test_without_a_daemon_nothing_is_used_and_that_is_an_error(place: Place) -> None:
    found = findings(place, 1)
    assert found["daemon"] == [
        ("error", "does not run: nothing that is dropped is used", "confext-watcher run")
    ]
    said = place.run("doctor", check=False).stdout
    assert "error:   daemon: does not run" in said and "\n         confext-watcher run\n" in said
    assert said.splitlines()[-1].startswith("1 error, ")


def test_where_all_is_well_it_says_so(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1")
    service.reloaded("1")
    found = findings(place, 0)
    assert found["daemon"] == [("ok", "runs; 1 service takes part", "")]
    assert found[service.name] == [("ok", "what is dropped is looked at", "")]


def test_a_directory_that_others_may_write_to_is_a_warning_with_what_to_do(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1")
    service.reloaded("1")
    service.versions.chmod(0o777)
    ((level, text, _),) = findings(place, 0)[service.name]
    assert level == "warning" and str(service.versions) in text and "chmod" in text
    service.versions.chmod(0o755)
    place.drops(service.name).chmod(0o777)
    ((level, text, _), *_) = findings(place, 0)[service.name]
    assert level == "warning" and str(place.drops(service.name)) in text and "chmod" in text


def test_a_setting_that_does_not_count_is_a_warning(place: Place) -> None:
    place.configure("SettleSec=soon", "Sttle=1")
    place.start_daemon()
    texts = [text for level, text, _ in findings(place, 0)["settings"] if level == "warning"]
    assert (
        len(texts) == 2 and "SettleSec= is not a time span" in texts[0] and "Sttle= is not known" in texts[1]
    )


def test_what_is_kept_out_or_was_put_back_by_hand_is_a_warning(place: Place) -> None:
    place.start_daemon()
    service = place.start("--reload-signal=SIGHUP", "--check=grep -qv bad /etc/web.conf")
    for version in ("1", "2"):
        service.put(version)
        service.reloaded(version)
    service.put("3", value="bad")
    service.logged("refused", "3")
    helps = f"confext-watcher rollback --forget {service.name}"
    ((_, text, command),) = warnings(place, service.name)
    assert "_3" in text and "is kept out: check" in text and command == helps
    place.run("rollback", service.name)
    assert any("stays by hand" in text for _, text, _ in warnings(place, service.name))


def test_it_changes_nothing(place: Place) -> None:
    place.start_daemon()
    service = place.start()
    service.put("1")
    service.reloaded("1")

    def everything() -> list[tuple[str, int]]:
        return sorted(
            (entry.path, entry.stat(follow_symlinks=False).st_mtime_ns)
            for top in (place.state / "store", place.state / "units", place.conf)
            for directory, _, _ in os.walk(top)
            for entry in os.scandir(directory)
        )

    before = everything()
    place.run("doctor", check=False)
    assert everything() == before
