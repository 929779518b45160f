# SPDX-License-Identifier: LGPL-2.1-or-later
"""`confext-watcher origin`, as the command line prints it for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from watcher.cli.show import when
from watcher.model import printable, shown
from watcher.records.traces import Origin, Piece, TracedFile, TracedLayer, TracedPath

HOST = "the host's /etc"

_STATES = {
    "running": "runs on",
    "stopped": "does not run; its next start gets",
    "needs-restart": "is not in a mount namespace that was made for it; its next start gets",
}
_NAME = 36


def origin(found: Origin) -> Iterator[str]:
    count = len(found.layers)
    stack = f"{count} {'layer' if count == 1 else 'layers'}, topmost first" if count else f"{HOST} alone"
    yield f"{shown(found.service)}: {_STATES[found.state]} {stack}"
    for layer in reversed(found.layers):
        yield from _layer(layer)
    labels = _labels(found.layers)
    for path in found.paths or ():
        yield from _path(path, labels)
    if found.files:
        yield from _tree(found.files, labels)
    elif found.files is not None:
        yield f"every file is as in {HOST}"


def label(layer: TracedLayer) -> str:
    return shown(f"{layer.name} {layer.version}".rstrip())


def _labels(layers: Sequence[TracedLayer]) -> dict[int | None, str]:
    names = [label(layer) for layer in layers]
    # Two of one name and version are told apart by their content.
    named: dict[int | None, str] = {
        number: f"{name} ({layers[number].digest[:12]})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    }
    return named | {None: HOST}


def _layer(layer: TracedLayer) -> Iterator[str]:
    trust = layer.trust
    since = f", since {when(layer.since)}" if layer.since else ""
    yield f"  {label(layer)}: {layer.kind}, {trust.protection.value}, sha256 {layer.digest[:12]}{since}"
    if trust.signer:
        yield f"    signed by {shown(trust.signer)}, certificate sha256 {trust.fingerprint}"
    if trust.how:
        yield f"    {printable(trust.how)}, root hash {trust.root_hash}"
    if trust.remark:
        yield f"    warning: {printable(trust.remark)}"
    if layer.source:
        yield f"    {shown(layer.source)}"


def _path(path: TracedPath, labels: dict[int | None, str]) -> Iterator[str]:
    if path.outside:
        yield f"{shown(path.outside)}: not below /etc, so no layer has it"
        return
    link = f" -> {shown(path.target)}" if path.target else ""
    yield f"{shown(path.path)}{link}"
    if path.mount:
        yield f"  hidden by a mount: {shown(path.mount)}"
    if not path.chain and not path.problem:
        yield "  nothing is there"
    for piece in path.chain:
        yield f"  {labels[piece.layer]}: {_piece(piece, labels)}"
    if path.chain and not any(piece.role == "shown" for piece in path.chain):
        yield "  so nothing is there"
    if path.problem:
        yield f"  {path.problem}"
    if path.differs:
        yield f"  the service sees something else: {path.differs}; a process may hold an older file open"


def _piece(piece: Piece, labels: dict[int | None, str]) -> str:
    what = f"{'opaque ' if piece.opaque else ''}{piece.type}"
    if piece.type == "whiteout":
        what = "a whiteout, which removes it" if piece.role == "whiteout" else "a whiteout"
    else:
        size = f", {piece.size} bytes" if piece.type == "file" else ""
        what += f" {piece.mode:04o} of {piece.uid}:{piece.gid}{size}"
    if piece.role == "merged":
        return f"{what}, joined with the one above"
    if piece.role == "covered":
        return f"{what}, covered by {shown(piece.at)} of {labels[piece.covered_by]}"
    return what


def _tree(files: Sequence[TracedFile], labels: dict[int | None, str]) -> Iterator[str]:
    """Each file below its directory; a directory that is not listed itself gets a line as well."""
    at, above = "", list[str]()
    for file in files:
        directory, _, name = file.path.rpartition("/")
        if directory != at:
            parents = directory.split("/")[1:]
            same = 0
            while same < min(len(above), len(parents)) and above[same] == parents[same]:
                same += 1
            for depth in range(same, len(parents)):
                yield f"{'  ' * depth}{'' if depth else '/'}{shown(parents[depth])}/"
            at, above = directory, parents
        is_directory = file.type == "directory"
        start = f"{'  ' * len(above)}{'' if above else '/'}{shown(name)}{'/' if is_directory else ''}"
        yield f"{start:<{_NAME}}  {_file(file, labels)}"
        if is_directory and file.change != "removed":
            at, above = file.path, [*above, name]


def _file(file: TracedFile, labels: dict[int | None, str]) -> str:
    by = "hidden by the layers above" if file.layer is None else labels[file.layer]
    said = f"{file.change}, {by}" if file.change == "removed" else f"{labels[file.layer]}, {file.change}"
    if file.covers:
        said += f", covers {', '.join(labels[layer] for layer in file.covers)}"
    if file.note:
        said += f", {file.note}"
    return f"{said}, hidden by a mount: {shown(file.mount)}" if file.mount else said
