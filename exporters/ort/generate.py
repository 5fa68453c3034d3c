"""Greedy generation with a graph that carries its key-value cache (`export_onnx(cache=True)`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...rewriter.errors import SessionError
from ..adapterfiles.ort_values import TYPES, Device, TensorInfo, to_ort
from ..onnx.cache.cache_layers import BATCH, PAST, PRESENT
from ..onnx.cache.cache_plan import EMBEDS, IDS, MASK, CachePlan
from ..onnx.cache.cached_seq2seq import CROSS, DECODER_IDS, SOURCE
from .feeds import Array, check_inputs

# One run: (inputs, cache as OrtValues, outputs to keep on the device, whether logits are asked for)
# -> (logits or None, the kept outputs).
Step = Callable[[Mapping[str, Array], Mapping[str, Any], Sequence[str], bool], tuple[Any, dict[str, Any]]]


def check_prompt(
    input_ids: Any, attention_mask: Any, max_new_tokens: Any, graph: Mapping[str, TensorInfo], before: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The prompt's ids and mask `(batch, sequence)` int64, with `before` embeddings in front of the ids. Raises
    `SessionError` where they do not fit or the graph has no cache."""
    if not any(name.startswith(PAST) for name in graph):
        raise SessionError("the graph has no key-value cache to generate with: export it with cache=True")
    _check_count(max_new_tokens)
    ids = np.asarray(input_ids)
    whole = (*ids.shape[:1], before + ids.shape[-1]) if before else ids.shape
    mask = np.ones(whole, np.int64) if attention_mask is None else np.asarray(attention_mask)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise SessionError(f"input_ids is {ids.dtype} {ids.shape}: give whole numbers (batch, sequence), one at least")
    if mask.shape != whole:
        also = f" behind {before} embeddings: it covers both" if before else ": they have one shape"
        raise SessionError(f"attention_mask is {mask.shape}, input_ids {ids.shape}{also}")
    if not (mask[:, -1] != 0).all():
        raise SessionError("the last token of every row is continued: pad prompts on the left (padding_side='left')")
    return ids.astype(np.int64), mask.astype(np.int64)


def check_embeds(embeds: Any, ids: Any, graph: Mapping[str, TensorInfo]) -> np.ndarray | None:
    """The embeddings that come before the ids, None for a graph that takes none. Raises `SessionError` where they do
    not fit."""
    if EMBEDS not in graph:
        if embeds is not None:
            raise SessionError(f"the graph takes no {EMBEDS!r}: export it with {EMBEDS!r} in the example")
        return None
    info = graph[EMBEDS]
    if embeds is None:
        return _empty(info, {BATCH: len(ids)}).numpy()
    array = check_inputs({EMBEDS: embeds}, {EMBEDS: info}, bank=False)[EMBEDS]
    if len(array) != len(ids):
        raise SessionError(f"{EMBEDS!r} has {len(array)} rows, input_ids {len(ids)}")
    return np.asarray(array)


def _check_count(max_new_tokens: Any) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise SessionError(f"max_new_tokens={max_new_tokens!r}: give a whole number from 1 up")


def check_source(
    plan: CachePlan,
    source: Any,
    attention_mask: Any,
    decoder_input_ids: Any,
    max_new_tokens: Any,
    graph: Mapping[str, TensorInfo],
) -> tuple[dict[str, Array], np.ndarray]:
    """Of an encoder-decoder: what its encoder reads, by input, and what its decoder has said. Raises `SessionError`
    where they do not fit."""
    _check_count(max_new_tokens)
    given = {plan.source: source}
    if plan.masked:
        given[MASK] = np.ones(np.shape(source)[:2], np.int64) if attention_mask is None else attention_mask
    elif attention_mask is not None:
        raise SessionError(f"the graph reads {plan.source!r} without a mask: leave attention_mask out")
    if plan.reads_tokens:
        given = {name: np.asarray(value).astype(np.int64) for name, value in given.items()}
    arrays = check_inputs(given, {name: graph[name] for name in given}, bank=False)
    batch = len(arrays[plan.source])
    if decoder_input_ids is None:
        if plan.start is None:
            raise SessionError("the model told no decoder_start_token_id at its export: give decoder_input_ids")
        decoder_input_ids = np.full((batch, 1), plan.start)
    ids = np.asarray(decoder_input_ids)
    if ids.ndim != 2 or ids.shape[0] != batch or not ids.size or ids.dtype.kind not in "iu":
        raise SessionError(
            f"decoder_input_ids is {ids.dtype} {ids.shape}: give whole numbers ({batch}, sequence), a row for each of "
            f"{plan.source!r}"
        )
    return arrays, ids.astype(np.int64)


def source_sizes(plan: CachePlan, source: Mapping[str, Array]) -> dict[str, int]:
    """What the axes of a source are long."""
    array = source[plan.source]
    return {BATCH: array.shape[0], **({SOURCE: array.shape[1]} if plan.reads_tokens else {})}


def greedy_from(
    source: dict[str, Any],
    sizes: Mapping[str, int],
    step: Step,
    graph: Mapping[str, TensorInfo],
    device: Device,
    ids: np.ndarray,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
) -> np.ndarray:
    """Of an encoder-decoder, like `greedy`: the source (OrtValues) is read once, its keys and values are fed at every
    step. `ids` are what the decoder begins with."""
    pairs = {name: PRESENT + name.removeprefix(PAST) for name in graph if name.startswith(PAST)}
    empty = {past: to_ort(_empty(graph[past], sizes), device) for past in pairs}
    cross = {past: present for past, present in pairs.items() if past.startswith(PAST + CROSS)}
    own = {past: present for past, present in pairs.items() if past not in cross}
    _, kept = step({DECODER_IDS: ids}, source | empty, list(cross.values()), False)
    read = source | {past: kept[present] for past, present in cross.items()}

    def steps(tokens: np.ndarray, cache: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        logits, kept = step({DECODER_IDS: tokens}, {**cache, **read}, list(own.values()), True)
        return logits, {past: kept[present] for past, present in own.items()}

    return _most_likely(steps, {past: empty[past] for past in own}, ids, max_new_tokens, ends, pad)


def _most_likely(
    steps: Callable[[np.ndarray, Mapping[str, Any]], tuple[np.ndarray, dict[str, Any]]],
    cache: Mapping[str, Any],
    ids: np.ndarray,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
) -> np.ndarray:
    """`ids` and what follows; `steps` gives the logits after new tokens, and the cache with them."""
    done = np.zeros(len(ids), bool)
    tokens = ids
    for _ in range(max_new_tokens):
        logits, cache = steps(tokens, cache)
        chosen = np.where(done, pad, logits[:, -1].argmax(-1))
        done |= np.isin(chosen, ends)
        tokens = chosen[:, None]
        ids = np.concatenate([ids, tokens], axis=1)
        if done.all():
            break
    return ids


def greedy(
    step: Step,
    graph: Mapping[str, TensorInfo],
    device: Device,
    ids: np.ndarray,
    mask: np.ndarray,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    embeds: np.ndarray | None = None,
) -> np.ndarray:
    """The prompt and the most likely token after it, again and again; a row that has ended is filled with `pad`."""
    pairs = {name: PRESENT + name.removeprefix(PAST) for name in graph if name.startswith(PAST)}
    seen = mask[:, :0]

    def steps(tokens: np.ndarray, cache: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        nonlocal seen
        new = np.ones_like(tokens) if seen.shape[1] else mask
        size = graph[IDS].shape[1]
        size = size if isinstance(size, int) else tokens.shape[1]  # one by one where the graph takes them so
        for start in range(0, tokens.shape[1], size):
            piece = new if embeds is not None else new[:, start : start + size]
            seen = np.concatenate([seen, piece], axis=1)
            inputs = {IDS: tokens[:, start : start + size], MASK: seen}
            if embeds is not None:  # the first time all of them, then none
                inputs[EMBEDS] = embeds if seen.shape[1] == mask.shape[1] else embeds[:, :0]
            logits, kept = step(inputs, cache, list(pairs.values()), True)
            cache = {past: kept[present] for past, present in pairs.items()}
        return logits, dict(cache)

    empty = {past: to_ort(_empty(graph[past], {BATCH: len(ids)}), device) for past in pairs}
    return _most_likely(steps, empty, ids, max_new_tokens, ends, pad)


def _empty(info: TensorInfo, sizes: Mapping[str, int]) -> torch.Tensor:
    """A cache without tokens, or the state before the first, with the axes of these sizes."""
    shape = [size if isinstance(size, int) else sizes.get(size or "", 0) for size in info.shape]
    return torch.zeros(shape, dtype=TYPES[info.type])
