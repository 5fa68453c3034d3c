"""A cache of transformers as plain tensors: which layers it has, what they are called, and how they are filled.

Layer i of attention holds  past_key_<i>, past_value_<i>  (batch, heads, past, width)        grows with every token
with a window of w          the same, of size min(past, w - 1)                               ends before the window does
of a recurrence             past_conv_<i>, past_state_<i>  (batch, ...)                      one size for ever
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ....backends.artifact.signature import Axes
from .keep_last import keep_last

PAST, PRESENT = "past_", "present_"
KEY, VALUE, CONV, STATE = "key_{}", "value_{}", "conv_{}", "state_{}"
#: Sizes: `past` tokens are in the cache, `sequence` new ones come, and the mask covers both.
BATCH, SEQUENCE, TOKENS = "batch", "sequence", "past"
#: The layers of a cache that plain tensors can hold, by their classes in transformers.
GROWING = ("DynamicLayer", "LinearAttentionAndFullAttentionLayer")
WINDOWS = ("DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
RECURRENT = ("LinearAttentionLayer", *GROWING[1:], *WINDOWS[1:])
KINDS = (*GROWING, *WINDOWS, "LinearAttentionLayer", "DummyLayer")


@dataclass(frozen=True)
class CacheLayer:
    """A layer: its class in transformers, its window, and which of its recurrent states there are."""

    kind: str = "DynamicLayer"
    window: int = 0
    states: int = 0
    conv: tuple[int, ...] = ()
    recurrent: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Any, positions: int | None) -> CacheLayer:
        """What a layer that a model has filled is. A window that is wider than the model's `positions` never ends
        within them: it grows like any other."""
        kind, window, states = type(layer).__name__, 0, 0
        if kind in WINDOWS:
            window = int(layer.sliding_window)
            if positions is not None and window > positions:
                kind, window = GROWING[WINDOWS.index(kind)], 0
        conv: tuple[int, ...] = ()
        recurrent: tuple[int, ...] = ()
        if kind in RECURRENT:
            states = int(layer.number_of_states)
            conv = tuple(i for i in range(states) if layer.conv_states[i] is not None)
            recurrent = tuple(i for i in range(states) if layer.recurrent_states[i] is not None)
        return cls(kind, window, states, conv, recurrent)

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> CacheLayer:
        return cls(**{**told, "conv": tuple(told["conv"]), "recurrent": tuple(told["recurrent"])})

    def told_as(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def attends(self) -> bool:
        return self.kind in GROWING or self.kind in WINDOWS

    def tensors(self, layer: Any, index: int) -> dict[str, Tensor]:
        """What a filled layer holds, by name; names are without `past_` and `present_`."""
        found = {KEY.format(index): layer.keys, VALUE.format(index): layer.values} if self.attends else {}
        for name, held, which in ((CONV, "conv_states", self.conv), (STATE, "recurrent_states", self.recurrent)):
            for state in which:
                called = name.format(index) if self.states == 1 else f"{name.format(index)}_{state}"
                found[called] = getattr(layer, held)[state]
        return found

    def axes(self, index: int, past: str) -> Axes:
        """The dynamic axes of these tensors, `past` being the tokens before; of those behind with the new ones too."""
        axes: Axes = {name: {0: BATCH} for name in self.tensors(_Names(), index)}
        if self.attends:
            size = f"min({past}, {self.window - 1})" if self.window else past
            for name in (KEY, VALUE):
                axes[name.format(index)][2] = size
        return axes

    def filled(self, index: int, given: Mapping[str, Tensor], past: int) -> Any:
        """A layer of transformers with these tensors after `past` tokens. While a graph is traced its window counts and
        cuts with tensors' sizes, which a graph can have any of; otherwise it is transformers' own in all."""
        from transformers import cache_utils

        made = getattr(cache_utils, self.kind)
        if self.window and torch.compiler.is_exporting():
            made = _traced(made)
        layer = made(sliding_window=self.window, number_of_states=self.states)
        if self.attends:
            # Not through update(), which joins them to an empty tensor of another shape.
            layer.keys, layer.values = given[KEY.format(index)], given[VALUE.format(index)]
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            if self.window:
                layer.cumulative_length, layer.kept = past, layer.keys.shape[2]
        if self.states:
            _fill_states(self, layer, index, given)
        return layer


class _Names:
    """A layer without values, for the names of its tensors."""

    keys = values = None

    def __getattr__(self, name: str) -> Any:
        return _Names()

    def __getitem__(self, state: int) -> None:
        return None


def _fill_states(told: CacheLayer, layer: Any, index: int, given: Mapping[str, Tensor]) -> None:
    one = told.states == 1
    for state in range(told.states):
        suffix = "" if one else f"_{state}"
        if state in told.conv:
            # A copy: the layer writes into it, and a graph's input is not written.
            layer.conv_states[state] = conv = given[CONV.format(index) + suffix].clone()
            layer.conv_kernel_size[state], layer.is_conv_states_initialized[state] = conv.shape[-1], True
            layer.device, layer.dtype = conv.device, conv.dtype
        if state in told.recurrent:
            layer.recurrent_states[state] = given[STATE.format(index) + suffix].clone()
            layer.is_recurrent_states_initialized[state] = True
        layer.has_previous_state[state] = True


@functools.cache
def _traced(own: type) -> type:
    """A layer with a window that holds for every length: `own` counts tokens in Python, where a trace holds one count.

    Of `kept` keys and values and `new` ones all are attended to (the mask knows the window), the last w - 1 stay.
    """

    def update(self: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        self.keys, self.values = keep_last(keys, self.sliding_window - 1), keep_last(values, self.sliding_window - 1)
        return keys, values

    def get_mask_sizes(self: Any, query_length: int) -> tuple[int, int]:
        return self.kept + query_length, self.cumulative_length - self.kept

    return type(own.__name__, (own,), {"update": update, "get_mask_sizes": get_mask_sizes})
