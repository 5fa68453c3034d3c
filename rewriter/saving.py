"""`save_pretrained` of an adapted model: what a training loop calls to save goes to a writer that knows adapters.

The model keeps its own class; the method is an attribute of the instance, which copies and pickles with it. The writer
itself lives with the checkpoint formats (`exporters/pretrained.py`), which register it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .state import ADAPTERS, base_modules

SAVE = "save_pretrained"
Writer = Callable[..., Any]
_writers: dict[str, Writer] = {}


def register_writers(root: Writer, inner: Writer) -> None:
    """Who writes for `save_pretrained`: of the model that was rewritten, and of a module inside it. Both are called as
    `writer(module, own, *args, **kwargs)`, `own` being the bound method of the module's own class."""
    _writers.update(root=root, inner=inner)


def take_over_saving(root: nn.Module) -> None:
    """Give the root, and the modules inside it that hold adapters and have a `save_pretrained`, one that keeps them."""
    for path, module in base_modules(root):
        if not callable(getattr(type(module), SAVE, None)):
            continue
        if not path or any(ADAPTERS in child._modules for _, child in base_modules(module)):
            module.__dict__[SAVE] = functools.partial(_save, module, "inner" if path else "root")


def release_saving(root: nn.Module) -> None:
    """Give every module its own `save_pretrained` back."""
    for _, module in base_modules(root):
        module.__dict__.pop(SAVE, None)


def _save(module: nn.Module, place: str, *args: Any, **kwargs: Any) -> Any:
    own = functools.partial(getattr(type(module), SAVE), module)
    return _writers[place](module, own, *args, **kwargs) if place in _writers else own(*args, **kwargs)
