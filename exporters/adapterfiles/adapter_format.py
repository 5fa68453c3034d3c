"""The `.onnx_adapter` format: reading and writing files.

The format is onnxruntime's: tensors by name, and two version numbers. It has no room for text, so ours goes into
`fxgraft.manifest`, a uint8 tensor that holds JSON. The adapter version tells three kinds of content apart:

    1, expanded     `<site>.A (in, r)`, `<site>.B (r, out)` and whatever else the swappable graph takes, by the names of
                    the graph's inputs, and no text. onnxruntime's own `LoraAdapter` takes these in any language.
    2, structured   the method's own, smaller tensors (Uni-LoRA: one vector), with the text that `structured.describe`
                    gives. `OrtSession` expands them.
    3, frozen       tensors that structured files beside it leave to this one, which is named after its content.

The model version is a fingerprint of the base weights. Behind the last byte of onnxruntime's format, which it does not
read, stands a hash of all bytes before; files of other programs have none and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...backends.artifact.bounded_files import as_path, check_regular, load_json, sha256
from ...rewriter.errors import CheckpointError
from . import graph_manifest as manifest
from .ort_values import to_ort, to_torch

EXPANDED, STRUCTURED, FROZEN = 1, 2, 3
_SEAL, _HASH, _TAIL = b"fxgraft-sha256:", 64, 4096
_HEX = re.compile(rb"[0-9a-f]{16}\Z")  # the end of a hash


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file: tensors on the CPU, the JSON of a structured one, the version numbers."""

    values: dict[str, torch.Tensor]
    described: dict[str, Any] | None
    adapter_version: int
    model_version: int

    def digest(self) -> str:
        """SHA-256 over everything the file says."""
        told = hashlib.sha256()
        told.update(json.dumps([self.described, self.adapter_version, self.model_version]).encode())
        for key in sorted(self.values):
            tensor = self.values[key].contiguous()
            told.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.numel():
                told.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return told.hexdigest()


def write_file(content: AdapterFile, path: Path) -> None:
    """Write a file as it is. Raises what onnxruntime and the system raise."""
    import onnxruntime

    tensors = dict(content.values)
    if content.described is not None:
        text = json.dumps(content.described, separators=(",", ":")).encode()
        tensors[manifest.KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(content.adapter_version)
    made.set_model_version(content.model_version)
    made.set_parameters({key: to_ort(tensor) for key, tensor in tensors.items()})
    made.export_adapter(str(path))
    seal = _SEAL + sha256(path).encode()
    with path.open("ab") as file:
        file.write(seal)


def leave_frozen(content: AdapterFile, frozen: Mapping[str, torch.Tensor]) -> tuple[AdapterFile, AdapterFile, str]:
    """A structured file that names a second one for its frozen tensors, that second one, and its name."""
    second = AdapterFile(dict(frozen), None, FROZEN, content.model_version)
    digest = second.digest()
    name = f"frozen-{digest[:16]}.onnx_adapter"
    described = {**(content.described or {}), "frozen": {"file": name, "digest": digest}}
    return AdapterFile(content.values, described, content.adapter_version, content.model_version), second, name


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """The content of an adapter, frozen tensors from the file beside it included.

    Raises `CheckpointError` where a file is missing, cut short, changed, no adapter file at all, or only the frozen
    part of one.
    """
    content = _read(path)
    if content.adapter_version == FROZEN:
        raise CheckpointError(
            f"{str(path)!r} holds the frozen tensors that adapters beside it share, and is no adapter itself"
        )
    beside = (content.described or {}).get("frozen")
    if beside is None:
        return content
    try:
        name, digest = Path(beside["file"]).name, beside["digest"]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{str(path)!r} does not say where its frozen tensors are: {beside!r}") from error
    frozen = _read(Path(path).parent / name)
    if frozen.digest() != digest:
        raise CheckpointError(
            f"{name!r} beside {str(path)!r} does not hold the frozen tensors the adapter was written with"
        )
    described = {key: value for key, value in (content.described or {}).items() if key != "frozen"}
    values = {**frozen.values, **content.values}
    return AdapterFile(values, described, content.adapter_version, content.model_version)


def _read(path: str | os.PathLike[str]) -> AdapterFile:
    import onnxruntime

    path = as_path(path)
    try:
        _check_seal(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no adapter file {str(path)!r}") from error
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    try:
        content = onnxruntime.AdapterFormat.read_adapter(str(path))
        # Copies: the file's own values are views of a mapping that changes when somebody rewrites the file.
        values = {key: to_torch(value) for key, value in content.get_parameters().items()}
    except KeyError as error:
        raise CheckpointError(f"{str(path)!r} holds a tensor of the type {error}, which no adapter has") from error
    except Exception as error:  # onnxruntime raises bare RuntimeErrors, and its own classes, which share no base
        reason = str(error).rpartition(") ")[2].strip()
        raise CheckpointError(
            f"{str(path)!r} is not an onnxruntime adapter file, or is damaged or cut short ({reason})"
        ) from error
    described = _parsed(values.pop(manifest.KEY, None), path)
    return AdapterFile(values, described, content.get_adapter_version(), content.get_model_version())


def _check_seal(path: Path) -> None:
    """Raise where the bytes are not those that were written; where there is no trace of a seal, nothing is known."""
    check_regular(path)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - len(_SEAL) - _HASH
        file.seek(max(size - _TAIL, 0))
        tail = file.read()
    if _SEAL not in tail and not _HEX.search(tail):
        return
    if tail[-len(_SEAL) - _HASH :] != _SEAL + sha256(path, size).encode():
        raise CheckpointError(f"{str(path)!r} is damaged or was changed: its content does not match its hash")


def _parsed(text: torch.Tensor | None, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        described = load_json(bytes(text.contiguous().view(torch.uint8).numpy()))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: its {manifest.KEY} is no JSON: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{str(path)!r}: its {manifest.KEY} is a {type(described).__name__}, not an object")
    return described
