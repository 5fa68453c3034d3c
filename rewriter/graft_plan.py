"""What a graft is going to make, before it makes anything: sites and the shapes of the adapter's tensors.

Whoever holds values for an adapter compares them here, while a config's numbers have cost nothing yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .adapter_tensors import ADAPTERS
from .grafted_class import plain_view
from .method import Declaration
from .products import stacked_matrices
from .sites import Site
from .state import Group

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What `graft_adapter` will make.

    Args:
        sites: in the order they count in.
        shapes: of every tensor `adapter_state` will have, by its name there.
        derived: elements of all tensors that are derived from the config and not part of the state.
    """

    sites: tuple[Site, ...]
    shapes: Mapping[str, Shape]
    derived: int


def declare(groups: Sequence[Group]) -> list[Declaration]:
    """The tensors of each group. Raises `SpecError` where a method does not fit its sites."""
    declared = []
    for group in groups:
        declared.append(stacked_matrices.declare(group.method, group.sites))
    return declared


def plan(
    groups: Sequence[Group],
    declared: Sequence[Declaration],
    train: Sequence[str],
    parameters: Sequence[str],
    modules: Mapping[str, nn.Module],
) -> Plan:
    shapes: dict[str, Shape] = {}
    derived = 0
    for index, (group, tensors) in enumerate(zip(groups, declared, strict=True)):
        places = [("" if index == 0 else f"group{index}.", tensors.shared)]
        places += [(f"{site.name}.".lstrip("."), decls) for site, decls in zip(group.sites, tensors.local, strict=True)]
        for prefix, decls in places:
            shapes.update({prefix + name: decl.shape for name, decl in decls.items() if decl.role != "derived"})
            derived += sum(math.prod(decl.shape) for decl in decls.values() if decl.role == "derived")
    for path in train:
        module = modules[path]
        module = plain_view(module) if ADAPTERS in module._modules else module
        shapes.update({f"{path}.{n}": tuple(t.shape) for n, t in module.state_dict(keep_vars=True).items()})
    for name in parameters:
        path, _, leaf = name.rpartition(".")
        shapes[name] = tuple(modules[path]._parameters[leaf].shape)  # type: ignore[union-attr]
    return Plan(tuple(site for group in groups for site in group.sites), shapes, derived)
