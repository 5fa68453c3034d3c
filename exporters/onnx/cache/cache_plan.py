"""What the cache of a model is: its layers, and the names and sizes that a graph has for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ....backends.artifact.signature import Axes
from .cache_layers import PAST, PRESENT, SEQUENCE, TOKENS, CacheLayer

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
#: What comes before the ids as it is, image features among it, and its size.
EMBEDS, EMBEDDED = "inputs_embeds", "embedded"


@dataclass(frozen=True)
class CachePlan:
    """What the cache of a model is, layer by layer, as a graph's manifest tells it.

    An encoder-decoder has `cross` layers of what its decoder attends to of the `source`, the encoder's input (token ids
    if `reads_tokens`, with a mask if `masked`), and begins with the token `start`. With `embeds` a decoder takes the
    embeddings of a part of its text, before its ids.
    """

    layers: tuple[CacheLayer, ...]
    cross: tuple[CacheLayer, ...] = ()
    source: str = ""
    reads_tokens: bool = False
    masked: bool = False
    start: int | None = None
    embeds: bool = False

    @classmethod
    def told(cls, cache: Any) -> CachePlan:
        """Of a manifest; older ones have the number of layers that grow."""
        if isinstance(cache, int):
            return cls(tuple(CacheLayer() for _ in range(cache)))
        layers, cross = (tuple(CacheLayer.told(one) for one in cache.get(part, ())) for part in ("layers", "cross"))
        return cls(**{**cache, "layers": layers, "cross": cross})

    def told_as(self) -> Any:
        layers = [layer.told_as() for layer in self.layers]
        if self.cross or self.embeds:
            return {**asdict(self), "layers": layers, "cross": [layer.told_as() for layer in self.cross]}
        return len(layers) if all(layer == CacheLayer() for layer in self.layers) else {"layers": layers}

    @property
    def stepwise(self) -> bool:
        """Whether tokens come one at a time: a recurrence loops over them, a graph cannot."""
        return any(layer.states for layer in self.layers)

    @property
    def window(self) -> int:
        return max((layer.window for layer in self.layers), default=0)

    @property
    def total(self) -> str:
        """The size of the mask."""
        new = "1" if self.stepwise else SEQUENCE
        return f"{TOKENS} + {EMBEDDED} + {new}" if self.embeds else f"{TOKENS} + {new}"

    @property
    def inputs(self) -> Axes:
        """The tensors of the cache before a call, by name, with their dynamic axes."""
        return self._named(PAST, TOKENS)

    @property
    def outputs(self) -> Axes:
        return self._named(PRESENT, self.total)

    def _named(self, side: str, tokens: str) -> Axes:
        axes: Axes = {}
        for i, layer in enumerate(self.layers):
            axes |= {f"{side}{name}": named for name, named in layer.axes(i, tokens).items()}
        return axes

    def filled(self, given: Mapping[str, torch.Tensor], past: int) -> Any:
        """A cache of transformers with these tensors, by their names as inputs, after `past` tokens."""
        from transformers import DynamicCache

        named = {name.removeprefix(PAST): tensor for name, tensor in given.items() if name.startswith(PAST)}
        cache = DynamicCache()
        cache.layers.extend(layer.filled(i, named, past) for i, layer in enumerate(self.layers))
        return cache

    def held(self, cache: Any, side: str) -> dict[str, torch.Tensor]:
        """The tensors of a filled cache, named as inputs or outputs."""
        found: dict[str, torch.Tensor] = {}
        for i, (layer, held) in enumerate(zip(self.layers, cache.layers, strict=True)):
            found |= {f"{side}{name}": tensor for name, tensor in layer.tensors(held, i).items()}
        return found
