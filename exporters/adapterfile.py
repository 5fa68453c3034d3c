"""`.onnx_adapter` files: writing one and reading one.

The format is onnxruntime's: tensors by name, and two version numbers. There are two kinds of content:

    version 1, expanded     `<site>.A (in, r)`, `<site>.B (r, out)` and whatever else the swappable graph takes, by the
                            names of the graph's inputs. onnxruntime's own `LoraAdapter` takes these in any language.
    version 2, structured   the method's own, smaller tensors (Uni-LoRA: one vector), and `fxgraft.manifest`, a uint8
                            tensor that holds JSON: the format has no other room for text. `OrtSession` expands them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends.staging import staged
from ..passes.factors import factors, trained
from ..rewriter.api import base_of
from ..rewriter.errors import CheckpointError
from . import manifest
from .adapterfit import check_fit, finite, overlap
from .errors import ExportError
from .expand import Expander, describe, floating, own_tensors
from .ort_values import TensorInfo, to_ort, to_torch

# Written by us, so that the file's model version is a fingerprint of base weights.
ADAPTER_VERSION, STRUCTURED_VERSION = 1, 2


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file: copies of its tensors on the CPU, the JSON of a structured one, the version numbers."""

    values: dict[str, torch.Tensor]
    described: dict[str, Any] | None
    adapter_version: int
    model_version: int

    def digest(self) -> str:
        """SHA-256 over everything the file says."""
        told = hashlib.sha256()
        told.update(json.dumps([self.described, self.adapter_version, self.model_version]).encode())
        for key in sorted(self.values):
            tensor = self.values[key]
            told.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            if tensor.numel():
                told.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return told.hexdigest()


def export_ort_adapter(
    adapted: torch.nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    expanded: bool | None = None,
) -> Path:
    """Write one adapter to `path` (`*.onnx_adapter`) for a graph of `export_onnx(adapters="swappable")`.

    expanded   True: `<site>.A (in, r)` and `<site>.B (r, out)` of every site, scales folded into B, in the base's
               dtype, and the trained modules' tensors; onnxruntime's own `LoraAdapter` takes the file too. False: the
               method's own tensors with its config, in their own dtype; `OrtSession.load` expands them to the same
               numbers, bit for bit. None writes whichever has fewer bytes: the structured form for Uni-LoRA and
               PRoLoRA, the expanded one for LoRA, and for LoRA-XS and LoRA-SB, whose frozen A and B go along.

    The file carries a fingerprint of the base weights at its sites, which `OrtSession.load` compares. Raises
    `ExportError`, and leaves an older file as it was, where the path cannot be written, a value is not finite, dtypes
    are mixed, or (with `expanded=False`) derived tensors are not those the config gives; `FxgraftError` for methods
    without low-rank factors.
    """
    import onnxruntime

    plain = graph_tensors(adapted, name)
    if not plain:
        raise ExportError(f"adapter {name!r} has no tensors")
    _check_values(plain, name)
    structured = None if expanded else _structured(adapted, name, plain, forced=expanded is False)
    if structured is not None and expanded is None and _bytes(structured[0]) >= _bytes(plain):
        structured = None
    content = onnxruntime.AdapterFormat()
    sites = [key.removesuffix(".A") for key in plain if key.endswith(".A")]
    content.set_model_version(manifest.fingerprint(base_of(adapted), sites))
    content.set_adapter_version(ADAPTER_VERSION if structured is None else STRUCTURED_VERSION)
    tensors = dict(plain if structured is None else structured[0])
    if structured is not None:
        text = json.dumps(structured[1], separators=(",", ":")).encode()
        tensors[manifest.KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    content.set_parameters({key: to_ort(tensor) for key, tensor in tensors.items()})
    with staged(path, ".onnx_adapter") as folder:
        try:
            content.export_adapter(str(folder / Path(path).name))
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write {str(path)!r}: {error}") from error
    return Path(path)


def graph_tensors(adapted: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Every tensor the swappable graph takes for this adapter, by input name."""
    tensors: dict[str, torch.Tensor] = {}
    for site, (a, b) in factors(adapted, name).items():
        tensors[f"{site}.A"], tensors[f"{site}.B"] = a, b
    return {**tensors, **swappable_head(adapted, name)}


def swappable_head(adapted: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The trained modules' floating tensors (counters of a batch norm are no part of an inference graph)."""
    return floating(trained(adapted, name))


def _structured(
    adapted: torch.nn.Module, name: str, plain: Mapping[str, torch.Tensor], forced: bool
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The method's own tensors and their description, if expanding them gives `plain`; else None, or an error."""
    own = {key: tensor.cpu() for key, tensor in own_tensors(adapted, name).items()}
    described = describe(adapted, name)
    again = Expander()(described, own, f"adapter {name!r}")
    wrong = [key for key, tensor in plain.items() if key not in again or not torch.equal(again[key], tensor.cpu())]
    if not wrong and len(again) == len(plain):
        return own, described
    if forced:
        raise ExportError(
            f"adapter {name!r}: its config does not give the values it has at {wrong[:4]} (derived tensors were "
            "changed by hand); expanded=True writes the values themselves"
        )
    return None


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """The content of a file. Raises `CheckpointError` where it is missing, cut short or not an adapter file at all."""
    import onnxruntime

    if not Path(path).is_file():
        raise CheckpointError(f"there is no adapter file {str(path)!r}")
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
    text = values.pop(manifest.KEY, None)
    return AdapterFile(values, _parsed(text, path), content.get_adapter_version(), content.get_model_version())


def _parsed(text: torch.Tensor | None, path: str | os.PathLike[str]) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        described = json.loads(bytes(text.numpy()))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: its {manifest.KEY} is no JSON: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{str(path)!r}: its {manifest.KEY} is a {type(described).__name__}, not an object")
    return described


def _check_values(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for key, tensor in tensors.items():
        dtypes.setdefault(tensor.dtype, key)
        if not finite(tensor):
            raise ExportError(f"adapter {name!r}: {key!r} has values that are not finite; nothing was written")
    if len(dtypes) > 1:
        mixed = ", ".join(f"{key!r} is {dtype}" for dtype, key in dtypes.items())
        raise ExportError(f"adapter {name!r} has tensors of several dtypes ({mixed}): bring the model to one first")


__all__ = ["AdapterFile", "TensorInfo", "check_fit", "export_ort_adapter", "overlap", "read_adapter", "swappable_head"]
