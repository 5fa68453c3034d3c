"""A graph file that knows its own hash.

    graph  ->  graph | metadata | seal

A protobuf file followed by another message of the same type is the two merged, so metadata is appended without reading
the graph again. The seal, last, has the hash of all bytes before it and of every file with external weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....backends.artifact.bounded_files import sha256
from ....rewriter.errors import VerifyError, listing

SEAL = "fxgraft.seal"


def seal(file: Path, metadata: Mapping[str, str]) -> None:
    """Append metadata and the seal to a graph; its external files must lie beside it."""
    with file.open("ab") as stream:
        stream.writelines(_entry(key, value) for key, value in metadata.items())
    said = {"sha256": sha256(file), "files": {one.name: sha256(one) for one in external_files(file)}}
    with file.open("ab") as stream:
        stream.write(_entry(SEAL, json.dumps(said, sort_keys=True)))


def check_seal(file: Path) -> dict[str, str]:
    """The metadata of a sealed graph, after holding the file and its external files against the seal.

    Raises `VerifyError` where the file is missing, no ONNX graph, not sealed by `export_onnx`, or changed since.
    """
    if not file.is_file():
        raise VerifyError(f"there is no graph {str(file)!r}")
    metadata = {entry.key: entry.value for entry in _read(file).metadata_props}
    if SEAL not in metadata:
        raise VerifyError(
            f"{str(file)!r} has no seal: fg.export_onnx did not write it, or a version before seals did, or another "
            "tool wrote it anew, or its end is missing"
        )
    try:
        said = json.loads(metadata[SEAL])
        own, files = said["sha256"], dict(said["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise VerifyError(f"{str(file)!r} is damaged: its seal cannot be read ({error})") from error
    last = _entry(SEAL, metadata[SEAL])
    size = file.stat().st_size - len(last)
    with file.open("rb") as stream:
        stream.seek(max(size, 0))
        sealed = stream.read() == last
    if not sealed or sha256(file, size) != own:
        raise VerifyError(f"{str(file)!r} is not what was exported: it was damaged or changed after the export")
    if missing := [name for name in files if not (file.parent / name).is_file()]:
        raise VerifyError(f"{str(file)!r} has its weights in {listing(missing)} beside it, which is not there")
    if changed := [name for name, digest in files.items() if sha256(file.parent / name) != digest]:
        raise VerifyError(f"{listing(changed)} beside {str(file)!r} does not hold the weights that were exported")
    return metadata


def _entry(key: str, value: str) -> bytes:
    import onnx

    message = onnx.ModelProto()
    entry = message.metadata_props.add()
    entry.key, entry.value = key, value
    return message.SerializeToString()


def _read(file: Path) -> Any:
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise VerifyError(f"{str(file)!r} is no ONNX file, or is damaged or cut short ({error})") from error
    if not model.graph.node:
        raise VerifyError(f"{str(file)!r} is no ONNX file, or is damaged: it has no graph")
    return model


def external_files(file: Path) -> list[Path]:
    """The files beside a graph that it keeps weights in."""
    tensors = _read(file).graph.initializer
    names = {entry.value for one in tensors for entry in one.external_data if entry.key == "location"}
    return [file.parent / name for name in sorted(names)]
