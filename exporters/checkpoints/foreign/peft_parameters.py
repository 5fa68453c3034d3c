"""PEFT's `target_parameters`: LoRA on parameters, a stack of experts' matrices among them (0.21).

    <module>.lora_A.weight (r * E, in)      A of expert e: rows e * r to (e + 1) * r
    <module>.lora_B.weight (out, r * E)     B of expert e: every E-th column, from e on

Of several parameters of one module PEFT puts a wrapper around the wrapper before: the one that is last among the
module's parameters has the module's own key, the others `.base_layer` once more each. What PEFT calls `in` and `out`
follows from how the parameter lies and the module's `is_transposed`, not from what the module computes; where that is
the other way round (Llama4), its A and B are the transposes of ours, exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....rewriter.errors import CheckpointError, listing
from ....rewriter.products.expert_weights import contracted_dim
from ....rewriter.sites import NoMatch
from .foreign_folder import Config, ForeignFolder, Sites
from .peft_targets import names_in


@dataclass(frozen=True)
class WrappedParameter:
    """A parameter that PEFT wraps.

    Args:
        site: what it is called here; `full` in PEFT's patterns.
        key: what stands before `.lora_A` in PEFT's files.
        experts: how many matrices it stacks; 0 for one matrix.
        exchanged: whether PEFT's A and B are the other way round.
    """

    site: str
    full: str
    key: str
    experts: int
    exchanged: bool

    def to_ours(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """`A (E, r, in)` and `B (E, out, r)`, or without E, from PEFT's; they must have its shapes."""
        if self.experts:
            A = A.reshape(self.experts, -1, A.shape[1])
            B = B.reshape(B.shape[0], -1, self.experts).permute(2, 0, 1)
        return (B.mT, A.mT) if self.exchanged else (A, B)

    def to_peft(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `to_ours`."""
        A, B = (B.mT, A.mT) if self.exchanged else (A, B)
        if self.experts:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        return A, B


def wrapped_parameters(config: Config, modules: Mapping[str, nn.Module], what: str) -> list[WrappedParameter]:
    """The parameters that a config's `target_parameters` name, in the order of the model's modules."""
    given = config.get("target_parameters") or []
    names = names_in(given, "target_parameters", what)
    found = [wrapped for path, module in modules.items() for wrapped in _in_module(path, module, names)]
    fulls = [f".{wrapped.full}" for wrapped in found]
    if missing := [name for name in names if not any(full.endswith(f".{name}") for full in fulls)]:
        raise CheckpointError(f"{what}: target_parameters={given!r} names {listing(missing)}, which the model has not")
    return found


def _in_module(path: str, module: nn.Module, names: list[str]) -> Iterator[WrappedParameter]:
    held = [(n, p) for n, p in module._parameters.items() if p is not None]
    fulls = [(f"{path}.{n}", n, p) for n, p in held]
    chosen = [found for found in fulls if any(found[0] == name or found[0].endswith(f".{name}") for name in names)]
    for index, (full, attribute, parameter) in enumerate(chosen):
        stacked = parameter.dim() == 3
        dim: Any = contracted_dim(module, attribute) if stacked else 1
        normal = getattr(module, "is_transposed", False) is not True or not stacked  # PEFT's delta is B A as it lies
        yield WrappedParameter(
            site=path if attribute == "weight" else full,
            full=full,
            key=path + ".base_layer" * (len(chosen) - 1 - index),
            experts=parameter.shape[0] if stacked else 0,
            exchanged=not isinstance(dim, NoMatch) and normal != (dim == 1),
        )


def take_parameters(folder: ForeignFolder, sites: Sites) -> tuple[dict[str, WrappedParameter], dict[str, Tensor]]:
    """The parameters of a folder by site, and their factors in our names; they are taken out of `sites`."""
    found: dict[str, WrappedParameter] = {}
    values: dict[str, Tensor] = {}
    for wrapped in wrapped_parameters(folder.config, folder.modules, folder.what):
        given = sites.pop(wrapped.key, {})
        if missing := [f"{wrapped.key}.{n}.weight" for n in ("lora_A", "lora_B") if n not in given]:
            raise folder.lacks(missing)
        A, B = given["lora_A"], given["lora_B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % max(wrapped.experts, 1):
            raise folder.misfit(wrapped.full, A, B, wrapped.experts)
        ours = wrapped.to_ours(A, B)
        values |= {f"{wrapped.site}.{name}": tensor.contiguous() for name, tensor in zip("AB", ours, strict=True)}
        found[wrapped.site] = wrapped
    return found, values


def stored_factors(wrapped: WrappedParameter, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The factors of a site under PEFT's keys, without its prefix."""
    with torch.no_grad():
        pair = wrapped.to_peft(A.detach(), B.detach())
    return {f"{wrapped.key}.lora_{n}.weight": t.contiguous() for n, t in zip("AB", pair, strict=True)}
