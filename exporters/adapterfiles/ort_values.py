"""Tensors between torch and ONNX Runtime: values of every dtype, bfloat16 included, on the CPU or a device."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# onnxruntime's name -> torch's dtype, for the types an adapter or an input may have.
TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
_BFLOAT16 = 16  # ONNX's number of the type


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph. `shape` has a name (or None) for a free dimension, `type` is onnxruntime's."""

    name: str
    shape: tuple[int | str | None, ...]
    type: str

    @property
    def dtype(self) -> str:
        known = TYPES.get(self.type)
        return str(known).removeprefix("torch.") if known else self.type.removeprefix("tensor(").removesuffix(")")

    def __str__(self) -> str:
        return f"{self.dtype} ({' x '.join('?' if dim is None else str(dim) for dim in self.shape) or 'scalar'})"


@dataclass(frozen=True)
class Device:
    """Where values of a session live: onnxruntime's device type ("cpu" or "cuda") and number."""

    type: str = "cpu"
    index: int = 0


CPU = Device()


def to_torch(value: Any) -> torch.Tensor:
    """A copy of an OrtValue on the CPU. Raises `KeyError` for types that are not in `TYPES`."""
    dtype = TYPES[value.data_type()]
    if dtype is torch.bfloat16:  # numpy has none: the same bits
        raw = bytearray(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()))
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return flat.view(tuple(value.shape()))
    return torch.from_numpy(np.array(value.numpy(), order="C"))


def to_ort(tensor: torch.Tensor | np.ndarray, device: Device = CPU) -> Any:
    """The tensor as an OrtValue on a device; on the CPU it shares the tensor's memory where that is contiguous."""
    from onnxruntime import OrtValue

    if isinstance(tensor, np.ndarray):
        return OrtValue.ortvalue_from_numpy(tensor, device.type, device.index)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is not torch.bfloat16:
        return OrtValue.ortvalue_from_numpy(tensor.numpy(), device.type, device.index)
    bits = tensor.view(torch.int16).numpy()
    if device.type == "cpu":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    value = OrtValue.ortvalue_from_shape_and_type(list(tensor.shape), _BFLOAT16, device.type, device.index)
    value.update_inplace(bits)
    return value


def to_array(value: Any) -> np.ndarray:
    """An output as an array on the CPU; bfloat16, which numpy lacks, as float32 of the same values."""
    return to_torch(value).float().numpy() if value.data_type() == "tensor(bfloat16)" else value.numpy()
