"""PEFT-like tensor names in one form, whatever adapter's name and whatever wrapper stands in them.

    X.lora_A.<adapter>.weight, X.lora_A_vec.<adapter>, X.modules_to_save.<adapter>.weight
    ->  base_model.model.X.lora_A.weight, base_model.model.X.lora_A_vec, base_model.model.X.weight

A name is dropped only where it cannot matter; tensors of two adapters in one file, and two keys that mean the same
tensor, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ....rewriter.errors import CheckpointError, listing
from .format import Format

PREFIX = "base_model.model."  # of every key in a folder that PEFT, or a program built on it, wrote
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_keys(tensors: Mapping[str, Tensor], formats: Iterable[Format], what: str) -> dict[str, Tensor]:
    """The tensors of a PEFT-like folder under keys with PEFT's prefix and without adapter and wrapper names.

    Args:
        formats: those it may be in; they say behind which names an adapter's may follow.

    Raises:
        CheckpointError: tensors of several adapters, or two keys for one tensor.
    """
    stem = re.compile("|".join(format.names for format in formats if format.names))
    leaves = {"weight", "bias"}.union(*(format.leaves for format in formats))
    plain: dict[str, Tensor] = {}
    adapters: dict[str, str] = {}
    prefixed = any("base_model." in key for key in tensors)
    for key, tensor in tensors.items():
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        if parts[:2] == ["module", "base_model"]:
            del parts[0]
        if "original_module" in parts:
            continue  # the base's own, beside the trained copy that stands in for it
        parts, adapter = _without_adapter(parts, stem, leaves)
        if adapter is not None:
            adapters.setdefault(adapter, key)
        name = ".".join(parts)
        name = name if prefixed else PREFIX + name
        if name in plain and not torch.equal(plain[name], tensor):  # PEFT writes a trained head twice at times
            raise CheckpointError(f"{what} has two tensors for {name!r}, and they differ: one is {key!r}")
        plain[name] = tensor
    if len(adapters) > 1:
        raise CheckpointError(
            f"{what} holds tensors of several adapters, {listing(adapters)}, as in {listing(adapters.values(), 2)}; "
            "save each to a folder of its own"
        )
    return plain


def _without_adapter(parts: list[str], stem: re.Pattern[str], leaves: set[str]) -> tuple[list[str], str | None]:
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        named = len(parts) - at > 2
        return parts[:at] + parts[at + 1 + named :], parts[at + 1] if named else None
    at = next((i for i, part in enumerate(parts) if stem.fullmatch(part)), len(parts))
    rest = parts[at + 1 :]
    if (len(rest) == 1 and rest[0] not in leaves) or (len(rest) == 2 and rest[1] in leaves):
        return parts[: at + 1] + rest[1:], rest[0]
    return parts, None
