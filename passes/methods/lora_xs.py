"""LoRA-XS: `y += (alpha / r) B R A dropout(x)` with only `R (r, r)` trained (arXiv 2405.17604, section 3).

`A` and `B` are frozen, from the truncated SVD of the base weight. The operator, the tensors' declaration and the
truncated SVD serve LoRA-SB too, which differs in what it decomposes and in the start of R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...rewriter.config_checks import check_dropout, check_positive, check_positive_int, check_rank, lower_rank
from ...rewriter.dialect import Halves, Traits, cast, operator
from ...rewriter.emitter import Emitter
from ...rewriter.errors import SpecError
from ...rewriter.method import Decl, Declaration, InitContext, Method, Tensors
from ...rewriter.sites import Site

R_STD = 1e-5  # section 3: small, so that training starts at the base model, and not zero


def latent_down(A: Tensor, B: Tensor, R: Tensor, scale: float) -> Tensor:
    """`A (r, in)`."""
    return A


def latent_across(A: Tensor, B: Tensor, R: Tensor, scale: float) -> Tensor:
    """`scale * B R (out, r)`."""
    return B @ (R if scale == 1 else R * scale).to(B.dtype)


def latent_up(z: Tensor, A: Tensor, B: Tensor, R: Tensor, scale: float) -> Tensor:
    """`scale * z R^T B^T`: through R first, which is the smaller product for less than `out` rows."""
    return F.linear(F.linear(z, cast(R if scale == 1 else R * scale, z)), cast(B, z))


@operator(
    "lora_xs(Tensor x, Tensor A, Tensor B, Tensor R, float scale) -> Tensor",
    Traits(Halves(latent_down, latent_up, latent_across)),
)
def lora_xs(x: Tensor, A: Tensor, B: Tensor, R: Tensor, scale: float) -> Tensor:
    """`scale * x A^T R^T B^T`: x `(..., in)`, A `(r, in)`, B `(out, r)`, R `(r, r)` -> `(..., out)` in x's dtype.

    Where A and B do not require grad, autograd keeps `x A^T` for the gradient of R and nothing as wide as x.
    """
    if scale != 1:
        R = R * scale  # the smallest place to scale
    z = F.linear(F.linear(x, cast(A, x)), cast(R, x))
    return F.linear(z, cast(B, x))


def declare_latent(config: Method, rank: int, sites: Sequence[Site]) -> Declaration:
    """`A (r, in)` and `B (out, r)` frozen, `R (r, r)` trained, at every site."""
    check_rank(config, rank, sites, strict=True)
    return Declaration(
        [
            {
                "A": Decl((rank, s.in_features), "frozen"),
                "B": Decl((s.out_features, rank), "frozen"),
                "R": Decl((rank, rank)),
            }
            for s in sites
        ]
    )


def emit_latent(e: Emitter, dropout: float, scale: float) -> fx.Node:
    """The dialect node of one site, added to the base's output."""
    return e.add(e.call(lora_xs, e.dropped(dropout), e.tensor("A"), e.tensor("B"), e.tensor("R"), scale))


# -- truncated SVD ---------------------------------------------------------------------------------------------
EXACT_UP_TO, OVERSAMPLE, NITER = 768, 32, 8


def truncated_svd(
    matrix: Tensor, rank: int, *, exact_up_to: int = EXACT_UP_TO, oversample: int = OVERSAMPLE, niter: int = NITER
) -> tuple[Tensor, Tensor, Tensor]:
    """`U (m, r)`, `S (r,)` and `Vh (r, n)` of the largest singular values of a matrix `(m, n)`, on its device.

    Exact (LAPACK or cuSOLVER) where `min(m, n) <= exact_up_to` or where the sketch would be as large as the matrix.
    Larger matrices: a randomised range finder of `rank + oversample` columns with `niter` subspace iterations, each
    orthonormalised (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). U and Vh are orthonormal
    either way. With the defaults the part of the squared norm that the truncation captures is within 1e-5 of the best
    possible one where the spectrum decays, and within 2 % for white noise, whose leading singular vectors mean nothing.

    The sketch is drawn from a generator of its own on the CPU: every process and every device draws the same one, and
    the global random state is left alone.

    Args:
        matrix: float32 or float64, finite.
    """
    m, n = matrix.shape
    if m < n:
        V, S, Uh = truncated_svd(matrix.t(), rank, exact_up_to=exact_up_to, oversample=oversample, niter=niter)
        return Uh.t(), S, V.t()
    width = rank + oversample
    if n <= exact_up_to or width >= n:
        # reduced to a square first: LAPACK's divide and conquer is several times slower on the rectangle
        Q, square = torch.linalg.qr(matrix) if m > n else (None, matrix)
        U, S, Vh = torch.linalg.svd(square, full_matrices=False)
        U = U[:, :rank] if Q is None else Q @ U[:, :rank]
        return U, S[:rank], Vh[:rank]
    sketch = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    Q = torch.linalg.qr(matrix @ sketch.to(matrix)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(matrix.t() @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]


def wide_weight(config: Method, site: Site, weight: Tensor) -> Tensor:
    """A base weight `(out, in)` in float32 (float64 stays), checked: it is about to be decomposed."""
    expected = (site.out_features, site.in_features)
    if not weight.is_floating_point() or tuple(weight.shape) != expected:
        raise SpecError(
            f"{type(config).__name__}: {site.name!r} stores {tuple(weight.shape)} values of {weight.dtype} instead of "
            f"a floating-point weight {expected}; its singular vectors are needed, so dequantise the model first"
        )
    wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(wide).all():
        raise SpecError(f"{type(config).__name__}: the base weight of {site.name!r} has NaN or infinite values")
    return wide


@dataclass(frozen=True)
class LoRAXS(Method, key="lora_xs"):
    """LoRA-XS (arXiv 2405.17604).

    Args:
        rank: `r`, at most `min(in, out)` of every site; `r * r` parameters train per site.
        alpha: the delta is scaled by `alpha / rank`.
        dropout: probability, on the adapter's input, in training only.

    Tensors per site: `A (rank, in) = S_r V_r^T` and `B (out, rank) = U_r` from the truncated SVD of the base weight,
    frozen; `R (rank, rank)` normal with standard deviation 1e-5, trains. The delta is tiny at the start, not zero.
    The decomposition runs in float32 (float64 for float64 weights) on the weight's device; see `truncated_svd`.

    Raises:
        SpecError: a value outside its range, a rank above what a site allows, or a base weight without plain
            finite values.
    """

    rank: int = 32
    alpha: float = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        check_positive(self, alpha=self.alpha)
        check_dropout(self, self.dropout)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def fitted(self, out_features: int, in_features: int) -> LoRAXS:
        return lower_rank(self, out_features, in_features)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        return declare_latent(self, self.rank, sites)

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for site, tensors, weight in zip(sites, local, context.weights, strict=True):
            U, S, Vh = truncated_svd(wide_weight(self, site, weight), self.rank)
            tensors["B"].copy_(U)
            tensors["A"].copy_(S[:, None] * Vh)
            torch.nn.init.normal_(tensors["R"], std=R_STD)

    def emit(self, e: Emitter) -> fx.Node:
        return emit_latent(e, self.dropout, self.scale)

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        return local["A"], local["B"] @ (local["R"] * self.scale)
