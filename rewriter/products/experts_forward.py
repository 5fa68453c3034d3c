"""The forward of an experts layer whose weights are adapted: the base's own, which reads the weights through stand-ins.

    base.forward(self, x, ids, weights)  ->  base.forward(stand-in for self, x, ids, weights)

The stand-in gives what the module has, and an `expert_stack.Stack` where an adapter is. Nothing is written on the
module, so calls of several threads do not meet, and whatever implementation the config asks for at a call, the same
adapter takes part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapter_tensors import AdapterTensors
from ..calls.disabled import base_forward, is_off
from ..errors import AdapterError
from .expert_product import Beside, beside
from .expert_stack import Stack, grouped_functions
from .stacked_experts import Experts

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_ASKED = "_experts_implementation"


class StandIn:
    """A module as its forward sees it, with other values for some of its attributes."""

    def __init__(self, module: nn.Module, weights: Mapping[str, Stack]) -> None:
        self.fxgraft_module, self.fxgraft_weights = module, weights

    def __getattr__(self, name: str) -> Any:
        if name in self.fxgraft_weights:
            return self.fxgraft_weights[name]
        return getattr(self.fxgraft_module, name)


def check_implementation(module: nn.Module) -> None:
    """Raise `AdapterError` where the config asks for a kernel that no adapter can be put beside."""
    asked = getattr(getattr(module, "config", None), _ASKED, None)
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise AdapterError(
            f"experts run by {asked!r} read their weights in a kernel, which would leave their adapters out: choose "
            "another one, model.set_experts_implementation('grouped_mm'), or exclude the experts"
        )


Placed = tuple[str, int, bool, tuple[tuple[int, Beside, Any], ...]]


def described_experts(slots: Sequence[AdapterTensors], weights: Mapping[int, Any]) -> tuple[Any, ...]:
    """What decides the class of an experts layer with these adapters."""
    return tuple(
        (s.site.weight, s.site.product, s.site.rows, s.site.in_features, s.site.out_features, s.method, i in weights)
        for i, s in enumerate(slots)
        if s.site is not None
    )


def experts_namespace(
    base: type[nn.Module], slots: Sequence[AdapterTensors], weights: Mapping[int, Any]
) -> dict[str, Any]:
    """The attributes of the class: a forward with the adapters in these slots.

    Raises:
        SpecError: a method cannot be put beside the products of many experts.
    """
    by_weight: dict[str, list[tuple[int, Beside, Any]]] = {}
    contracted = {}
    for index, slot in enumerate(slots):
        site = slot.site
        assert site is not None
        shared = slot.__dict__["shared"]
        names = tuple(slot.tensors()), () if shared is None else tuple(shared.tensors())
        made = beside(slot.method, site, *names, index in weights)
        by_weight.setdefault(site.weight, []).append((index, made, slot.method))
        assert isinstance(site.product, Experts)
        contracted[site.weight] = site.product.contracted
    placed = tuple((name, contracted[name] == 1, tuple(found)) for name, found in by_weight.items())
    grouped, plain = grouped_functions(), base_forward(base)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_off(self):
            return plain(self, *args, **kwargs)
        check_implementation(self)
        stacks = {}
        for name, in_last, found in placed:
            beside_it = tuple((made, *_tensors(self, index, made), method) for index, made, method in found)
            stacks[name] = Stack(getattr(self, name), beside_it, in_last, self.training, grouped)
        return base.forward(StandIn(self, stacks), *args, **kwargs)  # type: ignore[arg-type]

    return {"forward": forward}


def _tensors(owner: Any, index: int, made: Beside) -> tuple[list[Any], list[Any]]:
    """The tensors of one slot: those of every expert, and those all have in common."""
    slot = getattr(owner, f"fxgraft_slot{index}")
    own, others = [], []
    for kind, name in made.names:
        if kind == "own":
            own.append(getattr(slot, name))
        elif kind == "shared":
            others.append(getattr(slot.shared, name))
        else:
            others.append(getattr(owner, f"fxgraft_weight{index}"))
    return own, others
