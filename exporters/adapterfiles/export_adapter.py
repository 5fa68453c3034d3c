"""`export_ort_adapter`: one adapter as an `.onnx_adapter` file, expanded or in the method's own tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...backends.artifact.staging import staged
from ...passes.models.dequantise import plainly
from ...passes.models.factors import trained
from ...passes.models.opened import form_values, whole_weights
from ...rewriter.errors import ExportError
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.program_verbs import over_programs
from ...rewriter.state import record_of
from ...rewriter.switch import base_of
from . import graph_manifest as manifest
from .adapter_format import EXPANDED, STRUCTURED, AdapterFile, leave_frozen, read_adapter, write_file
from .adapter_inputs import at_site
from .fit import finite
from .structured import Expander, describe, floating, own_tensors

Tensors = Mapping[str, torch.Tensor]


@over_programs
def export_ort_adapter(
    adapted: torch.nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    expanded: bool | None = None,
    share_frozen: bool = False,
) -> Path:
    """Write one adapter to `path` (`*.onnx_adapter`) for a graph of `export_onnx(adapters="swappable" or "bank")`.

    expanded      True: `<site>.A (in, r)` and `<site>.B (r, out)` of every site, scales folded into B, in the base's
                  dtype, and the trained modules' tensors (HydraLoRA: a router too, GLoRA: the merged weights, see
                  `export_onnx`); onnxruntime's own `LoraAdapter` takes the file too. False:
                  the method's own tensors with its config, in their own dtype; `OrtSession.load` expands them to the
                  same numbers, bit for bit, and a graph of `export_onnx(expanded=False)` takes them as they are (GLoRA:
                  only there). None writes whichever has fewer bytes: the structured form for Uni-LoRA
                  and PRoLoRA, the expanded one for LoRA, and for LoRA-XS and LoRA-SB, whose frozen A and B go along.
    share_frozen  leave frozen tensors to `frozen-<hash>.onnx_adapter` in the same folder, written once for all
                  adapters that have the same ones: a LoRA-XS tenant is then its R alone. Keep the files together.

    The file carries a fingerprint of the base weights at its sites, which `OrtSession.load` compares. Raises
    `ExportError`, and leaves an older file as it was, where the path cannot be written, a value is not finite, dtypes
    are mixed, or (with `expanded=False`) derived tensors are not those the config gives; `FxgraftError` for methods
    without low-rank factors.
    """
    if not isinstance(adapted, torch.nn.Module):
        raise ExportError(f"export_ort_adapter({type(adapted).__name__}, ...): give the adapted model, an nn.Module")
    adapted = plainly(adapted)
    whole = whole_weights(adapted, name)
    plain = graph_tensors(adapted, name, whole)
    if not plain:
        raise ExportError(f"adapter {name!r} has no tensors")
    _check_values(plain, name)
    sites = [site.name for site in record_of(unwrap(adapted), name).sites]
    version = manifest.fingerprint(base_of(adapted), sites)
    content = AdapterFile(plain, None, EXPANDED, version)
    files: dict[str, AdapterFile] = {}
    # Whole weights follow from the base's, which who loads the file does not have: only a graph that does the method's
    # arithmetic takes the small tensors, so they are written where they are asked for.
    skip = expanded or (whole and expanded is None)
    structured = None if skip else _structured(adapted, name, None if whole else plain, forced=expanded is False)
    if structured is not None:
        described, own, frozen = structured
        beside = frozen if share_frozen else {}
        if expanded is False or _bytes(own) + _bytes(frozen) - _bytes(beside) < _bytes(plain):
            content = AdapterFile(own if beside else {**own, **frozen}, described, STRUCTURED, version)
            if beside:
                content, second, second_name = leave_frozen(content, beside)
                files[second_name] = second
    with staged(path, ".onnx_adapter") as folder:
        files[Path(path).name] = content
        try:
            for file, its_content in files.items():
                write_file(its_content, folder / file)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write {str(path)!r}: {error}") from error
    return Path(path)


def graph_tensors(adapted: torch.nn.Module, name: str, whole: Tensors) -> dict[str, torch.Tensor]:
    """Every tensor the swappable graph takes for this adapter, by input name; `whole` are those of `whole_weights`."""
    tensors: dict[str, torch.Tensor] = {}
    for site, (_, values) in form_values(adapted, name).items():
        tensors |= at_site(site, values)
    tensors |= {**whole, **swappable_head(adapted, name)}
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def swappable_head(adapted: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The trained modules' floating tensors (counters of a batch norm are no part of an inference graph)."""
    return floating(trained(adapted, name))


def _structured(
    adapted: torch.nn.Module, name: str, plain: Tensors | None, forced: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """The description, the trained and the frozen tensors, if expanding them gives `plain` (None: not to be expanded);
    else None, or an error."""
    own, frozen = ({key: tensor.cpu() for key, tensor in part.items()} for part in own_tensors(adapted, name))
    described = describe(adapted, name)
    if plain is None:
        return described, own, frozen
    again = Expander()(described, {**own, **frozen}, f"adapter {name!r}")
    wrong = [key for key, tensor in plain.items() if key not in again or not torch.equal(again[key], tensor)]
    if not wrong and len(again) == len(plain):
        return described, own, frozen
    if forced:
        raise ExportError(
            f"adapter {name!r}: its config does not give the values it has at {wrong[:4]} (derived tensors were "
            "changed by hand); expanded=True writes the values themselves"
        )
    return None


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_values(tensors: Tensors, name: str) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for key, tensor in tensors.items():
        dtypes.setdefault(tensor.dtype, key)
        if not finite(tensor):
            raise ExportError(f"adapter {name!r}: {key!r} has values that are not finite; nothing was written")
    if len(dtypes) > 1:
        mixed = ", ".join(f"{key!r} is {dtype}" for dtype, key in dtypes.items())
        raise ExportError(f"adapter {name!r} has tensors of several dtypes ({mixed}): bring the model to one first")


__all__ = ["export_ort_adapter", "graph_tensors", "read_adapter", "swappable_head"]
