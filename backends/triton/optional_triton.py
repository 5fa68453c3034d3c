"""triton where it is installed; without it the kernel files import all the same, and their definitions run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None

if INSTALLED:
    import triton.language as tl
    from triton import jit

    VERSION = importlib.metadata.version("triton")
    #: kernels run as Python on CPU tensors; fixed when triton is imported
    INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
else:
    tl: Any = None  # type: ignore[no-redef]
    VERSION, INTERPRETED = "", False

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[no-redef]
        return function


#: devices whose tensors the kernels take
DEVICES = ("cpu",) if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_on(x: Tensor) -> bool:
    """Whether a kernel can take this input, or its definition must run."""
    return INSTALLED and x.device.type in DEVICES and x.dtype in DTYPES


def precision() -> str:
    """How float32 products are made: as torch's setting for CUDA products says. Other dtypes ignore it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
