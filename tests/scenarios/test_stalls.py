# SPDX-License-Identifier: LGPL-2.1-or-later
"""An upload that stalls half-way waits for as long as it takes, whatever `SettleMaxSec=` says."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from scenarios.place import Service

SETTINGS = ("SettleSec=10ms", "SettleMaxSec=50ms", "LogLevel=debug")
images_only = pytest.mark.parametrize("shared", ["images"], indirect=True)
trees_only = pytest.mark.parametrize("shared", ["trees"], indirect=True)


def let_it_be_looked_at(service: Service, version: str) -> None:
    """Another entry is applied: all of them have been looked at."""
    service.put(version, name="other", at=service.drops)
    service.logged(f"other .*{version}")


@images_only
def test_an_image_is_not_used_while_somebody_writes_it(service: Service) -> None:
    content = service.place.confext("1.4").read_bytes()
    with open(service.versions / "web_1.4.raw", "wb", buffering=0) as upload:
        upload.write(content[:1000])
        service.logged("web_1.4.raw has to wait: open for writing")
        let_it_be_looked_at(service, "1")
        upload.write(content[1000:])  # whole by its own account, and still open
        let_it_be_looked_at(service, "2")
        assert "1.4" not in service.heard
        assert service.has("first") or service.has("second")
    service.reloaded("1.4")
    assert not [line for line in service.log_lines() if "incomplete" in line]


@images_only
def test_an_image_mapped_for_writing_is_still_being_written(service: Service) -> None:
    content = service.place.confext("1.4").read_bytes()
    with open(service.versions / "web_1.4.raw", "w+b") as upload:
        upload.truncate(len(content))
        mapped = mmap.mmap(upload.fileno(), len(content))
    with mapped:
        mapped[:] = content
        let_it_be_looked_at(service, "1")
        assert "1.4" not in service.heard
    service.reloaded("1.4")  # no event tells: it is looked at again


@images_only
def test_what_is_whole_is_applied_while_another_upload_stalls(service: Service) -> None:
    with open(service.versions / "web_1.4.raw", "wb", buffering=0) as upload:
        upload.write(service.place.confext("1.4").read_bytes()[:2000])
        service.logged("web_1.4.raw has to wait: open for writing")
        service.put("1.3")
        service.reloaded("1.3")
    service.logged("web_1.4.raw incomplete")
    assert service.has("1.3")


@images_only
def test_the_image_in_use_may_be_uploaded_again_slowly(service: Service) -> None:
    """Written over in place: the service runs on the store's copy."""
    target = service.put("1.3")
    service.reloaded("1.3")
    other = service.place.confext("1.3", "other").read_bytes()
    with open(target, "r+b", buffering=0) as upload:
        upload.write(other[:100])
        service.put("1", name="other", at=service.drops)
        service.logged("web_1.3.raw has to wait: open for writing")
        service.logged("other 1 added")
        assert service.has("1.3")
        upload.write(other[100:])
    service.reloaded("other")
    assert service.heard[-1] == "other"


@trees_only
def test_a_tree_is_not_used_while_somebody_writes_a_file_in_it(service: Service) -> None:
    tree = service.versions / "web_1.4"
    release = tree / "etc/extension-release.d"
    release.mkdir(parents=True)
    (release / "extension-release.web").write_text("ID=_any\n")
    with open(tree / "etc/web.conf", "w") as upload:
        upload.write("1.")
        upload.flush()
        service.logged("web_1.4 has to wait: .*open for writing")
        let_it_be_looked_at(service, "1")
        upload.write("4\n")
    service.reloaded("1.4")
    assert "1." not in service.heard


@trees_only
def test_the_tree_in_use_may_be_edited_slowly(service: Service) -> None:
    target: Path = service.put("1.3")
    service.reloaded("1.3")
    with open(target / "etc/web.conf", "w") as editor:
        editor.write("oth")
        editor.flush()
        let_it_be_looked_at(service, "1")
        assert service.has("1.3")
        editor.write("er\n")
    service.reloaded("other")
