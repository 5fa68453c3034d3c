"""Routers: the products whose outputs say how much of each expert a row takes. `all-linear` leaves them alone.

An adapter there changes which experts run, and is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..products.expert_weights import contracted_dim, is_experts
from ..sites import NoMatch


def routers(modules: Mapping[str, nn.Module], owners: Iterable[str]) -> set[str]:
    """The paths of the owners that hold a router: a weight `(E, in)` beside a stack of E matrices that read `in`."""
    owners = list(dict.fromkeys(owners))
    read: dict[str, set[tuple[int, int]]] = {}  # the module around the experts -> sizes of a router of theirs
    stacks = set()
    for path in owners:
        module = modules[path]
        for attribute, weight in module._parameters.items():
            if weight is None or not is_experts(module, attribute):
                continue
            stacks.add(path)
            dim = contracted_dim(module, attribute)
            assert not isinstance(dim, NoMatch)
            read.setdefault(path.rpartition(".")[0], set()).add((weight.shape[0], weight.shape[1 + dim]))
    found = set()
    for around, sizes in read.items():
        for path in owners:
            if path not in stacks and (not around or path.startswith(f"{around}.")):
                weights = modules[path]._parameters.values()
                if any(w is not None and tuple(w.shape) in sizes for w in weights):
                    found.add(path)
    return found
