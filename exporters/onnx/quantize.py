"""`quantize_onnx`: a graph of `export_onnx` with its weights in 8 or 4 bits, its adapters as they were.

    MatMul(x, W)                     ->  int8: MatMulInteger(quantised x, W8) * scales     4 bits: MatMulNBits(x, W4)
    MatMul(MatMul(x, A), B)          ->  itself: adapter inputs stay inputs, and their products float

The work is onnxruntime's; manifest, record and seal are carried on, with what the quantising changed.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.artifact.staging import staged
from ...rewriter.errors import ExportError, VerifyError, listing, path_of
from ...rewriter.method import ADAPTER_IDS
from .checks.checks import probe, random_adapter
from .checks.ort_graph import CheckGraph
from .checks.record import Record, read_description, write_description
from .checks.seal import external_files
from .graph import save_graph
from .graph.few_bits import in_bits, load_weights

_DRAWS = 4  # random inputs of every size


@dataclass(frozen=True)
class QuantizedOnnx:
    """What was written.

    `quantised` are the names of the products in `bits` bits, `error` is the largest difference from the graph it was
    made from, over an output's largest value, on random inputs, without an adapter and with random ones. `fg.verify`
    allows four times as much against torch.
    """

    path: Path
    bits: int
    quantised: tuple[str, ...]
    error: float
    bytes: int
    bytes_before: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.quantised)} products in {self.bits} bits, {self.bytes_before / 1e6:.1f} MB -> "
            f"{self.bytes / 1e6:.1f} MB, differs by {self.error:.1e} of an output's largest value"
        )


def quantize_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: int = 8,
    *,
    block_size: int = 32,
    exclude: tuple[str, ...] | list[str] = (),
    external_data: bool | None = None,
) -> QuantizedOnnx:
    """Write a graph of `export_onnx` once more with the weights of its products in few bits.

    Adapter inputs and the products with them stay as they are, in every mode: adapters of the graph load as before, and
    what they add is exact. Embeddings stay too. `fg.verify` and `OrtSession` know the result as they know the original.

    Args:
        path: of the graph, with its seal.
        out: the file to write, `*.onnx`.
        bits: 8, weights and activations as onnxruntime's dynamic quantiser has them; or 4, weights alone, in blocks.
        block_size: of 4 bits: so many weights along the contracted dimension share a scale.
        exclude: names of nodes to leave as they are.
        external_data: weights in a file beside the graph; None does so beyond 1.5 GB.

    Raises:
        ExportError: another number of bits, nothing to quantise, or onnxruntime fails; nothing is written then.
        VerifyError: `path` is no graph of `export_onnx`, or was changed.
    """
    if isinstance(bits, bool) or bits not in (8, 4):
        raise ExportError(f"quantize_onnx(bits={bits!r}): give 8 or 4")
    source = path_of(path, "quantize_onnx", VerifyError)
    told, record = read_description(source)
    if "quantised" in told:
        raise ExportError(f"{str(source)!r} is in {told['quantised']['bits']} bits already: give the graph it is from")
    try:
        model = load_weights(source)
    except Exception as error:  # protobuf's and onnx's own
        raise VerifyError(f"{str(source)!r} cannot be read: {error}") from error
    if unknown := sorted(set(exclude) - {node.name for node in model.graph.node}):
        raise ExportError(f"exclude names {listing(unknown)}, which are no nodes of {str(source)!r}")
    with staged(out, ".onnx") as folder:
        try:
            made, done = in_bits(model, bits, block_size, exclude, folder)
        except Exception as error:  # onnxruntime's quantisers raise whatever they stumble over
            raise ExportError(f"onnxruntime does not quantise {str(source)!r}: {error}") from error
        if not done:
            raise ExportError(f"{str(source)!r} has no product that onnxruntime takes in {bits} bits")
        file = folder / Path(out).name
        _write(made, file, external_data, Path(out).parent)
        off, probes = _compared(source, file, record, told)
        if not math.isfinite(off):
            raise ExportError(f"in {bits} bits the graph gives numbers that are not finite")
        kind = {"bits": bits, "block_size": block_size if bits == 4 else None}
        told["quantised"] = {**kind, "error": off, "tolerance": 4 * off}
        write_description(file, told, dataclasses.replace(record, probes=probes))
        size = sum(entry.stat().st_size for entry in folder.iterdir())
    size_before = sum(entry.stat().st_size for entry in (source, *external_files(source)))
    return QuantizedOnnx(Path(out), bits, done, off, size, size_before)


def _write(model: Any, file: Path, external_data: bool | None, folder: Path) -> None:
    import onnx_ir as ir

    made = ir.from_proto(model)
    made.metadata_props.clear()
    save_graph.save(made, file, external_data, folder)


def _compared(source: Path, file: Path, record: Record, told: Mapping[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """The largest difference of two graphs on the record's inputs, without an adapter and with random ones; and what
    the second gives, for `verify`."""
    before, after = CheckGraph(source, told), CheckGraph(file, told)
    if lost := set(before.adapter_inputs) ^ set(after.adapter_inputs):
        raise ExportError(f"the quantised graph lost the adapter inputs {listing(lost)}")
    worst, probes = 0.0, []
    for stored in record.probes or [{"sizes": {}, "seed": 0, "case": "example"}]:
        for seed in range(stored["seed"], stored["seed"] + _DRAWS):
            inputs = record.draw(stored["sizes"], seed)
            if told["adapters"] == "bank":
                batch = next(tensor.shape[0] for tensor in inputs.values() if tensor.dim())
                inputs[ADAPTER_IDS] = torch.tensor(stored.get("ids", [0] * batch), dtype=torch.int64)
            for adapter in ({}, random_adapter(after, seed)) if told["adapters"] == "swappable" else ({},):
                want, got = (graph.compute(stored["case"], inputs, adapter) for graph in (before, after))
                worst = max([worst, *(_distance(got[name], value) for name, value in want.items())])
            if seed == stored["seed"]:
                probes.append({**stored, "outputs": probe(after, stored["case"], inputs)})
    return worst, probes if record.probes else []


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    if got.dtype.kind not in "fc" or not got.size:
        return 0.0
    finite = np.isfinite(want)
    return float(np.abs(got[finite] - want[finite]).max(initial=0.0) / (np.abs(want[finite]).max(initial=0.0) or 1.0))


__all__ = ["QuantizedOnnx", "quantize_onnx"]
