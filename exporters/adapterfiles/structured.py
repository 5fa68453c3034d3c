"""Structured adapters: a method's own tensors in a file, expanded to plain factors once, when the file is loaded.

    theta, or A_shared and B_shared, ... + the method's config and sites  ->  <site>.A (in, r), <site>.B (r, out)

Works for every method with low-rank factors, through the method's own declaration and `factors`. What follows from the
config alone (Uni-LoRA's indices) is not in the file: it is derived at load, and kept for the next adapter with the same
config and sites, which is what many tenants of one base have.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...passes.models.factors import compute_dtype, trained
from ...passes.models.opened import read_form
from ...rewriter.errors import CheckpointError, MergeError, SpecError, listing
from ...rewriter.method import Decl, Declaration, Method, Tensors, method_from_dict
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.products.linear import LINEAR
from ...rewriter.products.stacked_experts import Experts
from ...rewriter.products.stacked_matrices import declare, derive
from ...rewriter.sites import Site
from ...rewriter.state import record_of
from ...rewriter.tensors import adapter_modules, trained_modules
from .adapter_inputs import at_site

FORMAT = 1
# Projections kept for later adapters; int32 indices take as much memory as one float32 adapter.
_KEEP = 4
# Derived numbers that are never too many, and those that always are.
_FREE, _MOST = 1 << 24, 1 << 29
_EXPERTS = 1 << 16  # more than any layer has


def describe(adapted: torch.nn.Module, name: str) -> dict[str, Any]:
    """What turns the tensors of `own_tensors` into factors again, ready for JSON.

    `groups`: for each method config, the config, the prefix of its shared tensors, and its sites in order with
    `[out, in, dtype of the factors]`, and how many experts' matrices where it stacks them. `trained`: the keys that
    are the graph's inputs as they are.
    """
    root = unwrap(adapted)
    record = record_of(root, name)
    dtypes = {s.name: str(compute_dtype(root, s)).removeprefix("torch.") for s in record.sites}
    shared = {tensors.method: prefix for prefix, tensors in adapter_modules(root, name, record) if tensors.site is None}
    groups = [
        {
            "method": group.method.to_dict(),
            "shared": shared.get(group.method, ""),
            "sites": {s.name: [*_size(s), dtypes[s.name], *([s.experts] if s.experts else [])] for s in group.sites},
        }
        for group in record.groups
    ]
    return {"format": FORMAT, "groups": groups, "trained": sorted(floating(trained(root, name)))}


def floating(tensors: Tensors) -> dict[str, Tensor]:
    """Without the counters of a batch norm, which are no part of an inference graph."""
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


def own_tensors(adapted: torch.nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors as the method keeps them: the trained ones with the trained modules', and the frozen ones
    (the A and B of LoRA-XS, which all adapters of one base share)."""
    root = unwrap(adapted)
    own: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for prefix, tensors in adapter_modules(root, name, record_of(root, name)):
        derived = tensors._non_persistent_buffers_set
        own.update({prefix + key: t.detach() for key, t in tensors._parameters.items() if t is not None})
        frozen.update({prefix + k: t for k, t in tensors._buffers.items() if t is not None and k not in derived})
    return {**own, **floating(trained(root, name))}, frozen


def own_keys(adapted: torch.nn.Module, name: str) -> dict[str, str]:
    """Name of every tensor of `own_tensors` -> its state-dict key in the model."""
    root = unwrap(adapted)
    record = record_of(root, name)
    paths = {id(module): path for path, module in root.named_modules()}
    keys = {}
    for prefix, tensors in adapter_modules(root, name, record):
        stem = paths[id(tensors)]
        keys.update({prefix + key: f"{stem}.{key}" for key in tensors.tensors()})
    for path, module in trained_modules(root, name, record).items():
        keys.update({f"{path}.{key}": f"{paths[id(module)]}.{key}" for key in module.state_dict()})
    return keys


class Expander:
    """Turns structured adapters into factors and keeps the latest derived tensors. Safe to share between threads."""

    def __init__(self, keep: int = _KEEP) -> None:
        self._keep = keep
        self._kept: OrderedDict[tuple[Method, tuple[Site, ...]], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, described: Mapping[str, Any], tensors: Tensors, what: str) -> dict[str, Tensor]:
        """`<site>.A (in, r)` and `<site>.B (r, out)`, scales folded into B, and the trained tensors as they are.

        The numbers are those of `passes.models.factors.factors`, bit for bit: computed in float32 (or wider), cast once
        to the dtype of the site.

        Args:
            described: from `describe`.
            tensors: all of `own_tensors`, on the CPU.
            what: subject of the error texts.

        Raises:
            CheckpointError: written by a newer version, or tensors missing, unknown, or not of the declared shape.
        """
        if described.get("format") != FORMAT:
            raise CheckpointError(
                f"{what} has the structured format {described.get('format')!r}, this fxgraft reads {FORMAT}; update it"
            )
        left = dict(tensors)
        found: dict[str, Tensor] = {}
        try:
            for group in described["groups"]:
                found.update(self._group(group, left, what))
            for key in described["trained"]:
                found[key] = _take(left, key, what)
        except (SpecError, MergeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{what} cannot be expanded: {error}") from error
        if left:
            raise CheckpointError(f"{what} has tensors its method does not have: {listing(left)}")
        return found

    def _group(self, group: Mapping[str, Any], left: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        method = method_from_dict(group["method"])
        sites = tuple(_site(name, *shape) for name, shape in group["sites"].items())
        prepared = self._prepared(method, sites)
        shared = prepared.fill(prepared.declaration.shared, group["shared"], prepared.shared, left, what)
        found: dict[str, Tensor] = {}
        for site, decls, derived in zip(sites, prepared.declaration.local, prepared.local, strict=True):
            own = prepared.fill(decls, f"{site.name}.", derived, left, what)
            _, values = read_form(method, site, method.seen_by(site, shared), own)
            found |= at_site(site.name, {leg: t.to(site.dtype).contiguous() for leg, t in values.items()})
        return found

    def _prepared(self, method: Method, sites: tuple[Site, ...]) -> _Prepared:
        # Under the lock: of many threads with the same new projection one derives it, the others wait for it.
        with self._lock:
            prepared = self._kept.pop((method, sites), None) or _Prepared(method, sites)
            self._kept[method, sites] = prepared
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
            return prepared


class _Prepared:
    """One method on some sites: the declared tensors, and the values of those that follow from the config alone."""

    def __init__(self, method: Method, sites: tuple[Site, ...]) -> None:
        self.declaration: Declaration = declare(method, sites)
        places = (self.declaration.shared, *self.declaration.local)
        derived = sum(math.prod(d.shape) for decls in places for d in decls.values() if d.role == "derived")
        weights = sum(max(site.experts, 1) * site.in_features * site.out_features for site in sites)
        if derived > min(max(_FREE, 4 * weights), _MOST):  # sizes are only claimed, by the text of a file
            raise ValueError(f"it would derive {derived} numbers for layers of {weights} weights in all")
        self.shared, self.local = _empty(self.declaration.shared), [_empty(one) for one in self.declaration.local]
        derive(method, sites, self.shared, self.local)

    def fill(self, decls: Mapping[str, Decl], prefix: str, derived: Tensors, left: dict[str, Tensor], what: str) -> Any:
        """All tensors of one place: derived ones, and those of the file, which are taken out of `left`."""
        full = dict(derived)
        for name, decl in decls.items():
            if decl.role == "derived":
                continue
            tensor = _take(left, prefix + name, what)
            fits = tensor.dtype == decl.dtype if decl.dtype is not None else tensor.is_floating_point()
            if tuple(tensor.shape) != decl.shape or not fits:
                raise CheckpointError(
                    f"{what}: {prefix + name!r} is {tensor.dtype} {tuple(tensor.shape)}, its method has "
                    f"{decl.dtype or 'a floating type'} {decl.shape}"
                )
            full[name] = tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
        return full


def _empty(decls: Mapping[str, Decl]) -> dict[str, Tensor]:
    return {name: torch.empty(decl.shape, dtype=decl.dtype) for name, decl in decls.items() if decl.role == "derived"}


def _take(left: dict[str, Tensor], key: str, what: str) -> Tensor:
    if key not in left:
        raise CheckpointError(f"{what} lacks the tensor {key!r}; it has {listing(left)}")
    return left.pop(key)


def _size(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def _site(name: str, out_features: int, in_features: int, dtype: str, experts: int = 0) -> Site:
    """A site without a model: what a declaration reads of one is its sizes and its dtype."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"site {name!r} has the unknown dtype {dtype!r}")
    if [type(size) for size in (out_features, in_features)] != [int, int] or min(out_features, in_features) < 1:
        raise ValueError(f"site {name!r} is {out_features!r} x {in_features!r}")
    if type(experts) is not int or not 0 <= experts <= _EXPERTS:
        raise ValueError(f"site {name!r} has {experts!r} experts")
    product = Experts(experts=experts) if experts else LINEAR
    return Site(
        name, name, "weight", None, in_features, out_features, product, 0, None, kind, torch.device("cpu"), "linear"
    )  # fmt: skip
