"""What a run is fed, held against the graph: onnxruntime's own texts name neither the input nor the axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...rewriter.errors import SessionError, listing, near_misses
from ...rewriter.method import ADAPTER_IDS
from ..adapterfiles.ort_values import TensorInfo

Array = np.ndarray | torch.Tensor


def check_inputs(inputs: Mapping[str, Any], graph: Mapping[str, TensorInfo], bank: bool) -> dict[str, Array]:
    """Contiguous arrays for every input of the graph, `adapter_ids` of a bank excepted; bfloat16, which numpy lacks,
    stays a torch tensor.

    Raises `SessionError` for unknown and missing names, other dtypes and shapes, and sizes that do not fit each other.
    """
    if not isinstance(inputs, Mapping):
        raise SessionError(f"inputs is a {type(inputs).__name__}; give a dict with {listing(graph)}")
    if ADAPTER_IDS in inputs and bank:
        raise SessionError(
            f"give {ADAPTER_IDS} as run(inputs, {ADAPTER_IDS}=[...]): onnxruntime does not check what is in inputs"
        )
    expected = {name: info for name, info in graph.items() if name != ADAPTER_IDS or not bank}
    unknown = [name for name in inputs if name not in expected]
    missing = [name for name in expected if name not in inputs]
    if unknown or missing:
        said = [f"unknown {listing(unknown)}"] if unknown else []
        said += [f"missing {listing(missing)}"] if missing else []
        close = near_misses(unknown[0], expected) if unknown else []
        raise SessionError(
            f"inputs do not fit the graph: {', '.join(said)}; it takes {listing(expected)}"
            + (f" (did you mean {close[0]!r}?)" if close else "")
        )
    arrays: dict[str, Array] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, info in expected.items():
        array = _array(name, inputs[name])
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype != info.dtype:
            raise SessionError(f"input {name!r} is {dtype}, the graph takes {info.dtype}")
        if array.ndim != len(info.shape):
            raise SessionError(f"input {name!r} has {array.ndim} dimensions {array.shape}, the graph takes {info}")
        for axis, (want, got) in enumerate(zip(info.shape, array.shape, strict=True)):
            if isinstance(want, int) and want != got:
                raise SessionError(f"input {name!r} has size {got} in axis {axis}, the graph takes {info}")
            if isinstance(want, str):
                size, first = sizes.setdefault(want, (got, name))
                if size != got:
                    raise SessionError(
                        f"inputs {first!r} and {name!r} have different sizes in axis {want!r}: {size} and {got}"
                    )
        arrays[name] = array
    return arrays


def _array(name: str, given: Any) -> Array:
    try:
        if isinstance(given, torch.Tensor):
            tensor = given.detach().cpu().contiguous()
            return tensor if tensor.dtype is torch.bfloat16 else tensor.numpy()
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; sparse and meta tensors
        raise SessionError(f"input {name!r} is no array: {error}") from error
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar one-dimensional


def check_ids(
    arrays: Mapping[str, Array], graph: Mapping[str, TensorInfo], adapter: Any, adapter_ids: Any
) -> list[str | int | None]:
    """The adapter of every sample: a name, a slot, or None. Raises `SessionError` where it is not one per sample."""
    axis = graph[ADAPTER_IDS].shape[0]
    sizes = {
        array.shape[i]
        for name, array in arrays.items()
        for i, dim in enumerate(graph[name].shape)
        if dim == axis and isinstance(dim, str)
    }
    batch = sizes.pop() if sizes else axis
    if isinstance(adapter, Mapping):
        raise SessionError(
            "a graph with a bank has one adapter for every sample, without weights: run a swappable graph with "
            "adapter={name: weight}, or make the sum a tenant of its own (fg.combine)"
        )
    if adapter_ids is None:
        if not (adapter is None or isinstance(adapter, str)) or not isinstance(batch, int):
            raise SessionError("give adapter_ids, one name (or None) for every sample")
        return [adapter] * batch
    if adapter is not None:
        raise SessionError("give adapter= for the whole batch or adapter_ids= for its samples, not both")
    ids = adapter_ids.tolist() if hasattr(adapter_ids, "tolist") else adapter_ids
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise SessionError(f"adapter_ids={adapter_ids!r}: give a list with a name (or None) for every sample")
    if isinstance(batch, int) and len(ids) != batch:
        raise SessionError(f"adapter_ids has {len(ids)} entries, the batch has {batch} samples")
    return list(ids)
