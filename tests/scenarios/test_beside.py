# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images with root hash, hash tree and signature beside them: one drop, in whichever order they come."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from scenarios.place import Place, Service, image, until
from scenarios.test_wait import asked, in_progress
from support.needs import tool
from support.signed import Key, make_key, make_tree, padded, sign

pytestmark = [
    pytest.mark.parametrize("place", ["images"], indirect=True),
    *(tool(one) for one in ("mksquashfs", "veritysetup", "openssl")),
]
VERITY, ROOT_HASH, SIGNATURE = ".verity", ".roothash", ".roothash.p7s"


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path)


def drop(service: Service, version: str, key: Key | None = None) -> dict[str, bytes]:
    """What is to be dropped for a version, by suffix."""
    content = padded(image(f"web_{version}", version).read_bytes())
    tree = make_tree(content)
    made = {".raw": content, VERITY: tree.content, ROOT_HASH: f"{tree.root_hash.hex()}\n".encode()}
    if key is not None:
        made[SIGNATURE] = sign(tree.root_hash, key)
    return made


def put(service: Service, version: str, made: dict[str, bytes], *suffixes: str) -> None:
    service.versions.mkdir(parents=True, exist_ok=True)
    for one in suffixes or made:
        (service.versions / f"web_{version}{one}").write_bytes(made[one])


def test_the_last_one_brings_it_in_whichever_comes_last(place: Place) -> None:
    place.configure("ImagePolicy=verity")
    place.start_daemon()
    service = place.start(name="web.service")
    orders = list(itertools.permutations((".raw", VERITY, ROOT_HASH)))
    for number, order in enumerate(orders, 1):
        version = f"1.{number}"
        made = drop(service, version)
        for one in order[:-1]:
            put(service, version, made, one)
            if (service.versions / f"web_{version}.raw").exists():
                missing = [
                    each
                    for each in (VERITY, ROOT_HASH)
                    if not (service.versions / f"web_{version}{each}").exists()
                ]
                said = service.logged(
                    rf"web_{version}\.raw incomplete: .*web_{version}{missing[0]}.* awaited"
                )
                assert "refused" not in said
        put(service, version, made, order[-1])
        service.reloaded(version)
    # In quarantine is none of them, and each was applied once.
    assert service.status()["quarantined"] == []
    assert service.heard == ["nothing", *(f"1.{number}" for number in range(1, len(orders) + 1))]


def test_a_signature_is_waited_for_where_one_is_asked_for(place: Place, key: Key) -> None:
    place.configure("ImagePolicy=signed")
    place.start_daemon()
    service = place.start(name="web.service")
    made = drop(service, "1", key)
    put(service, "1", made, ".raw")
    service.logged(
        r"web_1\.raw incomplete: web_1\.verity, web_1\.roothash, web_1\.roothash\.p7s beside it awaited: "
    )
    waiting = in_progress(service, "web_1.raw")
    assert (waiting.kind, waiting.answer["status"]) == ("incomplete", 4)
    assert "web_1.roothash.p7s beside it awaited" in waiting.text
    put(service, "1", made, VERITY, ROOT_HASH)
    service.logged(r"web_1\.raw incomplete: web_1\.roothash\.p7s beside it awaited: .*asks for signed")
    put(service, "1", made, SIGNATURE)
    service.logged(r"web_1\.raw refused: .*signed by an unknown key")


def test_check_names_what_is_beside_an_image_under_a_wrong_name(place: Place) -> None:
    """As the daemon does where it is dropped."""
    image = place.path / "web_1.raw"
    place.bring(place.confext("1"), image)
    place.path.joinpath("web_1.raw.roothash").write_text("a" * 64)
    done = place.run("check", str(image))
    warning = "web_1.raw.roothash beside it is never looked at under that name: call it web_1.roothash"
    assert f"{image}: warning: {warning}" in done.stdout
    place.path.joinpath("web_1.raw.roothash").unlink()
    assert "warning" not in place.run("check", str(image)).stdout


def test_a_version_after_one_with_a_hash_tree_waits_for_its_own_whatever_the_policy(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    first, second = (drop(service, version) for version in ("1", "2"))
    put(service, "1", first, VERITY, ROOT_HASH, ".raw")
    service.reloaded("1")
    put(service, "2", second, ".raw")
    service.logged(
        r"web_2\.raw incomplete: web_2\.verity, web_2\.roothash beside it awaited, since web_1\.raw before it"
        r" has such files: remove that one if .*; it keeps web 1"
    )
    put(service, "2", second, VERITY)
    service.logged(r"web_2\.raw incomplete: web_2\.roothash beside it is awaited; it keeps web 1")
    put(service, "2", second, ROOT_HASH)
    service.reloaded("2")
    (service.versions / "web_2.raw").unlink()
    service.reloaded("1")
    assert service.heard == ["nothing", "1", "2", "1"]


def test_the_first_one_that_is_let_in_alone_becomes_what_lies_beside_it(place: Place, key: Key) -> None:
    """Nothing tells of it that more is to come: no policy asks for it, and there is no version before it."""
    place.start_daemon()
    service = place.start(name="web.service")
    made = drop(service, "1", key)
    put(service, "1", made, ".raw")
    service.reloaded("1")
    assert trust(service) == "unprotected"
    put(service, "1", made, VERITY)
    service.logged(r"web_1\.raw incomplete: web_1\.roothash beside it is awaited; it keeps web 1")
    assert trust(service) == "unprotected"
    put(service, "1", made, ROOT_HASH)
    service.logged(r"web 1 with new content, applied")
    until(lambda: trust(service) == "verity")
    put(service, "1", made, SIGNATURE)
    service.logged(r"web_1\.raw: signed by an unknown key .*; let in, since no policy asks for more")
    until(lambda: service.heard == ["nothing", "1", "1", "1"])
    assert service.status()["quarantined"] == []
    assert asked(service, "web_1.raw", 30).answer["status"] == 0
    # From now on nothing of it gets in without.
    put(service, "2", drop(service, "2"), ".raw")
    service.logged(r"web_2\.raw incomplete: .* beside it awaited, since web_1\.raw before it has such files")


def trust(service: Service) -> str:
    (layer,) = service.status()["layers"]
    found: str = layer["trust"]["protection"]
    return found


def test_that_of_another_image_is_refused_and_the_right_one_mends_it(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    first, second = (drop(service, version) for version in ("1", "2"))
    put(service, "1", first)
    service.reloaded("1")
    put(service, "2", second, VERITY)
    put(service, "2", first, ROOT_HASH)
    put(service, "2", second, ".raw")
    service.logged(
        r"web_2\.raw refused: with what lies beside it: its root hash is not that of its hash tree: they are of"
        r" different images, or one is damaged; it keeps web 1"
    )
    put(service, "2", second, ROOT_HASH)
    service.reloaded("2")


def test_a_wrong_name_is_pointed_out(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    service.put("1")
    service.reloaded("1")
    (service.versions / "web_1.raw.roothash").write_text("00" * 32)
    service.logged(r"web_1\.raw\.roothash.*never looked at under that name: .* is called web_1\.roothash")


def test_its_tries_are_counted_and_what_lies_beside_it_keeps_its_name(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    made = drop(service, "1")
    put(service, "1", made, VERITY, ROOT_HASH)
    (service.versions / "web_1+3.raw").write_bytes(made[".raw"])
    service.reloaded("1")
    until((service.versions / "web_1.raw").exists)
    second = drop(service, "2")
    put(service, "2", second, VERITY, ROOT_HASH, ".raw")
    service.reloaded("2")


def test_origin_and_diff_look_into_the_image(place: Place) -> None:
    place.start_daemon()
    service = place.start(name="web.service")
    first, second = (drop(service, version) for version in ("1", "2"))
    put(service, "1", first, VERITY, ROOT_HASH, ".raw")
    service.reloaded("1")
    put(service, "2", second, VERITY, ROOT_HASH, ".raw")
    service.reloaded("2")
    said = place.run("origin", service.name).stdout
    assert "web 2: image, verity, " in said and "web.conf" in said, said
    changed = place.run("diff", service.name, "--from", "1", "--to", "0", check=False).stdout
    assert "-1" in changed.splitlines() and "+2" in changed.splitlines(), changed
