"""Other programs' tensor names in one form, and base weights that came along with an adapter.

    X.lora_A.<adapter>.weight, X.lora_A_vec.<adapter>, X.modules_to_save.<adapter>.weight
    ->  base_model.model.X.lora_A.weight, base_model.model.X.lora_A_vec, base_model.model.X.weight

A name is dropped only where it cannot matter; tensors of two adapters in one file, and two keys that mean the same
tensor, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ...rewriter.errors import CheckpointError, listing
from ...rewriter.state import base_modules, unwrap

PREFIX = "base_model.model."  # of every key in a folder that PEFT, or a program built on it, wrote
_STEM = re.compile(
    r"lora_[AB]\d*|lora_[AB]_vec|lora_route|lora_embedding_[AB]|lora_magnitude_vector|unilora_\w+|glora_[A-E]"
)
_LEAVES = frozenset({"weight", "bias", "Xd", "Xu", "X", "zeros"})
_EMBEDDINGS = ("embed_tokens", "lm_head")  # what PEFT takes for them by name
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_keys(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The tensors of a PEFT-like folder under keys with PEFT's prefix and without adapter and wrapper names.

    Raises:
        CheckpointError: tensors of several adapters, or two keys for one tensor.
    """
    plain: dict[str, Tensor] = {}
    adapters: dict[str, str] = {}
    prefixed = any("base_model." in key for key in tensors)
    for key, tensor in tensors.items():
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        if parts[:2] == ["module", "base_model"]:
            del parts[0]
        if "original_module" in parts:
            continue  # the base's own, beside the trained copy that stands in for it
        parts, adapter = _without_adapter(parts)
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


def _without_adapter(parts: list[str]) -> tuple[list[str], str | None]:
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        named = len(parts) - at > 2
        return parts[:at] + parts[at + 1 + named :], parts[at + 1] if named else None
    stem = next((i for i, part in enumerate(parts) if _STEM.fullmatch(part)), None)
    if stem is None:
        return parts, None
    rest = parts[stem + 1 :]
    if (len(rest) == 1 and rest[0] not in _LEAVES) or (len(rest) == 2 and rest[1] in _LEAVES):
        return parts[: stem + 1] + rest[1:], rest[0]
    return parts, None


def embeddings(model: nn.Module) -> set[str]:
    """The input and output embeddings, which PEFT stores with an adapter that does not name them."""
    root = unwrap(model)
    getters = (getattr(root, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found = {id(getter()) for getter in getters if callable(getter)}
    return {n for n, m in base_modules(root, every_name=True) if id(m) in found or n.split(".")[-1] in _EMBEDDINGS}


def base_weights(
    given: Mapping[str, Tensor], model: nn.Module, what: str, trained: Collection[str] | None = None
) -> tuple[tuple[str, ...], dict[str, Tensor], list[str]]:
    """Weights of the base stored with an adapter: embeddings that PEFT adds by itself, whole state dicts.

    A tensor that equals the model's says nothing. Where it differs, its module comes with the adapter, as if it had
    been trained with it.

    Args:
        given: by the model's own names; a layer with an adapter has its base weight under `<site>.base_layer.`.
        trained: the modules that may differ; None allows it for every one.

    Returns:
        the modules that differ, their whole state, and the keys that are not understood.

    Raises:
        CheckpointError: a shape is not the model's, or the base weight under an adapter is not.
    """
    state = {".".join(p for p in k.split(".") if p not in _WRAPPERS): t for k, t in unwrap(model).state_dict().items()}
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in given.items():
        name = key.replace(".base_layer.", ".")
        path, _, leaf = name.rpartition(".")
        if name not in state or not path:
            unknown.append(key)
            continue
        own, known = state[name], name != key or trained is None or path in trained
        if tensor.shape == own.shape and (own.is_meta or torch.equal(tensor.to(own.dtype), own.cpu())):
            continue
        if not known:
            unknown.append(key)
        elif tensor.shape != own.shape:
            raise CheckpointError(
                f"{what} stores {name!r} of the base as {tuple(tensor.shape)}, this model's is {tuple(own.shape)}: it "
                "was made on another base, or on one whose embeddings were resized (save_embedding_layers); resize "
                f"this model's first, model.resize_token_embeddings({tensor.shape[0]})"
            )
        elif name != key:
            raise CheckpointError(
                f"{what} stores the base weight under its adapter, {name!r}, and it is not this model's: the adapter "
                "belongs to another base, or to one whose embeddings were resized. Copy the stored weight "
                f"({PREFIX}{key}) into the model first"
            )
        else:
            modules.setdefault(path, {})[leaf] = tensor
    values: dict[str, Tensor] = {}
    for path, changed in modules.items():
        whole = {k.removeprefix(f"{path}."): t for k, t in state.items() if k.startswith(f"{path}.")}
        values |= {f"{path}.{leaf}": changed.get(leaf, t) for leaf, t in whole.items()}
    return tuple(modules), values, unknown
