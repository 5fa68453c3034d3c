"""Adapters that other programs wrote: what every reader of such a folder needs.

    config + tensors in their names  ->  `Foreign`: methods by site + tensors in our names  ->  adapted model

A reader uses every tensor or raises; `graft` raises for whatever does not fit the model. Nothing is skipped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...passes.methods.unilora.unilora import UniLoRA
from ...rewriter.analysis.dataflow import tied_names
from ...rewriter.errors import CheckpointError, listing, near_misses
from ...rewriter.graft_plan import Plan
from ...rewriter.method import Method
from ...rewriter.spec import Spec
from ...rewriter.state import M, base_modules, unwrap
from ...rewriter.targets import matches
from .fill import filled

_NEEDED = object()


@dataclass(frozen=True)
class Foreign:
    """An adapter of another program in our terms.

    Args:
        methods: site name -> its method.
        tensors: in the names of `adapter_state`, in whatever floating dtype they were stored.
        train: paths of the modules that come with the adapter.
    """

    methods: Mapping[str, Method]
    tensors: Mapping[str, Tensor]
    train: tuple[str, ...] = ()


def by_site(tensors: Mapping[str, Tensor], pattern: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and name, and what is left over, by its key.

    Args:
        pattern: a regular expression for whole keys with the groups `site` and `name`.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(pattern, key)
        if found:
            sites.setdefault(found["site"], {})[found["name"]] = tensor
        else:
            rest[key] = tensor
    return sites, rest


def all_there(sites: Mapping[str, Collection[str]], names: Iterable[str], what: str) -> None:
    """Raise unless every site has all of these tensors."""
    if missing := [f"{site}: {name}" for site, given in sites.items() for name in names if name not in given]:
        raise CheckpointError(f"{what} lacks {len(missing)} tensor(s): {listing(missing)}")


def none_left(rest: Collection[str], what: str) -> None:
    """Raise if there are tensors the reader has no use for."""
    if rest:
        raise CheckpointError(f"{what} has {len(rest)} tensor(s) that are not understood: {listing(rest)}")


def value(config: Mapping[str, Any], key: str, kind: type, what: str, default: Any = _NEEDED) -> Any:
    """A config entry of the right type; `float` takes whole numbers too."""
    given = config.get(key)
    if given is None and default is not _NEEDED:
        return default
    if (isinstance(given, bool) and kind is not bool) or not isinstance(given, (int, float) if kind is float else kind):
        raise CheckpointError(f"{what}: the config's {key!r} is {given!r}, expected a {kind.__name__}")
    return given


def only_keys(config: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise if the config says anything beyond the known keys; an empty value says nothing."""
    if unknown := [f"{k}={v!r}" for k, v in config.items() if k not in known and not empty(v)]:
        raise CheckpointError(f"{what}: not supported in its config: {', '.join(unknown[:8])}")


def empty(given: Any) -> bool:
    """Whether a config entry switches nothing on."""
    return given is None or given is False or given == {} or given == []


def in_model_order(names: Collection[str], model: nn.Module) -> list[str]:
    """The names in the order of the model's modules; those it does not have come last."""
    order = {name: i for i, (name, _) in enumerate(base_modules(unwrap(model)))}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def exactly(names: Iterable[str]) -> str:
    """A pattern that matches these names and no other."""
    return "re:" + "|".join(map(re.escape, names))


def _plain(name: str, known: Iterable[str]) -> str:
    """The name as a pattern, in plain form where that is as exact."""
    return name if [n for n in known if n and matches(n, name)] == [name] else exactly([name])


def spec_of(foreign: Foreign, model: nn.Module) -> Spec:
    """The spec that names each site exactly, whatever patterns the other program found them with."""
    ((common, _),) = Counter(foreign.methods.values()).most_common(1)
    others: dict[Method, list[str]] = {}
    for site, method in foreign.methods.items():
        if method != common:
            others.setdefault(method, []).append(site)
    known = [name for name, _ in base_modules(unwrap(model))]
    return Spec(
        common,
        targets=(exactly(foreign.methods),),
        train=tuple(_plain(path, known) for path in foreign.train),
        keep_ties=_ties_hold(foreign, model),
        overrides={exactly(sites): method for method, sites in others.items()},
    )


def _ties_hold(foreign: Foreign, model: nn.Module) -> bool:
    """Whether what is tied in the model is tied in the adapter: PEFT trains a copy of each module of its own, and only
    their values say whether it kept the copies alike."""
    tied = tied_names(unwrap(model)) if foreign.train else {}
    pairs = [(key, other) for key in foreign.tensors for other in tied.get(key, ())]
    return all(
        other in foreign.tensors and torch.equal(foreign.tensors[key], foreign.tensors[other]) for key, other in pairs
    )


def graft(model: M, foreign: Foreign, name: str, what: str) -> M:
    """Graft an adapter of another program; the input model is not changed.

    Raises:
        CheckpointError: the model has no such site, or the tensors are not what the methods need there.
    """
    if not foreign.methods:
        raise CheckpointError(f"{what} has no adapter tensors at all")
    order = in_model_order(foreign.methods, model)

    def fits(plan: Plan) -> None:
        if hosted := [site.name for site in plan.sites if site.host is not None]:
            raise CheckpointError(
                f"{what} has adapters at {listing(hosted)}, whose weights this model reads without calling the layers: "
                "where it was trained they had no effect"
            )
        here = {site.name for site in plan.sites}
        if missing := [site for site in order if site not in here]:
            close = near_misses(missing[0], [n for n, _ in base_modules(unwrap(model))], 2)
            raise CheckpointError(
                f"{what} was made for another model than this {type(model).__name__}, which has no linear layer "
                f"{listing(missing)}" + (f"; close are {listing(close)}" if close else "")
            )

    hint = "The adapter is of another model, or its config of another adapter"
    return filled(model, spec_of(foreign, model), name, foreign.tensors, what, order=order, fits=fits, hint=hint)


def stored_unilora(
    method: UniLoRA, theta: Tensor, indices: Mapping[str, tuple[Tensor, Tensor]], what: str
) -> tuple[UniLoRA, dict[str, Tensor]]:
    """A Uni-LoRA whose projection is given instead of derived: the method and its tensors.

    Args:
        method: its sampler is replaced by `stored`.
        theta: `(d,)`.
        indices: site -> those of A `(r, in)` and of B `(out, r)`, whole numbers below d.
    """
    if tuple(theta.shape) != (method.vector_length,):
        raise CheckpointError(
            f"{what}: 'theta' is {tuple(theta.shape)}, the model's is {(method.vector_length,)} by its config"
        )
    tensors = {"theta": theta}
    for site, pair in indices.items():
        # the operator reads B transposed
        for key, index in (("index_a", pair[0]), ("index_b", pair[1].t())):
            if index.is_floating_point() or index.dtype == torch.bool:
                raise CheckpointError(f"{what}: the indices of {site!r} are {index.dtype}, expected whole numbers")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < method.vector_length:
                raise CheckpointError(
                    f"{what}: {site!r} has indices from {int(index.min())} to {int(index.max())}, the vector has the "
                    f"entries 0 to {method.vector_length - 1}"
                )
            tensors[f"{site}.{key}"] = index.to(torch.int32)
    tensors["counts"] = used_counts([i for pair in indices.values() for i in pair], method.vector_length)
    # the seed says nothing any more, and must not make two such adapters look different
    return replace(method, sampler="stored", seed=UniLoRA.seed), tensors


def used_counts(indices: Sequence[Tensor], length: int) -> Tensor:
    """How often each entry of a vector is used, `(length,)` int32; 1 for those that are not, which have no scale."""
    counts = np.zeros(length, dtype=np.int64)
    for index in indices:
        counts += np.bincount(index.flatten().cpu().numpy(), minlength=length)
    return torch.from_numpy(np.maximum(counts, 1)).to(torch.int32)
