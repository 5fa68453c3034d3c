"""An encoder-decoder with its caches as plain tensors: both halves of it in one graph, and nothing between them.

    encoder   input_ids, attention_mask  ->  present_cross_key_0, present_cross_value_0, ...
    decoder   decoder_input_ids, attention_mask, past_cross_key_0, ..., past_key_0, ...  ->  logits, present_key_0, ...

What the decoder attends to of the source is an input of its own: no node of the encoder lies on the way to the logits,
and the halves can be cut apart. A runtime that runs the graph whole computes the encoder at every step, which costs
time and changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ....backends.artifact.signature import Axes
from .cache_layers import BATCH, PAST, PRESENT, SEQUENCE
from .cache_plan import MASK, CachePlan

DECODER_IDS, CROSS, SOURCE = "decoder_input_ids", "cross_", "source"


def axes_of(plan: CachePlan) -> Axes:
    """The dynamic axes of every input. A source of token ids has any length; features are as long as the model says."""
    free = {0: BATCH, 1: SOURCE} if plan.reads_tokens else {0: BATCH}
    axes: Axes = {plan.source: free}
    if plan.masked:
        axes[MASK] = free
    axes |= {DECODER_IDS: {0: BATCH, 1: SEQUENCE}, **plan.inputs}
    for name in cross_names(plan, PAST):
        axes[name] = {0: BATCH, 2: SOURCE} if plan.reads_tokens else {0: BATCH}
    return axes


def cross_names(plan: CachePlan, side: str) -> list[str]:
    return [f"{side}{CROSS}{name}" for i, layer in enumerate(plan.cross) for name in layer.axes(i, SOURCE)]


def cross_held(plan: CachePlan, cache: Any, side: str) -> dict[str, torch.Tensor]:
    """What a cache of transformers holds of the source."""
    found: dict[str, torch.Tensor] = {}
    for i, (layer, held) in enumerate(zip(plan.cross, cache.layers, strict=True)):
        found |= {f"{side}{CROSS}{name}": tensor for name, tensor in layer.tensors(held, i).items()}
    return found


def seq2seq_class(own: type[nn.Module], plan: CachePlan) -> type[nn.Module]:
    """A model's class with a forward over the inputs of `axes_of`."""

    def forward(self: Any, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        masked = {MASK: given[MASK]} if plan.masked else {}
        tokens = given[DECODER_IDS]
        encoded = self.get_encoder()(**{plan.source: given[plan.source]}, **masked)[0]

        def decoded(states: torch.Tensor, ids: torch.Tensor, cache: Any) -> Any:
            source = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), **masked}
            return own.forward(self, **source, **{DECODER_IDS: ids, "past_key_values": cache, "use_cache": True})

        # The decoder makes keys and values of the source in its first step, whatever the token; of that step only these
        # leave the graph, so nothing else of it stays in there.
        fresh = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = decoded(encoded, tokens[:, :1], fresh)["past_key_values"]
        cross = {name.removeprefix(PAST + CROSS): given[name] for name in cross_names(plan, PAST)}
        held = DynamicCache()
        held.layers.extend(layer.filled(i, cross, 0) for i, layer in enumerate(plan.cross))
        cache = EncoderDecoderCache(plan.filled(given, 0), held)
        cache.is_updated = dict.fromkeys(range(len(plan.cross)), True)
        # Only their shape is read: the keys and values are there already.
        length = next(iter(cross.values())).shape[2]
        states = encoded.new_zeros((tokens.shape[0], length, encoded.shape[-1]))
        output = decoded(states, tokens, cache)
        return {
            "logits": output["logits"],
            **plan.held(output["past_key_values"].self_attention_cache, PRESENT),
            **cross_held(plan, first.cross_attention_cache, PRESENT),
        }

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *axes_of(plan))]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type(own.__name__, (own,), {"__module__": own.__module__, "forward": forward})


def empty(plan: CachePlan, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The caches before the first token; what the source gives is zero, in its size."""
    made = {name: inputs[name][:, :, :0] for name in plan.inputs}
    return made | {name: torch.zeros_like(inputs[name]) for name in cross_names(plan, PAST)}
