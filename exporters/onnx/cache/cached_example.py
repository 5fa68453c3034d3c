"""The example that a decoder with a cache is traced and checked with: what comes, and what is in the cache already."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....backends.artifact.parity import tolerance_of
from ....backends.artifact.signature import Axes
from ....rewriter.errors import ExportError
from .cache_layers import BATCH, KINDS, PAST, PRESENT, SEQUENCE, CacheLayer
from .cache_plan import EMBEDDED, EMBEDS, IDS, MASK, POSITIONS, CachePlan
from .cached_decoder import cache_name, cached, counted
from .seq2seq_example import seq2seq_example

_ALIKE = 1e-3  # of the largest logit: sums in another order, and no other step


@dataclass(frozen=True)
class CachedExample:
    """The model over plain tensors, its example inputs, and their dynamic axes and those of its outputs."""

    module: nn.Module
    plan: CachePlan
    inputs: dict[str, torch.Tensor]
    axes: Axes

    @property
    def outputs(self) -> Axes:
        """Those that a trace does not tell."""
        return self.plan.outputs if self.plan.window else {}

    @property
    def ones(self) -> tuple[str, ...]:
        """The mask where it may hide nothing: a window, or one token, has a single token to see, itself."""
        return (MASK,) if self.plan.window or self.plan.stepwise else ()


def cached_example(model: nn.Module, example_inputs: Any) -> CachedExample:
    """A cached model, and what it is traced and checked with: the first half of the example's tokens is in the cache,
    and as many more as fill every window.

    Raises `ExportError` where the example is not token ids (and their mask) of at least 2 rows of 4 tokens, where the
    model's cache is of tensors that no graph can hold, and where generating with it gives other logits than the whole
    text at once.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _of_seq2seq(model, example_inputs)
    given = example_inputs if isinstance(example_inputs, Mapping) else dict(zip((IDS, MASK), example_inputs))  # noqa: B905
    unknown = [name for name in given if name not in (IDS, MASK, EMBEDS)]
    embeds = given.get(EMBEDS) is not None
    ids = given.get(IDS)
    if unknown or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise ExportError(
            f"cache=True takes example_inputs with {IDS!r} (batch, sequence) and {MASK!r}, which may be left out, "
            f"and {EMBEDS!r} where a part of the text comes as embeddings (image features among them); "
            f"{f'{unknown[0]!r} is neither' if unknown else f'{IDS!r} is missing or no matrix'}. Positions are counted "
            "in the graph, the cache is added by itself"
        )
    if ids.shape[0] < 2 or ids.shape[1] < 4:
        raise ExportError(
            f"cache=True needs an example of at least 2 rows of 4 tokens, half of them for the cache; {IDS!r} is "
            f"{ids.shape[0]} x {ids.shape[1]}"
        )
    half = ids.shape[1] // 2
    past = _filled_by(model, ids[:, :half])
    plan = CachePlan(tuple(CacheLayer.of(layer, _positions(model)) for layer in past.layers), embeds=embeds)
    if embeds:
        _check_embeds(model, plan, given[EMBEDS], len(ids))
    # A copy: torch.export writes the base of a view into its guards, and cannot find it again.
    new = ids[:, half : half + 1 if plan.stepwise else None].clone()
    tokens = max(half, plan.window + 1 if plan.window else 0)
    # Whatever padding the example has: a query that may see nothing, as on the left, has no defined result to compare.
    inputs = {IDS: new, MASK: ids.new_ones(len(ids), tokens + new.shape[1])}
    axes = {IDS: {0: BATCH} if plan.stepwise else {0: BATCH, 1: SEQUENCE}, MASK: {0: BATCH, 1: plan.total}}
    if embeds:
        inputs[EMBEDS], axes[EMBEDS] = given[EMBEDS].clone(), {0: BATCH, 1: EMBEDDED}
        inputs[MASK] = ids.new_ones(len(ids), tokens + given[EMBEDS].shape[1] + new.shape[1])
    axes |= plan.inputs
    for name, tensor in plan.held(past, PAST).items():
        size = {f"min(past, {layer.window - 1})": min(tokens, layer.window - 1) for layer in plan.layers}
        inputs[name] = _of_size(tensor, size.get(axes[name][2], tokens)) if 2 in axes[name] else tensor.clone()
    module = cached(model, plan)
    _hold(model, module, plan, ids, inputs)
    return CachedExample(module, plan, inputs, axes)


def _of_seq2seq(model: nn.Module, example_inputs: Any) -> CachedExample:
    half = seq2seq_example(model, example_inputs)
    module = cached(model, half.plan)
    if tolerance_of(model) <= _ALIKE:
        half.hold(model, module, _ALIKE)
    return CachedExample(module, half.plan, half.inputs, half.axes)


def _filled_by(model: nn.Module, ids: torch.Tensor) -> Any:
    """The model's own cache after these tokens, of layers that a graph can hold."""
    kind, called = type(model).__name__, cache_name(type(model))
    why = "its forward takes no cache"
    past = None
    if called is not None:
        try:
            with torch.no_grad():
                past = model(input_ids=ids, use_cache=True)[called]
            why = f"it gives a {type(past).__name__}"
        except Exception as error:  # whatever a model raises that knows no cache
            why = f"{type(error).__name__}: {error}"
    layers = getattr(past, "layers", None)
    if not layers:
        raise ExportError(
            f"cache=True: {kind} gives no key-value cache for the example ({why}). It may keep one in its modules, "
            "which a graph cannot; export it without cache=True, for the whole text at once"
        )
    unknown = sorted({type(layer).__name__ for layer in layers} - set(KINDS))
    if unknown:
        raise ExportError(
            f"cache=True holds keys, values and recurrent states; {kind} has a cache with layers of "
            f"{', '.join(unknown)}, which choose by values what they keep. Export it without cache=True"
        )
    return past


def _check_embeds(model: nn.Module, plan: CachePlan, embeds: Any, rows: int) -> None:
    """Raise `ExportError` where embeddings are no part of a text like any other."""
    kind = type(model).__name__
    if not isinstance(embeds, torch.Tensor) or embeds.dim() != 3 or len(embeds) != rows or embeds.shape[1] < 2:
        raise ExportError(
            f"cache=True needs {EMBEDS!r} (batch, embedded, width) of as many rows as {IDS!r} and at least 2 columns; "
            f"it is {tuple(getattr(embeds, 'shape', ()))}"
        )
    why = ""
    if plan.stepwise:
        why = "has a recurrence and takes one token at a time"
    elif any(hasattr(module, "get_rope_index") for module in model.modules()):
        why = "counts the positions of an image in a plane, which its embeddings do not tell"
    elif "token_type_ids" in inspect.signature(type(model).forward).parameters and hasattr(
        model.config, "vision_config"
    ):
        why = "looks both ways within an image or a prompt, which its embeddings do not tell"
    elif EMBEDS not in inspect.signature(type(model).forward).parameters:
        why = f"takes no {EMBEDS!r}"
    if why:
        raise ExportError(f"cache=True with {EMBEDS!r}: {kind} {why}. Export it for ids alone, or without cache=True")


def _positions(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _of_size(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, heads, size, width): a longer past of the same values, again and again."""
    return tensor.repeat(1, 1, -(-size // tensor.shape[2]), 1)[:, :, :size].clone()


def _hold(
    model: nn.Module, module: nn.Module, plan: CachePlan, ids: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> None:
    """Raise `ExportError` where a prompt, padded on the left in its last row, and a step with the cache give other
    logits than all of it at once without a cache."""
    if tolerance_of(model) > _ALIKE:  # half precision: steps and sums differ by more than what is looked for
        return
    mask = torch.ones_like(ids)
    mask[-1, : ids.shape[1] - 3] = 0
    more = (
        {POSITIONS: counted(mask, ids.shape[1])}
        if POSITIONS in inspect.signature(type(model).forward).parameters
        else {}
    )
    with torch.no_grad():
        want = model(**{IDS: ids, MASK: mask, "use_cache": False}, **more)["logits"][:, -1]
        cache = {name: _empty(inputs[name], axes) for name, axes in plan.inputs.items()}
        ends = range(1, ids.shape[1] + 1) if plan.stepwise else (ids.shape[1] - 1, ids.shape[1])
        start = 0
        for end in ends:
            new = {IDS: ids[:, start:end], MASK: mask[:, :end]}
            if plan.embeds:  # all but the last of the new tokens
                new[EMBEDS] = model.get_input_embeddings()(ids[:, start : end - 1])  # type: ignore[operator]
                new[IDS] = ids[:, end - 1 : end]
            output = module(**new, **cache)
            cache = {name: output[PRESENT + name.removeprefix(PAST)] for name in cache}
            start = end
    got = output["logits"][:, -1]
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    if not error <= _ALIKE:
        raise ExportError(
            f"cache=True: {type(model).__name__} gives other logits with its cache than without, by {error:.1e} of the "
            "largest, for a prompt that is padded on the left: its tokens do not come one after another from the "
            "cache alone. Export it without cache=True"
        )


def _empty(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    shape = [0 if axis == 2 and axis in axes else size for axis, size in enumerate(tensor.shape)]
    return tensor.new_zeros(shape)
