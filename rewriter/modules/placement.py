"""Adapters of weights that are spread over a device mesh: their tensors lie there as the weight does.

    weight (out, in), Shard(0)    B (out, r) Shard(0), A (r, in) whole
    weight (out, in), Shard(1)    A (r, in) Shard(1), B (out, r) whole

What follows the weight's dimension is spread with it, the rest is the same on every process; gradients are summed by
`DTensor`'s own rules (PyTorch's tensor parallelism, `torch.distributed.tensor.parallel`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import FxgraftError, SpecError
from ..method import Decl, Method
from ..products import stacked_matrices
from ..products.linear import Linear
from ..sites import Site
from .shards import is_sharded


def on_mesh(modules: Mapping[str, nn.Module], site: Site) -> Any:
    """The weight of a site that is spread over a mesh; None for any other. No values are read for that: an offloaded
    weight is not loaded, a quantised one not dequantised."""
    weight = modules[site.owner]._parameters.get(site.weight)
    return weight if weight is not None and is_sharded(weight) else None


def check_placed(method: Method, sites: Sequence[Site], modules: Mapping[str, nn.Module]) -> None:
    """Raise `SpecError` for sites on a mesh whose adapter could not lie there."""
    weights = {site: weight for site in sites if (weight := on_mesh(modules, site)) is not None}
    if not weights:
        return
    for site in weights:
        what = None
        if not isinstance(site.product, Linear):
            what = f"is a {type(site.product).__name__}"
        elif site.host is not None:
            what = f"is computed by {site.host or 'the root'!r}, which reads its weight"
        elif site.cut is not None:
            what = "is a part of a fused weight, whose rows are not those of one process"
        if what is not None:
            raise SpecError(
                f"{site.name!r} {what}, and its weight is spread over a device mesh: adapters there are for whole "
                "linear layers. Exclude it, or rewrite the model before it is parallelised"
            )
    shared = method.declare(sites).shared
    meshes = {weight.device_mesh for weight in weights.values()}
    if shared and (len(weights) < len(sites) or len(meshes) > 1):
        first, off = next(iter(weights)), next((site.name for site in sites if site not in weights), "")
        raise SpecError(
            f"{type(method).__name__} has tensors that all sites share, and {first.name!r} is spread over a "
            f"device mesh and {off or 'another site'!r} is not on the same: choose targets that are on one"
        )


def place(holder: nn.Module, method: Method, site: Site, weight: Tensor, decls: Mapping[str, Decl]) -> None:
    """Spread the tensors of one site as its weight is. The first process of a mesh gives the values."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = weight.device_mesh, weight.placements  # type: ignore[attr-defined]
    roles = _roles(method, site, decls)
    contracted = site.product.contracted  # type: ignore[attr-defined]
    for name in decls:
        where: list[Any] = []
        for placement in placements:
            follows = type(placement) is Shard and ("in" if placement.dim == contracted else "out")
            where.append(Shard(roles[name].index(follows)) if follows in roles[name] else Replicate())
        _spread(holder, name, mesh, where)


def replicate(holder: nn.Module, weight: Tensor) -> None:
    """Put tensors that sites share on the mesh of a weight, whole on every process."""
    from torch.distributed.tensor import Replicate

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    for name in [*holder._parameters, *holder._buffers]:
        _spread(holder, name, mesh, [Replicate()] * mesh.ndim)


def _spread(holder: nn.Module, name: str, mesh: Any, where: Sequence[Any]) -> None:
    from torch.distributed.tensor import distribute_tensor

    if name in holder._parameters:
        parameter: Any = holder._parameters[name]
        spread = distribute_tensor(parameter.detach(), mesh, where)
        holder._parameters[name] = nn.Parameter(spread, requires_grad=parameter.requires_grad)
    else:
        held: Any = holder._buffers[name]
        holder._buffers[name] = distribute_tensor(held, mesh, where)


def _roles(method: Method, site: Site, decls: Mapping[str, Decl]) -> dict[str, list[str]]:
    """For every tensor the role of each dimension: `in`, `out`, or empty. A dimension is the site's where it changes
    when the site's does; none where the method does not say."""
    roles = {name: [""] * len(decl.shape) for name, decl in decls.items()}
    for role, field in (("in", "in_features"), ("out", "out_features")):
        size = getattr(site, field)
        try:
            larger = stacked_matrices.declare(method, [replace(site, **{field: 2 * size})]).local[0]
        except FxgraftError:  # sizes that the method cannot have: it says nothing of its dimensions
            continue
        for name, decl in decls.items():
            for dim, (now, then) in enumerate(zip(decl.shape, larger[name].shape, strict=True)):
                if now == size and then == 2 * size:
                    roles[name][dim] = role
    return roles
