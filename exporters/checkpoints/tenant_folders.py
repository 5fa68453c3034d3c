"""`fg.bank` and `fg.add_tenant`: tenants may be saved folders too, of any format that `load_adapter` opens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.models import bank as banks
from ...rewriter.spec import Spec
from ...rewriter.state import M
from ...rewriter.switch import base_of
from .load_adapter import load_adapter

Tenant = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]


def bank(
    model: M,
    tenants: Mapping[str, Tenant] | None = None,
    *,
    spec: Spec | None = None,
    capacity: int | None = None,
    rank: int | None = None,
    expand: bool = False,
    dtype: torch.dtype | None = None,
    example_inputs: Any = None,
    batch_axis: int = 0,
) -> M:
    opened = None if tenants is None else {name: _opened(model, tenant) for name, tenant in tenants.items()}
    return banks.bank(
        model,
        opened,
        spec=spec,
        capacity=capacity,
        rank=rank,
        expand=expand,
        dtype=dtype,
        example_inputs=example_inputs,
        batch_axis=batch_axis,
    )


def add_tenant(banked: nn.Module, name: str, tenant: Tenant) -> None:
    banks.add_tenant(banked, name, _opened(banked, tenant))


def _opened(model: nn.Module, tenant: Tenant) -> Mapping[str, Tensor] | nn.Module:
    if isinstance(tenant, (str, os.PathLike)):
        return load_adapter(base_of(model), tenant, "tenant")
    return tenant


_FOLDER = "name -> a saved folder, an adapted model"
bank.__doc__ = (banks.bank.__doc__ or "").replace("name -> an adapted model", _FOLDER)
add_tenant.__doc__ = (banks.add_tenant.__doc__ or "").replace("Put an adapter", "Put an adapter, or a saved one,")
