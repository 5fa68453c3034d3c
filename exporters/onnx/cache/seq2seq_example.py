"""The example that an encoder-decoder with a cache is traced and checked with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....backends.artifact.signature import Axes
from ....rewriter.errors import ExportError, listing
from .cache_layers import PAST, PRESENT, CacheLayer
from .cache_plan import IDS, MASK, CachePlan
from .cached_seq2seq import CROSS, DECODER_IDS, axes_of, cross_held, cross_names, empty

_TOKENS = 8  # of the decoder, where the example has none


@dataclass(frozen=True)
class Seq2SeqExample:
    """Example inputs of a cached encoder-decoder, their axes, and the texts they were made of."""

    plan: CachePlan
    inputs: dict[str, torch.Tensor]
    axes: Axes
    text: torch.Tensor

    def hold(self, model: nn.Module, module: nn.Module, alike: float) -> None:
        """Raise `ExportError` where the source once and steps with the caches give other logits than all at once."""
        source = {name: self.inputs[name] for name in (self.plan.source, MASK) if name in self.inputs}
        with torch.no_grad():
            want = model(**source, **{DECODER_IDS: self.text, "use_cache": False})["logits"][:, -1]
            cache = empty(self.plan, self.inputs)
            cache |= self._next(module(**source, **{DECODER_IDS: self.text[:, :1]}, **cache), [CROSS])
            for tokens in (self.text[:, :-1], self.text[:, -1:]):
                output = module(**source, **{DECODER_IDS: tokens}, **cache)
                cache |= {name: value for name, value in self._next(output, [""]).items() if CROSS not in name}
        error = float((output["logits"][:, -1] - want).abs().max() / want.abs().max().clamp(min=1e-30))
        if not error <= alike:
            raise ExportError(
                f"cache=True: {type(model).__name__} gives other logits with its cache than without, by {error:.1e} of "
                "the largest: its tokens do not come one after another from the caches alone. Export it without "
                "cache=True"
            )

    def _next(self, output: Mapping[str, torch.Tensor], kinds: list[str]) -> dict[str, torch.Tensor]:
        starts = tuple(PRESENT + kind for kind in kinds)
        return {PAST + name.removeprefix(PRESENT): value for name, value in output.items() if name.startswith(starts)}


def seq2seq_example(model: nn.Module, example_inputs: Any) -> Seq2SeqExample:
    """Example inputs from the source (token ids or features), its mask, and tokens of the decoder, which may be left
    out. Half of the tokens are in the cache.

    Raises `ExportError` where the example is something else, or the model has other caches than growing ones.
    """
    source = getattr(model, "main_input_name", IDS)
    named = example_inputs if isinstance(example_inputs, Mapping) else dict(zip((source, MASK), example_inputs))  # noqa: B905
    given = {name: value for name, value in named.items() if value is not None}
    unknown = [name for name in given if name not in (source, MASK, DECODER_IDS)]
    if unknown or not isinstance(given.get(source), torch.Tensor) or len(given[source]) < 2:
        raise ExportError(
            f"cache=True of an encoder-decoder takes example_inputs with {source!r} of at least 2 rows, and {MASK!r} "
            f"and {DECODER_IDS!r}, which may be left out"
            + (f"; {listing(unknown)} is none of them" if unknown else f"; {source!r} is missing or too small")
        )
    reads_tokens = source == IDS
    if reads_tokens and MASK not in given:
        given[MASK] = torch.ones_like(given[IDS])
    text = given.get(DECODER_IDS)
    if text is None:
        text = _tokens(model, len(given[source]), given[source].device)
    if text.dim() != 2 or len(text) != len(given[source]) or text.shape[1] < 4:
        raise ExportError(
            f"cache=True needs {DECODER_IDS!r} of as many rows as {source!r} and 4 tokens, half of them for the cache; "
            f"it is {tuple(text.shape)}"
        )
    half = text.shape[1] // 2
    inputs = {name: given[name].clone() for name in (source, MASK) if name in given}
    past = _filled_by(model, {**inputs, DECODER_IDS: text[:, :half]})
    layers, cross = (tuple(CacheLayer.of(layer, None) for layer in one.layers) for one in past)
    plan = CachePlan(layers, cross, source, reads_tokens, MASK in given, _start(model))
    inputs[DECODER_IDS] = text[:, half:].clone()
    inputs |= {name: tensor.clone() for name, tensor in plan.held(past[0], PAST).items()}
    inputs |= {name: tensor.clone() for name, tensor in cross_held(plan, past[1], PAST).items()}
    assert set(cross_names(plan, PAST)) <= set(inputs)
    return Seq2SeqExample(plan, inputs, axes_of(plan), text)


def _filled_by(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    kind = type(model).__name__
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise ExportError(f"cache=True: the forward of {kind} takes no past_key_values. Export it without cache=True")
    try:
        with torch.no_grad():
            past = model(**inputs, use_cache=True)["past_key_values"]
        found = past.self_attention_cache, past.cross_attention_cache
    except Exception as error:  # whatever a model raises that knows no cache
        raise ExportError(
            f"cache=True: {kind} gives no caches of its decoder and its source for the example: "
            f"{type(error).__name__}: {error}. Export it without cache=True"
        ) from error
    unknown = sorted({type(layer).__name__ for one in found for layer in one.layers} - {"DynamicLayer"})
    if unknown:
        raise ExportError(
            f"cache=True of an encoder-decoder is for caches that grow by a key and a value per token; {kind} has "
            f"layers of {', '.join(unknown)}. Export it without cache=True"
        )
    return found


def _start(model: Any) -> int | None:
    """The token that generation begins with."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    return None


def _tokens(model: Any, batch: int, device: torch.device) -> torch.Tensor:
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (batch, _TOKENS), generator=generator).to(device)
