"""`.onnx_adapter` files: writing one, reading one, and holding its tensors against a graph.

onnxruntime checks names, dtypes and shapes only while running, and takes a partial adapter without a word. Here an
adapter is complete and fits, or it is refused at load.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..backends.staging import staged
from ..passes.factors import factors, trained
from ..rewriter.api import base_of
from ..rewriter.errors import AdapterError, CheckpointError, listing
from . import manifest
from .errors import ExportError

# Version of the naming scheme `<site>.A (in, rank)`, `<site>.B (rank, out)`, trained tensors under their own keys.
ADAPTER_VERSION = 1
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph. `shape` has a name (or None) for a free dimension, `type` is onnxruntime's."""

    name: str
    shape: tuple[int | str | None, ...]
    type: str

    @property
    def dtype(self) -> str:
        return _DTYPES.get(self.type, self.type.removeprefix("tensor(").removesuffix(")"))

    def __str__(self) -> str:
        return f"{self.dtype} ({' x '.join('?' if dim is None else str(dim) for dim in self.shape) or 'scalar'})"


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file: onnxruntime values by name, and the two version numbers of the format."""

    values: dict[str, object]
    adapter_version: int
    model_version: int


def export_ort_adapter(adapted: torch.nn.Module, path: str | os.PathLike[str], name: str = "default") -> Path:
    """Write one adapter to `path` (`*.onnx_adapter`) for a graph of `export_onnx(adapters="swappable")`.

    Holds `<site>.A (in, r)` and `<site>.B (r, out)` of every site, scales folded into B, in the base's dtype, and the
    trained modules' tensors. The file carries a fingerprint of the base weights at its sites, which `OrtSession.load`
    compares. Raises `ExportError`, and leaves an older file as it was, where the path
    cannot be written, a value is not finite or a dtype differs from the base's; `FxgraftError` for methods without
    low-rank factors.
    """
    import onnxruntime

    pairs = factors(adapted, name)
    tensors: dict[str, torch.Tensor] = {}
    for site, (a, b) in pairs.items():
        tensors[f"{site}.A"], tensors[f"{site}.B"] = a, b
    tensors.update(swappable_head(adapted, name))
    if not tensors:
        raise ExportError(f"adapter {name!r} has no tensors")
    base = base_of(adapted)
    _check_values(tensors, name)
    values = {key: _ort_value(tensor) for key, tensor in tensors.items()}
    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(ADAPTER_VERSION)
    content.set_model_version(manifest.fingerprint(base, pairs))
    content.set_parameters(values)
    with staged(path, ".onnx_adapter") as folder:
        try:
            content.export_adapter(str(folder / Path(path).name))
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write {str(path)!r}: {error}") from error
    return Path(path)


def swappable_head(adapted: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The trained modules' floating tensors (counters of a batch norm are no part of an inference graph)."""
    return {key: tensor for key, tensor in trained(adapted, name).items() if tensor.is_floating_point()}


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """The tensors of a file. Raises `CheckpointError` where it is missing, cut short or not an adapter file at all."""
    import onnxruntime

    if not Path(path).is_file():
        raise CheckpointError(f"there is no adapter file {str(path)!r}")
    try:
        content = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = content.get_parameters()
    except Exception as error:  # onnxruntime raises bare RuntimeErrors, and its own classes, which share no base
        reason = str(error).rpartition(") ")[2].strip()
        raise CheckpointError(
            f"{str(path)!r} is not an onnxruntime adapter file, or is damaged or cut short ({reason})"
        ) from error
    return AdapterFile(values, content.get_adapter_version(), content.get_model_version())


def check_fit(
    adapter: str, values: Mapping[str, object], graph: Mapping[str, TensorInfo], partial: bool = False
) -> dict[str, int]:
    """Hold an adapter's tensors against the graph's adapter inputs; returns the rank per site.

    Raises `AdapterError` naming the tensors: unknown to the graph, missing (a site with one of A and B always; with any
    missing site unless `partial`), of another dtype, of another shape, A and B of different ranks, not finite.
    """
    unknown = sorted(set(values) - set(graph))
    if unknown:
        raise AdapterError(
            f"adapter {adapter!r} has tensors the graph does not take: {listing(unknown)}; it takes {listing(graph)}"
        )
    missing = [name for name in graph if name not in values]
    halves = [name for name in missing if _partner(name) in values]
    if halves or (missing and not partial):
        raise AdapterError(
            f"adapter {adapter!r} is incomplete: {listing(halves or missing)} "
            f"{'is' if len(halves or missing) == 1 else 'are'} missing of the graph's {len(graph)} adapter tensors"
            + ("" if halves else " (partial=True leaves those at the base's values)")
        )
    ranks: dict[str, int] = {}
    for name, value in values.items():
        info = graph[name]
        if value.data_type() != info.type:  # type: ignore[attr-defined]
            got = TensorInfo(name, (), value.data_type()).dtype  # type: ignore[attr-defined]
            raise AdapterError(f"adapter {adapter!r}: {name!r} is {got}, the graph takes {info.dtype}")
        shape = tuple(value.shape())  # type: ignore[attr-defined]
        fits = len(shape) == len(info.shape) and all(
            not isinstance(want, int) or want == got for want, got in zip(info.shape, shape, strict=True)
        )
        if not fits:
            raise AdapterError(f"adapter {adapter!r}: {name!r} has shape {shape}, the graph takes {info}")
        site, _, leg = name.rpartition(".")
        free = [got for want, got in zip(info.shape, shape, strict=True) if not isinstance(want, int)]
        if leg in ("A", "B") and free and ranks.setdefault(site, free[0]) != free[0]:
            raise AdapterError(
                f"adapter {adapter!r}: A and B of {site!r} have different ranks, {ranks[site]} and {free[0]}"
            )
        if info.dtype in ("float32", "float64", "float16"):
            numbers = value.numpy()  # type: ignore[attr-defined]
            if not np.isfinite(numbers).all():
                raise AdapterError(f"adapter {adapter!r}: {name!r} has values that are not finite")
    return ranks


def _partner(name: str) -> str:
    site, _, leg = name.rpartition(".")
    return {"A": f"{site}.B", "B": f"{site}.A"}.get(leg, name)


def _check_values(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for key, tensor in tensors.items():
        dtypes.setdefault(tensor.dtype, key)
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"adapter {name!r}: {key!r} has values that are not finite; nothing was written")
    if len(dtypes) > 1:
        mixed = ", ".join(f"{key!r} is {dtype}" for dtype, key in dtypes.items())
        raise ExportError(f"adapter {name!r} has tensors of several dtypes ({mixed}): bring the model to one first")


def _ort_value(tensor: torch.Tensor) -> object:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        # numpy has no bfloat16: the same bits as int16, declared as ONNX's type 16.
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def overlap(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Tensors two adapters both set."""
    return sorted(set(first) & set(second))
