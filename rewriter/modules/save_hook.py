"""`save_pretrained` of an adapted model: what a training loop calls to save goes to a writer that knows adapters.

The model keeps its own class; the method is an attribute of the instance, which copies and pickles with it. The writer
itself lives with the checkpoint formats (`exporters/checkpoints/save_pretrained.py`), which register it here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from ..adapter_tensors import ADAPTERS, SHARED
from ..base_names import base_modules
from ..errors import AdapterError, listing

SAVE = "save_pretrained"
#: with it transformers' `Trainer` takes a quantised model: it has something to train
LOADED = "_hf_peft_config_loaded"
Writer = Callable[..., Any]
_writers: dict[str, Writer] = {}


def register_writers(root: Writer, inner: Writer) -> None:
    """Who writes for `save_pretrained`: of the model that was rewritten, and of a module inside it. Both are called as
    `writer(module, own, *args, **kwargs)`, `own` being the bound method of the module's own class."""
    _writers.update(root=root, inner=inner)


def take_over_saving(root: nn.Module) -> None:
    """Give the root, and the modules inside it that hold adapters and have a `save_pretrained`, one that keeps them.

    What was saved is loaded with `load_state_dict(..., strict=False)` by every training loop, which is silent where the
    adapters are others: that is an error here.
    """
    if not isinstance(root, fx.GraphModule):  # a copy of one would call its hooks on the original
        _forget_hook(root)
        root.register_load_state_dict_pre_hook(_check_loaded)
    if getattr(root, "is_quantized", False) and hasattr(type(root), LOADED):
        root.__dict__[LOADED] = True
    for path, module in base_modules(root):
        if not callable(getattr(type(module), SAVE, None)):
            continue
        if not path or any(ADAPTERS in child._modules for _, child in base_modules(module)):
            module.__dict__[SAVE] = functools.partial(_save, module, "inner" if path else "root")


def release_saving(root: nn.Module) -> None:
    """Give every module its own `save_pretrained` back, and the root its own loading."""
    _forget_hook(root)
    root.__dict__.pop(LOADED, None)
    for _, module in base_modules(root):
        module.__dict__.pop(SAVE, None)


def _save(module: nn.Module, place: str, *args: Any, **kwargs: Any) -> Any:
    own = functools.partial(getattr(type(module), SAVE), module)
    return _writers[place](module, own, *args, **kwargs) if place in _writers else own(*args, **kwargs)


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key is of an adapter's tensor."""
    return not {ADAPTERS, SHARED}.isdisjoint(key.split("."))


def _check_loaded(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Raise where a state dict for this model has tensors of adapters it does not have."""
    given = [key for key in state if key.startswith(prefix) and is_adapter_key(key)]
    known = {prefix + key for key in module.state_dict()} if given else set()
    if unknown := [key for key in given if key not in known]:
        raise AdapterError(
            f"this state dict has {len(unknown)} tensor(s) of adapters that the {type(module).__name__} does not have: "
            f"{listing(unknown, 3)}. Rewrite the base with the spec and the name they were saved under, or open the "
            "adapter folder beside it with fg.load_adapter"
        )


def _forget_hook(root: nn.Module) -> None:
    for key, hook in list(root._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _check_loaded:
            del root._load_state_dict_pre_hooks[key]
