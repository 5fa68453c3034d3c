"""A causal language model with its key-value cache as plain tensors, which is what a graph can take and give.

    model(input_ids, attention_mask, past_key_values=Cache)  ->  logits, Cache
    cached(input_ids, attention_mask, past_key_0, past_value_0, ...)  ->  {logits, present_key_0, present_value_0, ...}

One graph does both halves of generation: the prompt is a call with an empty past, each step a call with one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....backends.artifact.signature import Axes
from ....rewriter.calls.forward_inputs import NAMES, OWN_CLASS, release_inputs, take_inputs
from ....rewriter.capture.skeleton import copy_skeleton
from ....rewriter.errors import ExportError

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
KEY, VALUE = "past_key_{}", "past_value_{}"
PRESENT_KEY, PRESENT_VALUE = "present_key_{}", "present_value_{}"
#: Sizes: `past` tokens are in the cache, `sequence` new ones come, and the mask covers both.
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "past + sequence"


@dataclass(frozen=True)
class CachedExample:
    """Example inputs of a cached model, and their dynamic axes."""

    inputs: dict[str, torch.Tensor]
    axes: Axes
    layers: int


def cached(model: nn.Module, layers: int) -> nn.Module:
    """The model with a forward over plain tensors: a copy over the same tensors, its adapters included.

    forward(input_ids (batch, sequence), attention_mask (batch, past + sequence), past_key_<i>, past_value_<i> (batch,
    heads, past, width)) gives {"logits": (batch, sequence, vocabulary), "present_key_<i>", "present_value_<i>": (batch,
    heads, past + sequence, width)}. Positions are counted along the mask, so rows may be padded on the left.
    """
    twin = copy_skeleton(model).train(model.training)
    names = twin.__dict__.get(NAMES, ())
    if OWN_CLASS in twin.__dict__:  # a bank's forward takes adapter_ids; it goes around the new one
        release_inputs(twin)
    twin.__class__ = _class(type(twin), layers)
    take_inputs(twin, names)
    return twin


def _class(own: type[nn.Module], layers: int) -> type[nn.Module]:
    takes_positions = POSITIONS in inspect.signature(own.forward).parameters
    pairs = [(KEY.format(i), VALUE.format(i)) for i in range(layers)]

    def forward(self: nn.Module, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        ids, mask = given[IDS], given[MASK]
        more = {}
        if takes_positions:
            # What generate() does: a padded row counts from its first token.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            more[POSITIONS] = positions[:, -ids.shape[1] :]
        cache = _filled([(given[key], given[value]) for key, value in pairs])
        output = own.forward(self, **{IDS: ids, MASK: mask, "past_key_values": cache, "use_cache": True}, **more)
        tensors = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        for i, layer in enumerate(output["past_key_values"].layers):
            tensors[PRESENT_KEY.format(i)], tensors[PRESENT_VALUE.format(i)] = layer.keys, layer.values
        return tensors

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["self", IDS, MASK, *(name for pair in pairs for name in pair)]
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return type(own.__name__, (own,), {"__module__": own.__module__, "forward": forward})


def _filled(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        # Not through update(), which joins them to an empty tensor of another shape.
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def cached_example(model: nn.Module, example_inputs: Any) -> CachedExample:
    """What a cached model is traced and checked with: the first half of the example's tokens is in the cache.

    Raises `ExportError` where the example is not token ids (and their mask) of at least 2 rows of 4 tokens, and for
    models whose cache is no growing list of keys and values: encoder-decoders, sliding windows, recurrent states.
    """
    given = example_inputs if isinstance(example_inputs, Mapping) else dict(zip((IDS, MASK), example_inputs))  # noqa: B905
    unknown = [name for name in given if name not in (IDS, MASK)]
    ids = given.get(IDS)
    if unknown or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise ExportError(
            f"cache=True takes example_inputs with {IDS!r} (batch, sequence) and {MASK!r}, which may be left out; "
            f"{f'{unknown[0]!r} is neither' if unknown else f'{IDS!r} is missing or no matrix'}. Positions are counted "
            "in the graph, the cache is added by itself"
        )
    if ids.shape[0] < 2 or ids.shape[1] < 4:
        raise ExportError(
            f"cache=True needs an example of at least 2 rows of 4 tokens, half of them for the cache; {IDS!r} is "
            f"{ids.shape[0]} x {ids.shape[1]}"
        )
    # Whatever padding the example has: a query that may see nothing, as on the left, has no defined result to compare.
    mask = torch.ones_like(ids)
    half = ids.shape[1] // 2
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ExportError(
            f"cache=True is for decoders; {type(model).__name__} is an encoder-decoder, which exports without a cache"
        )
    try:
        with torch.no_grad():
            past = model(input_ids=ids[:, :half], use_cache=True).past_key_values
        kinds = {type(layer).__name__ for layer in past.layers}
    except Exception as error:  # whatever a model raises that knows no cache
        raise ExportError(
            f"cache=True: {type(model).__name__} gives no key-value cache for the example: "
            f"{type(error).__name__}: {error}"
        ) from error
    if kinds != {"DynamicLayer"}:
        raise ExportError(
            f"cache=True is for caches that grow by a key and a value per token; {type(model).__name__} has layers of "
            f"{', '.join(sorted(kinds))}"
        )
    # A copy: torch.export writes the base of a view into its guards, and cannot find it again.
    inputs, axes = {IDS: ids[:, half:].clone(), MASK: mask}, {IDS: {0: BATCH, 1: SEQUENCE}, MASK: {0: BATCH, 1: TOTAL}}
    for i, layer in enumerate(past.layers):
        for name, tensor in ((KEY.format(i), layer.keys), (VALUE.format(i), layer.values)):
            inputs[name], axes[name] = tensor.clone(), {0: BATCH, 2: PAST}
    return CachedExample(inputs, axes, len(past.layers))
