"""Low-rank adapters of any method as plain factors: what every consumer that knows only `(x A) B` can take.

    fxgraft::<method>(x, ...)  ->  (x @ A) @ B        A (in, r), B (r, out), every scale folded into B

Does not handle methods that are not a low-rank product: `low_rank_factors` refuses them with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...rewriter.base_names import lookup
from ...rewriter.create import graft_adapter
from ...rewriter.forms import put_entry
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.program_verbs import over_programs
from ...rewriter.quantised.quantised import quantised
from ...rewriter.sites import Site
from ...rewriter.spec import Spec, Target
from ...rewriter.state import record_of
from ...rewriter.switch import base_of
from ...rewriter.targeting.patterns import exactly
from ...rewriter.tensors import adapter_modules, trained_modules
from ..methods.lora import LoRA
from ..methods.low_rank_factors import linear_factors, low_rank


def factors(adapted: nn.Module, name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """For each site `A (in, r)` and `B (r, out)`, contiguous, in the dtype of the base weight, scales folded into B."""
    root = unwrap(adapted)
    dtypes = {site.name: compute_dtype(root, site) for site in record_of(root, name).sites}
    return {
        site: (A.mT.to(dtypes[site]).contiguous(), B.mT.to(dtypes[site]).contiguous())
        for site, (A, B) in linear_factors(root, name).items()
    }


def compute_dtype(root: nn.Module, site: Site) -> torch.dtype:
    """The dtype of the base weight, float32 for one that is quantised."""
    owner = lookup(root, site.owner)
    if quantised(owner) is not None:
        return torch.float32
    weight = owner._parameters[site.weight]
    assert weight is not None
    return weight.dtype if weight.is_floating_point() else torch.float32


def trained(adapted: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The values of the modules the adapter trains in full, under their base state-dict keys."""
    root = unwrap(adapted)
    return {
        f"{path}.{key}": tensor.detach()
        for path, module in trained_modules(root, name, record_of(root, name)).items()
        for key, tensor in module.state_dict().items()
    }


def sites_as_targets(sites: Sequence[Site]) -> tuple[Target | str, ...]:
    """Targets that name exactly these sites, whatever patterns found them; each weight is cut in one way."""
    whole = [s.name for s in sites if s.whole]
    targets: list[Target | str] = [exactly(whole)] if whole else []
    parts: dict[str, list[Site]] = {}
    for site in sites:
        if not site.whole:
            parts.setdefault(site.stem, []).append(site)
    for stem, ours in parts.items():
        cut = ours[0].cut
        assert cut is not None
        sizes = len(cut.sizes) if len(set(cut.sizes)) == 1 else cut.sizes
        targets.append(Target(exactly([stem]), sizes, tuple(s.part for s in ours), cut.groups))
    return tuple(targets)


@over_programs
def to_lora(adapted: M, name: str = "default") -> M:
    """The same function as a plain LoRA: exact for LoRA, LoRA-XS, LoRA-SB, Uni-LoRA and PRoLoRA.

    Returns a new adapted model with the one adapter, under the same name, that is a `LoRA` with `alpha = rank`;
    modules the adapter trains come along. Factors are computed in float32.

    Raises:
        MergeError: the method is not a low-rank product; the text says why.
    """
    root = unwrap(adapted)
    record = low_rank(root, name)
    values = linear_factors(root, name)
    result = as_lora(base_of(root), name, values, record.sites, record.spec.train, record.spec.keep_ties)
    with torch.no_grad():
        copies = trained_modules(result, name, record_of(result, name))
        for path, module in trained_modules(root, name, record).items():
            copies[path].load_state_dict(module.state_dict())
    return result.train(root.training)


def as_lora(
    model: M,
    name: str,
    values: Mapping[str, tuple[Tensor, Tensor]],
    sites: Sequence[Site],
    train: Sequence[str],
    keep_ties: bool = False,
) -> M:
    """The model with a LoRA of these factors grafted in; modules in `train` are the base's still.

    Args:
        values: site name -> `A (r, in)`, `B (out, r)`, every scale in them; ranks may differ. Stacked for experts.
    """
    ranks = {site.name: values[site.name][0].shape[-2] for site in sites}
    stems = {site.name: site.stem for site in sites}
    for stem in {stems[site.name] for site in sites if not site.whole}:  # one rank for all parts of a weight
        parts = [n for n in stems if stems[n] == stem]
        ranks |= dict.fromkeys(parts, max(ranks[n] for n in parts))
    most = max(set(ranks.values()), key=list(ranks.values()).count)
    others: dict[int, list[str]] = {}
    for site, rank in ranks.items():
        if rank != most and stems[site] not in others.setdefault(rank, []):
            others[rank].append(stems[site])
    spec = Spec(
        LoRA(rank=most, alpha=most),
        targets=sites_as_targets(sites),
        train=tuple(train),
        keep_ties=keep_ties,
        overrides={exactly(stems): LoRA(rank=r, alpha=r) for r, stems in others.items()},
    )
    result = graft_adapter(model, spec, name, initialise=False)
    with torch.no_grad():
        for _, tensors in adapter_modules(result, name, record_of(result, name)):
            assert tensors.site is not None
            A, B = values[tensors.site.name]
            for slot, value in ((tensors._parameters["A"], A), (tensors._parameters["B"], B)):
                assert slot is not None
                put_entry(slot, value)
    return result
