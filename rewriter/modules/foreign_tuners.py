"""Adapters of other libraries inside a model: grafting onto their factors would be neither the base nor theirs."""

from __future__ import annotations

from torch import nn

from ..base_names import base_modules
from ..errors import AdapterError, listing

#: packages whose layers wrap or hold adapters
_LIBRARIES = ("peft", "loralib", "adapters", "torchtune.modules.peft", "nemo.collections.nlp.modules.common.megatron")


def _is_tuner(module: nn.Module) -> bool:
    homes = [cls.__module__ for cls in type(module).__mro__]
    return any(home == library or home.startswith(f"{library}.") for home in homes for library in _LIBRARIES)


def check_no_tuners(model: nn.Module) -> None:
    """Raise `AdapterError` where layers of the model are another library's adapters."""
    found = {path: module for path, module in base_modules(model) if _is_tuner(module)}
    if not found:
        return
    kinds = listing(sorted({f"{type(m).__module__.partition('.')[0]}.{type(m).__name__}" for m in found.values()}), 3)
    where = listing([path for path in found if path], 3) or "the model itself"
    raise AdapterError(
        f"this {type(model).__name__} holds adapters of another library ({kinds}, at {where}), and grafting would "
        "adapt their factors. Take them out first: merge_and_unload() keeps their effect, unload() drops it; or open "
        "the saved PEFT folder on the base model with fg.load_adapter(base_model, folder)"
    )
