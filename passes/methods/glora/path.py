"""The 432 paths of a GLoRA site: what each support tensor may be, and what that costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....rewriter.errors import SpecError

_WEIGHT, _BIAS = ("lora", "vector", "constant", "none"), ("vector", "constant", "none")
#: what each support tensor may be, the largest first
CHOICES = {"A": _WEIGHT, "B": _WEIGHT, "C": ("lora", "vector", "none"), "D": _BIAS, "E": _BIAS}
#: the columns of a choice mask: one per tensor and choice but "none"
COLUMNS = tuple((tensor, choice) for tensor, choices in CHOICES.items() for choice in choices if choice != "none")


@dataclass(frozen=True)
class GLoRAPath:
    """What each of the five support tensors is at one site.

    Args:
        A, B: `lora`, `vector` (one number per output row), `constant` or `none`.
        C: `lora`, `vector` or `none`.
        D, E: `vector`, `constant` or `none`.

    Raises:
        SpecError: any other value.
    """

    A: str
    B: str
    C: str
    D: str
    E: str

    def __post_init__(self) -> None:
        for tensor, allowed in CHOICES.items():
            if getattr(self, tensor) not in allowed:
                raise SpecError(f"GLoRAPath({tensor}={getattr(self, tensor)!r}): allowed are {allowed}")

    @property
    def index(self) -> int:
        """The path's place in `PATHS`."""
        return _INDEX[self]

    def shapes(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
        """The tensors the path needs at a site. D needs none where the base has no bias to scale."""
        low_rank = {"A": (out_features, in_features), "B": (out_features, in_features), "C": (in_features, 1)}
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor, (rows, columns) in low_rank.items():
            choice = getattr(self, tensor)
            if choice == "lora":
                shapes[f"{tensor}d"], shapes[f"{tensor}u"] = (rows, rank), (rank, columns)
            elif choice != "none":
                shapes[f"{tensor}d"] = (rows if choice == "vector" else 1, 1)
        for tensor in "DE":
            choice = getattr(self, tensor)
            if choice != "none" and (bias or tensor == "E"):
                shapes[tensor] = (out_features if choice == "vector" else 1,)
        return shapes

    def parameters(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> int:
        """How many parameters train at a site on this path."""
        return sum(torch.Size(s).numel() for s in self.shapes(in_features, out_features, rank, bias).values())

    def take(self, tensors: Mapping[str, Tensor], rank: int, bias: bool = True) -> dict[str, Tensor]:
        """The entries of a supernet site's tensors that the path uses, as views."""
        shapes = self.shapes(tensors["Au"].shape[1], tensors["Ad"].shape[0], rank, bias)
        return {name: tensors[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


#: all 432 paths; the first is the maximal one
PATHS = tuple(GLoRAPath(*choices) for choices in itertools.product(*CHOICES.values()))
_INDEX = {path: index for index, path in enumerate(PATHS)}


def path_from_dict(data: Mapping[str, Any]) -> GLoRAPath:
    """The inverse of `dataclasses.asdict` on a path; `SpecError` on other keys."""
    if set(data) != set(CHOICES):
        raise SpecError(f"a GLoRA path has the keys {list(CHOICES)}, given was {dict(data)!r}")
    return GLoRAPath(**data)


def draw_mask(table: Tensor, path: Tensor, training: bool) -> Tensor:
    """The choice mask `(12,)` of this forward: a uniform draw in training (fresh at every call, from torch's generator
    of the device), the row of the set path otherwise. table `(432, 12)`, path `(1,)` int64."""
    if training:
        path = torch.randint(0, len(PATHS), (1,), device=path.device)
    return table.to(path.device).index_select(0, path).squeeze(0)
