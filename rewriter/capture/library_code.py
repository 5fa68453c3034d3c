"""Which code is Python's, torch's, numpy's or ours: what that reads is its own affair, and it is what it is."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import torch

_STANDARD = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_LIBRARIES = tuple(
    os.path.dirname(os.path.realpath(str(file))) + os.sep
    for file in (torch.__file__, np.__file__, Path(__file__).parent)
)


@functools.lru_cache(maxsize=4096)
def _is_library(file: str, module: str) -> bool:
    """Whether code is Python's, torch's, numpy's or ours: what these read is their own affair."""
    if file.startswith("<"):  # made at run time: a dataclass's methods, an fx graph's code, a cell of a notebook
        made = file.startswith(("<frozen", "<eval_with_key", "<fxgraft")) or module.startswith("namedtuple_")
        return made or is_library_name(module)
    path = os.path.realpath(file)
    return path.startswith(_LIBRARIES) or (path.startswith(_STANDARD) and "-packages" not in path)


def is_library_name(module: str) -> bool:
    top = module.partition(".")[0]
    return top in ("torch", "numpy", "fxgraft", "builtins") or (top in sys.stdlib_module_names and top != "__main__")


def runs_library_code(frame: types.FrameType) -> bool:
    return _is_library(frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")))
