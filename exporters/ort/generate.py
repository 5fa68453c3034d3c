"""Greedy generation with a graph that carries its key-value cache (`export_onnx(cache=True)`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...rewriter.errors import SessionError
from ..adapterfiles.ort_values import TYPES, Device, TensorInfo, to_ort
from ..onnx.cache.cache_layers import BATCH, PAST, PRESENT
from ..onnx.cache.cached_decoder import IDS, MASK
from .feeds import Array

# One run: (inputs, cache as OrtValues, outputs to keep on the device) -> (logits, the kept outputs).
Step = Callable[[Mapping[str, Array], Mapping[str, Any], Sequence[str]], tuple[np.ndarray, dict[str, Any]]]


def check_prompt(
    input_ids: Any, attention_mask: Any, max_new_tokens: Any, graph: Mapping[str, TensorInfo]
) -> tuple[np.ndarray, np.ndarray]:
    """The prompt's ids and mask `(batch, sequence)` int64. Raises `SessionError` where they do not fit or the graph has
    no cache."""
    if not any(name.startswith(PAST) for name in graph):
        raise SessionError("the graph has no key-value cache to generate with: export it with cache=True")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise SessionError(f"max_new_tokens={max_new_tokens!r}: give a whole number from 1 up")
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, np.int64) if attention_mask is None else np.asarray(attention_mask)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise SessionError(f"input_ids is {ids.dtype} {ids.shape}: give whole numbers (batch, sequence), one at least")
    if mask.shape != ids.shape:
        raise SessionError(f"attention_mask is {mask.shape}, input_ids {ids.shape}: they have one shape")
    if not (mask[:, -1] != 0).all():
        raise SessionError("the last token of every row is continued: pad prompts on the left (padding_side='left')")
    return ids.astype(np.int64), mask.astype(np.int64)


def greedy(
    step: Step,
    graph: Mapping[str, TensorInfo],
    device: Device,
    ids: np.ndarray,
    mask: np.ndarray,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
) -> np.ndarray:
    """The prompt and the most likely token after it, again and again; a row that has ended is filled with `pad`."""
    pairs = {name: PRESENT + name.removeprefix(PAST) for name in graph if name.startswith(PAST)}
    cache = {past: to_ort(_empty(graph[past], len(ids)), device) for past in pairs}
    done = np.zeros(len(ids), bool)
    tokens = ids
    for _ in range(max_new_tokens):
        for part, seen in _parts(tokens, mask, graph[IDS].shape[1]):
            logits, kept = step({IDS: part, MASK: seen}, cache, list(pairs.values()))
            cache = {past: kept[present] for past, present in pairs.items()}
        chosen = np.where(done, pad, logits[:, -1].argmax(-1))
        done |= np.isin(chosen, ends)
        tokens = chosen[:, None]
        ids = np.concatenate([ids, tokens], axis=1)
        mask = np.concatenate([mask, np.ones_like(tokens)], axis=1)
        if done.all():
            break
    return ids


def _empty(info: TensorInfo, batch: int) -> torch.Tensor:
    """A cache without tokens, or the state before the first."""
    shape = [batch if size == BATCH else size if isinstance(size, int) else 0 for size in info.shape]
    return torch.zeros(shape, dtype=TYPES[info.type])


def _parts(tokens: np.ndarray, mask: np.ndarray, at_once: int | str | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """New tokens, and the mask of all so far: together, or one by one where the graph takes them so."""
    length = tokens.shape[1]
    size = at_once if isinstance(at_once, int) else length
    before = mask.shape[1] - length
    for start in range(0, length, size):
        yield tokens[:, start : start + size], mask[:, : before + start + size]
