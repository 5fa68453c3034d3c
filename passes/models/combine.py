"""Several adapters of a model as one new LoRA: `fg.combine`, what PEFT calls `add_weighted_adapter`.

    delta = sum of w_i delta_i            cat (exact), svd (the best approximation of a rank)
    A = sum of s_i sqrt|w_i| A_i, ...     linear, and ties, dare and magnitude pruning, which thin the tensors out first

Does not handle methods that are not a low-rank product (GLoRA, HydraLoRA): they are refused with the reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...rewriter.active_adapters import check_together, chosen_weights
from ...rewriter.errors import AdapterError, MergeError, listing
from ...rewriter.grafted_class import plain_view
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.products.stacked_matrices import each
from ...rewriter.program_verbs import over_programs
from ...rewriter.sites import Site, cut_differently
from ...rewriter.state import grafted_modules, record_of, state_of
from ...rewriter.switch import set_active
from ...rewriter.tensors import adapter_modules, trained_modules
from ..methods.low_rank_factors import low_rank, widened
from .factors import as_lora
from .merge import pull

Combination = Literal[
    "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip
Majority = Literal["total", "frequency"]
Factors = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r) and a scale


@over_programs
def combine(
    model: M,
    adapters: Sequence[str] | Mapping[str, float],
    method: Combination = "cat",
    weights: Sequence[float] | Mapping[str, float] | None = None,
    *,
    name: str = "combined",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Majority = "total",
    seed: int = 0,
) -> M:
    """The model with one LoRA more, made of several of its adapters; the input is not changed.

    The new adapter is the active one. Sites that only some of the adapters have get these. Formulas and draws are those
    of PEFT's `add_weighted_adapter` for weights above 0. A negative weight counts as the negated adapter, also where
    ties elects the sign of an entry (PEFT lets it vote unnegated); one adapter alone is thinned out like several.

    Args:
        adapters: their names, or names with weights: `{"a": 0.7, "b": -0.2}`; of any method with low-rank factors.
        method: `cat` is the exact weighted sum, of the sum of the ranks (at most `min(in, out)`). `svd` is its best
            approximation of a rank. `linear` adds A and B apart: a rough approximation of the sum, with the adapters'
            own rank. `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` do so with entries left out; with `_svd`
            they work on whole deltas `(out, in)`, which takes an SVD of every weight.
        weights: of the adapters, in order or by name; by default 1.
        rank: of the result, for the `svd` methods; by default the largest of the adapters.
        density: share of the entries that is kept, above 0 and up to 1, for ties, dare and magnitude pruning.
        majority_sign: how ties elects signs: by the `total` of the entries or by the `frequency` of their signs.
        seed: of what dare leaves out.

    A module that one of the adapters trains in full comes along, with its weight as `set_active` takes it.

    Raises:
        MergeError: an adapter without low-rank factors, ranks that `linear` cannot add, values that are not finite.
        AdapterError: unknown names, weights or options, or adapters that exclude each other.
    """
    root, state = unwrap(model), state_of(model)
    chosen = chosen_weights(state, adapters, weights, "combine")
    _check_options(list(chosen), method, rank, density, majority_sign, seed)
    check_together(root, state, chosen)
    sites, given = _factors_by_site(root, chosen)
    thin = _Thinning(method.removesuffix("_svd"), density, majority_sign, torch.Generator().manual_seed(seed))
    values = {}
    with torch.no_grad():
        for site, found in given.items():
            values[site] = _combined(site, found, method, rank, thin)
    paths = dict.fromkeys(path for one in chosen for path in state.adapters[one].spec.train)
    keep_ties = any(state.adapters[one].spec.keep_ties for one in chosen)
    result = as_lora(root, name, values, sites, tuple(paths), keep_ties)
    modules, copies = grafted_modules(root), trained_modules(result, name, record_of(result, name))
    for one, weight in chosen.items():
        for path, module in trained_modules(root, one, state.adapters[one], modules).items():
            copies[path].load_state_dict(module.state_dict())
            if weight != 1:
                pull(copies[path], plain_view(modules[path]), weight)
    set_active(result, [name])
    return result.train(root.training)


def _check_options(
    names: list[str], method: str, rank: int | None, density: float | None, sign: str, seed: int
) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise AdapterError(f"combine(seed={seed!r}): give a whole number")
    if not names:
        raise AdapterError("combine(model, []): name the adapters to combine")
    if method not in get_args(Combination):
        raise AdapterError(f"combine(method={method!r}): allowed are {listing(get_args(Combination), 20)}")
    if rank is not None and not method.endswith("svd"):
        raise AdapterError(f"combine(rank={rank!r}) is for the svd methods; {method!r} has the adapters' own ranks")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"combine(rank={rank!r}): allowed are whole numbers from 1 up")
    thins = method.removesuffix("_svd") not in ("cat", "linear", "svd")
    if thins != (density is not None):
        needs = "needs density=, the share of entries it keeps" if thins else "leaves nothing out: it takes no density"
        raise AdapterError(f"combine(method={method!r}) {needs}")
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if density is not None and not (number and 0 < density <= 1):
        raise AdapterError(f"combine(density={density!r}): allowed are numbers above 0 and up to 1")
    if sign not in get_args(Majority):
        raise AdapterError(f"combine(majority_sign={sign!r}): allowed are {listing(get_args(Majority))}")


def _factors_by_site(
    root: torch.nn.Module, chosen: Mapping[str, float]
) -> tuple[list[Site], dict[str, list[tuple[float, Factors]]]]:
    """The sites of all adapters in the order they count in, and of each what the adapters that have it bring."""
    sites: dict[str, Site] = {}
    given: dict[str, list[tuple[float, Factors]]] = {}
    cuts: list[Site] = []
    for name, weight in chosen.items():
        for _, tensors in adapter_modules(root, name, low_rank(root, name)):
            site = tensors.site
            if site is None:
                continue
            unscaled = functools.partial(tensors.method.unscaled, widened(tensors.shared_tensors()))
            found = each(site, unscaled, widened(tensors.tensors()))
            if bad := [k for k, t in zip("AB", found, strict=False) if not torch.isfinite(t).all()]:  # type: ignore[arg-type]
                raise MergeError(f"adapter {name!r} at {site.name!r}: {listing(bad)} has NaN or infinite values")
            sites.setdefault(site.name, site)
            cuts.append(site)
            given.setdefault(site.name, []).append((weight, found))
    if said := cut_differently(cuts):
        raise MergeError(f"{said}; combine adapters of the same targets")
    return list(sites.values()), given


# -- one site ----------------------------------------------------------------------------------------------------
def _combined(
    site: str, found: list[tuple[float, Factors]], method: str, rank: int | None, thin: _Thinning
) -> tuple[Tensor, Tensor]:
    """`A (r, in)` and `B (out, r)` of the combination, in the dtype of the factors; stacked for experts."""
    if found[0][1][0].dim() == 3:
        experts = [[(w, (A[e], B[e], s)) for w, (A, B, s) in found] for e in range(found[0][1][0].shape[0])]
        pairs = [_combined(f"{site}@{e}", one, method, rank, thin) for e, one in enumerate(experts)]
        return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
    weights = [weight * scale for weight, (_, _, scale) in found]
    As, Bs = [A for _, (A, _, _) in found], [B for _, (_, B, _) in found]
    own = max(A.shape[0] for A in As)
    if method in ("cat", "svd"):
        A, B = torch.cat([w * A for w, A in zip(weights, As, strict=True)]), torch.cat(Bs, 1)
        most = (rank or own) if method == "svd" else min(A.shape[1], B.shape[0])
        return _shrunk(A, B, most) if method == "svd" or A.shape[0] > most else (A, B)
    if method.endswith("_svd"):
        deltas = [scale * (B @ A) for _, (A, B, scale) in found]
        U, S, Vh = torch.linalg.svd(thin([weight for weight, _ in found], deltas), full_matrices=False)
        most = rank or own
        return Vh[:most], U[:, :most] * S[:most]
    if any(A.shape[0] != own for A in As):
        raise MergeError(
            f"{site!r}: {method!r} adds A and B of the adapters, and their ranks are {[A.shape[0] for A in As]}: use "
            "'cat' (exact) or an svd method"
        )
    roots = [math.sqrt(abs(w)) for w in weights]
    # the sign goes to one of the factors: on both it would cancel
    return thin([math.copysign(r, w) for r, w in zip(roots, weights, strict=True)], As), thin(roots, Bs)


def _shrunk(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of `B A` of a rank, by the SVD of a matrix of the factors' rank."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
    rank = min(rank, S.shape[0])
    return Vh[:rank] @ Qa.t(), (Qb @ U[:, :rank]) * S[:rank]


class _Thinning:
    """Adds tensors of one shape with weights, entries left out as the method says."""

    def __init__(self, method: str, density: float | None, majority_sign: str, generator: torch.Generator) -> None:
        self.elects = method.endswith("ties")
        self.density, self.majority_sign, self.generator = density, majority_sign, generator
        self.prune: Callable[[Tensor], Tensor] = self._random if method.startswith("dare") else self._largest

    def __call__(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        kept = tensors if self.density in (None, 1) else [self.prune(t) for t in tensors]
        weighted = torch.stack([weight * tensor for weight, tensor in zip(weights, kept, strict=True)])
        if not self.elects:
            return weighted.sum(0)
        # Votes are of the entries as they are added: those of a negative weight are negated. Sizes of weights do not
        # count, as in PEFT.
        votes = torch.stack([math.copysign(1, w) * t for w, t in zip(weights, kept, strict=True)])
        signs = votes.sign()
        majority = torch.where((votes if self.majority_sign == "total" else signs).sum(0) >= 0, 1, -1)
        agree = signs == majority
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _largest(self, tensor: Tensor) -> Tensor:
        assert self.density is not None
        flat = tensor.flatten()
        count = int(self.density * flat.numel())
        if not count:
            raise MergeError(f"density={self.density} keeps none of {flat.numel()} entries")
        kept = flat.abs().topk(count).indices
        return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)

    def _random(self, tensor: Tensor) -> Tensor:
        assert self.density is not None
        odds = torch.full(tensor.shape, self.density, dtype=tensor.dtype)
        mask = torch.bernoulli(odds, generator=self.generator)  # drawn on the CPU: the same on every device
        return tensor * mask.to(tensor.device) / self.density
