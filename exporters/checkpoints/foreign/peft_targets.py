"""Which layers of a model the patterns in PEFT's `adapter_config.json` name.

Written against PEFT 0.21. Patterns are PEFT's, not `Spec`'s: a list holds names or their endings after a dot, a string
is a regular expression for the whole name, and `modules_to_save` matches any ending.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from ....rewriter.base_names import base_modules
from ....rewriter.capture.outline import OutlinedLinear
from ....rewriter.errors import CheckpointError, SpecError
from ....rewriter.grafted_class import base_class
from ....rewriter.modules.wrappers import unwrap
from ....rewriter.targeting.bounded_regex import full_match
from ....rewriter.targeting.model_embeddings import told_embeddings
from .peft_attention import takes_whole
from .peft_convolutions import is_convolution


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT would wrap this module as a linear layer."""
    kind = base_class(module)
    return issubclass(kind, nn.Linear) or is_conv1d(module) or issubclass(kind, OutlinedLinear)


def is_embedding(module: nn.Module) -> bool:
    """Whether PEFT would wrap this module as an embedding, which its LoRA alone does."""
    return issubclass(base_class(module), nn.Embedding)


def _lora_takes(module: nn.Module) -> bool:
    """Whether PEFT's LoRA, and none of its others, would wrap this module."""
    return is_embedding(module) or is_convolution(module) or takes_whole(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, known by its name so that transformers need not be there, or was one
    before it became a product in a graph."""
    return base_class(module).__name__ == "Conv1D" or (isinstance(module, OutlinedLinear) and module.contracted == 0)


def attention_outputs(model: nn.Module) -> set[str]:
    """The output projections whose weight `nn.MultiheadAttention` reads without calling the layer."""
    modules = base_modules(unwrap(model))
    return {f"{name}.out_proj".lstrip(".") for name, m in modules if issubclass(base_class(m), nn.MultiheadAttention)}


def _regex(pattern: str, name: str, what: str) -> Any:
    """The match of a whole name, or None."""
    try:
        return full_match(pattern, name)
    except SpecError as error:
        raise CheckpointError(f"{what}: in its config, {error}") from error


def names_in(given: Any, key: str, what: str) -> list[str]:
    """A config entry that has to be a list of names."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) and name for name in given):
        raise CheckpointError(f"{what}: {key}={given!r} in its config is not a list of names")
    return list(given)


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _layer(name: str, patterns: Any, what: str) -> int | None:
    """The first layer number in a dotted name."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else names_in(patterns, "layers_pattern", what):
        found = _regex(rf"(?:.*?\.)??{pattern}\.(?P<number>\d+)\..*", name, what)
        if found:
            return int(found["number"])
    return None


def _linear_names(model: nn.Module, modules: Mapping[str, nn.Module], task: Any) -> list[str]:
    """What PEFT makes of `all-linear`: every linear layer but the output embedding or the classifier."""
    names = [name for name, module in modules.items() if name and is_linear(module)]
    if not callable(getattr(model, "get_output_embeddings", None)):
        return names
    head = told_embeddings(model, "output")
    if head is None and task == "SEQ_CLS":
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(head, nn.Module):
        return names
    return [name for name in names if modules[name] is not unwrap(head)]


def told_names(config: Mapping[str, Any], model: nn.Module, what: str, parts: Iterable[str] = ()) -> list[str] | None:
    """`target_names` where they can be known: a graph may have lost the model's module types and their order."""
    return None if isinstance(unwrap(model), fx.GraphModule) else target_names(config, model, what, parts)


def target_names(config: Mapping[str, Any], model: nn.Module, what: str, parts: Iterable[str] = ()) -> list[str] | None:
    """The layers that PEFT would adapt, in model order; None where the config leaves it to PEFT's defaults.

    Args:
        parts: names of parts of fused layers, which count as layers of their own.
    """
    root = unwrap(model)
    modules = dict(base_modules(root))
    targets, exclude = config.get("target_modules"), config.get("exclude_modules") or []
    layers, layers_pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    saved = names_in(config.get("modules_to_save") or [], "modules_to_save", what)
    if targets is None:
        return None
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _linear_names(root, modules, config.get("task_type"))
    elif not isinstance(targets, str):
        targets = names_in(targets, "target_modules", what)
    if not isinstance(exclude, str):
        exclude = names_in(exclude, "exclude_modules", what)
    chosen_layers = layers or [] if not isinstance(layers, int) else [layers]
    if not isinstance(chosen_layers, list) or not all(type(layer) is int for layer in chosen_layers):
        raise CheckpointError(f"{what}: layers_to_transform={layers!r} in its config is not a list of layer numbers")
    found = []
    lora = config.get("peft_type") == "LORA"
    layers_here = [
        name for name, module in modules.items() if name and (is_linear(module) or (lora and _lora_takes(module)))
    ]
    for name in (*layers_here, *parts):
        if _regex(exclude, name, what) if isinstance(exclude, str) else _ends(name, exclude):
            continue
        if any(_regex(rf"(.*\.)?{m}(\..*)?", name, what) for m in saved):
            continue
        if isinstance(targets, str):
            hit = _regex(targets, name, what)
        else:
            hit = name in targets  # an exact name is taken whatever layers are chosen
            if not hit and _ends(name, targets):
                hit = not chosen_layers or _layer(name, layers_pattern, what) in chosen_layers
        if hit:
            found.append(name)
    return found


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any, what: str) -> Any:
    """`rank_pattern` and `alpha_pattern`: the value of the first key that matches the name or its ending."""
    for key, given in patterns.items():
        if _regex(rf"(.*\.)?({key})", name, what):
            return given
    return default


def saved_names(endings: Iterable[str], model: nn.Module) -> list[str]:
    """The modules `modules_to_save` names: any ending counts, without regard to dots; only the outermost ones."""
    names = [n for n, _ in base_modules(unwrap(model)) if n and any(n.endswith(e) for e in endings)]
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
