"""Uni-LoRA: one trained vector for the whole model (arXiv 2506.00799, section 3).

All A and B of all sites, flattened and concatenated, are `P theta`. `P (D x d)` has one non-zero per row,
`1 / sqrt(n_j)`, where `n_j` is how often entry j of the vector is used over the whole model, so `P^T P = I`.
Only the index of each row is kept (int32, derived from the seed); the scale depends on the index alone and is folded
into the vector. Adapters of other programs may bring indices that no seed of ours gives; these are kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ....rewriter.config_checks import check_dropout, check_positive, check_positive_int, check_rank
from ....rewriter.dialect import Common, Halves, Traits, cast, operator, product_with
from ....rewriter.emitter import Emitter
from ....rewriter.errors import SpecError
from ....rewriter.method import Decl, Declaration, InitContext, Method, Role, Tensors
from ....rewriter.sites import Site
from .gather import all_factors, gather, scale_vector

SAMPLERS = ("balanced", "uniform", "stored")


def _gathered_a(A: Tensor, B: Tensor) -> Tensor:
    return A


def _gathered_b(A: Tensor, B: Tensor) -> Tensor:
    return B.t()


def _through(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """`x A^T B`: what is left of `unilora` when the factors of all sites are gathered at once; A `(r, in)`, B
    `(r, out)`."""
    return F.linear(F.linear(x, cast(A, x)), cast(B, x).t())


unilora_factors = operator(
    "unilora_factors(Tensor x, Tensor A, Tensor B) -> Tensor",
    Traits(Halves(_gathered_a, product_with(_gathered_b), _gathered_b)),
)(_through)


def gathered_down(theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor) -> Tensor:
    """`A (r, in)`."""
    return gather(scale_vector(theta, counts), (index_a,))[0]


def gathered_across(theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor) -> Tensor:
    """`B (out, r)`, a view of the transposed gather."""
    return gather(scale_vector(theta, counts), (index_b,))[0].t()


@operator(
    "unilora(Tensor x, Tensor theta, Tensor counts, Tensor index_a, Tensor index_b) -> Tensor",
    Traits(
        Halves(gathered_down, product_with(gathered_across), gathered_across), Common(2, all_factors, unilora_factors)
    ),
)
def unilora(x: Tensor, theta: Tensor, counts: Tensor, index_a: Tensor, index_b: Tensor) -> Tensor:
    """`x A^T B^T` with A and B^T gathered from the vector.

    x `(..., in)`; theta `(d,)`; counts `(d,)` uses of each entry over the whole model, at least 1; index_a `(r, in)`
    and index_b `(r, out)` int32 -> `(..., out)` in x's dtype. B is gathered transposed: on a CPU the gradient of a
    `(out, r)` factor costs several times that of a `(r, out)` one.
    """
    return _through(x, *gather(scale_vector(theta, counts), (index_a, index_b)))


def balanced_indices(total: int, length: int, seed: int) -> np.ndarray:
    """`total` indices below `length`, each floor or ceil(total / length) times, shuffled.

    Index for index what HF PEFT 0.21 derives from `proj_seed`: each index repeated, the remainder drawn without
    replacement, then a shuffle, all from one `numpy.random.default_rng`.
    """
    rng = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if total % length:
        indices = np.concatenate([indices, rng.choice(length, size=total % length, replace=False)])
    rng.shuffle(indices)
    return indices


@dataclass(frozen=True)
class UniLoRA(Method, key="unilora"):
    """Uni-LoRA (arXiv 2506.00799).

    Args:
        rank: `r` of the virtual A and B.
        vector_length: `d`, the number of trained parameters; at most the number `D` of virtual ones,
            `sum of r * (in + out)` over the sites. One from a checkpoint may be longer: some entries are then unused.
        seed: of the projection. The indices are derived from it and never saved.
        sampler: `balanced` (every entry is used equally often, as HF PEFT and the authors' released adapters) or
            `uniform` (independent draws, as the paper's text). `stored` is what `load_adapter` gives an adapter that
            came with its indices: they and the counts are frozen tensors, saved with it, and the seed means nothing.
        init_bound: the vector starts uniform in ±init_bound.
        dropout: probability, on the adapter's input, in training only.

    Shared tensors: `theta (d,)`, trains. Derived: `counts (d,)`, per site `index_a (r, in)` and `index_b (r, out)`
    int32, consumed in model order, A `(r, in)` before B `(out, r)`, row by row. There is no alpha; the delta is
    not zero at the start.

    Raises:
        SpecError: a value outside its range, a vector longer than the virtual parameters, or `stored` without a load.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {
        "theta_d_length": "vector_length",
        "proj_seed": "seed",
        "init_theta_d_bound": "init_bound",
    }
    free: ClassVar[tuple[str, ...]] = ("dropout", "init_bound")
    by_order: ClassVar[bool] = True
    vectors: ClassVar[tuple[str, ...]] = ("theta",)

    rank: int = 4
    vector_length: int = 23_040
    seed: int = 42
    sampler: Literal["balanced", "uniform", "stored"] = "balanced"
    init_bound: float = 0.02
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank, vector_length=self.vector_length)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SpecError(f"UniLoRA(seed={self.seed!r}): allowed are whole numbers from 0 up")
        if self.sampler not in SAMPLERS:
            raise SpecError(f"UniLoRA(sampler={self.sampler!r}): allowed are {SAMPLERS}")
        check_positive(self, init_bound=self.init_bound)
        check_dropout(self, self.dropout)

    def meaning(self) -> dict[str, Any]:
        return super().meaning() | ({"seed": None} if self.sampler == "stored" else {})

    def virtual(self, sites: Sequence[Site]) -> int:
        """`D`, the number of virtual LoRA parameters."""
        return sum(self.rank * (s.in_features + s.out_features) for s in sites)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        check_rank(self, self.rank, sites)
        total = self.virtual(sites)
        # independent draws stay far below twice their mean; one byte holds the counts of any usual size
        most = -(-total // self.vector_length) * (1 if self.sampler == "balanced" else 2)
        role: Role = "frozen" if self.sampler == "stored" else "derived"
        small = most <= 255 and self.sampler != "stored"  # stored indices may be as uneven as they like
        counts = Decl((self.vector_length,), role, torch.uint8 if small else torch.int32)
        return Declaration(
            [
                {
                    "index_a": Decl((self.rank, s.in_features), role, torch.int32),
                    "index_b": Decl((self.rank, s.out_features), role, torch.int32),
                }
                for s in sites
            ],
            {"theta": Decl((self.vector_length,)), "counts": counts},
        )

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        if self.sampler == "stored":
            return  # a load fills them
        total = self.virtual(sites)
        if self.sampler == "balanced":
            indices = balanced_indices(total, self.vector_length, self.seed)
        else:
            indices = np.random.default_rng(self.seed).integers(0, self.vector_length, size=total)
        self.write_indices(shared, local, indices)

    def write_indices(self, shared: Tensors, local: Sequence[Tensors], indices: np.ndarray) -> None:
        """Hand out the indices in model order, A before B, and count them as they are really used."""
        counts = np.bincount(indices, minlength=self.vector_length)
        # an entry nobody uses has no scale: 1 keeps its gradient at zero instead of 0 * inf
        shared["counts"].copy_(torch.from_numpy(np.maximum(counts, 1)))
        flat, start = torch.from_numpy(indices), 0
        for tensors in local:
            for target in (tensors["index_a"], tensors["index_b"].t()):
                target.copy_(flat[start : start + target.numel()].view(target.shape))
                start += target.numel()

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        if self.sampler == "stored":
            raise SpecError(
                "UniLoRA(sampler='stored') takes its indices from a checkpoint (load_adapter); a new adapter draws "
                "them: choose 'balanced' or 'uniform'"
            )
        total = self.virtual(sites)
        if self.vector_length > total:
            raise SpecError(
                f"UniLoRA(vector_length={self.vector_length}): the {len(sites)} site(s) have {total} virtual LoRA "
                f"parameters at rank {self.rank}, so the vector may have at most {total} entries; "
                "shorten it, raise the rank or name more targets"
            )
        torch.nn.init.uniform_(shared["theta"], -self.init_bound, self.init_bound)

    def emit(self, e: Emitter) -> fx.Node:
        return e.add(
            e.call(
                unilora,
                e.dropped(self.dropout),
                e.shared("theta"),
                e.shared("counts"),
                e.tensor("index_a"),
                e.tensor("index_b"),
            )
        )

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        A, B = gather(scale_vector(shared["theta"], shared["counts"]), (local["index_a"], local["index_b"]))
        return A, B.t()
