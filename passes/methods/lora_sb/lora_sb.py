"""LoRA-SB: LoRA-XS' operator, started at the best rank-r approximation of the first full fine-tuning update
(arXiv 2411.19557, sections 3 and 4).

`dW = -eta sign(G)`, where G is the gradient of the base weight summed over a few samples (`estimate_update`). Of its
truncated SVD `U S V^T`, `B = U_r` and `A = V_r^T` are frozen and `R = diag(S_r)` trains. A and B are orthonormal and
the scale is 1, so R's own gradient is already the best approximation of the full one (Theorem 3): there is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ....rewriter.config_checks import check_dropout, check_positive_int, lower_rank
from ....rewriter.emitter import Emitter
from ....rewriter.errors import AdapterError, SpecError, listing, near_misses
from ....rewriter.method import Declaration, InitContext, Method, Tensors
from ....rewriter.sites import Site
from ..lora_xs import EXACT_UP_TO, NITER, OVERSAMPLE, declare_latent, emit_latent, truncated_svd


def pack_signs(values: Tensor) -> Tensor:
    """The signs of a tensor of any shape, four to a byte: uint8 `(ceil(numel / 4),)`."""
    codes = values.sign().flatten().to(torch.int8).add_(1).to(torch.uint8)
    quarters = torch.nn.functional.pad(codes, (0, -codes.numel() % 4)).view(4, -1)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack_signs(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_signs`: -1, 0 or 1 as int8, in `shape`."""
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return codes[: torch.Size(shape).numel()].to(torch.int8).sub_(1).view(shape)


@dataclass(frozen=True)
class UpdateEstimate:
    """The estimated first update of full fine-tuning, `-eta sign(G)` per site: the result of `estimate_update`.

    Args:
        eta: the step length.
        packed: site name -> the signs of its summed gradient, as `pack_signs` packs them, on the CPU.
        shapes: site name -> `(out, in)`.
        samples: how many examples the gradient was summed over, in all processes together.
        peak_bytes: device -> most bytes of gradients, sums and signs that were held there at once, without the
            model and its activations.
        full_bytes: what the gradients of all target weights at once would have taken.
    """

    eta: float
    packed: Mapping[str, Tensor] = field(repr=False)
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    samples: int
    peak_bytes: Mapping[str, int]
    full_bytes: int

    def signs(self, name: str) -> Tensor:
        """`sign(G)` of one site: int8 `(out, in)`."""
        return unpack_signs(self.packed[name], self.shapes[name])

    def update(self, name: str) -> Tensor:
        """`dW = -eta sign(G)` of one site: float32 `(out, in)`."""
        return self.signs(name).float().mul_(-self.eta)

    def __str__(self) -> str:
        peaks = ", ".join(f"{size / 1e6:.1f} MB on {device}" for device, size in self.peak_bytes.items())
        return (
            f"update estimate: {len(self.shapes)} sites, {self.samples} samples, eta {self.eta:.3g}; gradients, sums "
            f"and signs peaked at {peaks} (the gradients of all targets at once: {self.full_bytes / 1e6:.1f} MB)"
        )


@dataclass(frozen=True)
class LoRASB(Method, key="lora_sb"):
    """LoRA-SB (arXiv 2411.19557). Needs `rewrite(..., update=estimate_update(...))`.

    Args:
        rank: `r`, at most `min(in, out)` of every site; `r * r` parameters train per site.
        dropout: probability, on the adapter's input, in training only.
        exact_up_to: sites whose smaller dimension is at most this get an exact SVD, larger ones a randomised one.
        oversample, niter: of the randomised SVD (see `truncated_svd`).

    `oversample=0, niter=10, exact_up_to=0` and `rewrite(..., dtype=torch.bfloat16)` are what the authors' code does:
    less accurate, and not to be preferred.

    Tensors per site: `A (rank, in)` and `B (out, rank)` orthonormal and frozen, `R (rank, rank)`, trains. The delta at
    the start is the rank-r truncation of `-eta sign(G)`, so it is not zero.

    Raises:
        SpecError: a value outside its range, a rank above what a site allows, or no estimate.
        AdapterError: the estimate is for other sites.
    """

    free: ClassVar[tuple[str, ...]] = ("dropout", "exact_up_to", "oversample", "niter")

    rank: int = 32
    dropout: float = 0.0
    exact_up_to: int = EXACT_UP_TO
    oversample: int = OVERSAMPLE
    niter: int = NITER

    def __post_init__(self) -> None:
        check_positive_int(self, rank=self.rank)
        check_dropout(self, self.dropout)
        for name in ("exact_up_to", "oversample", "niter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise SpecError(f"LoRASB({name}={value!r}): allowed are whole numbers from 0 up")

    def fitted(self, out_features: int, in_features: int) -> LoRASB:
        return lower_rank(self, out_features, in_features)

    def declare(self, sites: Sequence[Site]) -> Declaration:
        return declare_latent(self, self.rank, sites)

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        estimate = self._checked(sites, context)
        for site, tensors in zip(sites, local, strict=True):
            R = tensors["R"]
            dtype = torch.float64 if R.dtype == torch.float64 else torch.float32
            direction = estimate.signs(site.name).to(R.device).to(dtype).neg_()
            U, S, Vh = truncated_svd(
                direction, self.rank, exact_up_to=self.exact_up_to, oversample=self.oversample, niter=self.niter
            )
            tensors["B"].copy_(U)
            tensors["A"].copy_(Vh)
            R.copy_(torch.diag(S * estimate.eta))

    def _checked(self, sites: Sequence[Site], context: InitContext) -> UpdateEstimate:
        """The estimate, if there is one and it is for these sites."""
        estimate = context.update
        if not isinstance(estimate, UpdateEstimate):
            given = "no update was given" if estimate is None else f"update is a {type(estimate).__name__}"
            raise SpecError(
                f"LoRASB starts from an estimate of the first full update, and {given}:\n"
                "    estimate = fg.estimate_update(model, batches, targets=targets, lr=1e-4, warmup_ratio=0.02, "
                "total_steps=steps)\n"
                f"    fg.rewrite(model, fg.Spec(fg.LoRASB(rank={self.rank}), targets=targets), update=estimate)"
            )
        if missing := [site.name for site in sites if site.name not in estimate.shapes]:
            close = near_misses(missing[0], estimate.shapes) or list(estimate.shapes)
            raise AdapterError(
                f"the update estimate has nothing for {len(missing)} of {len(sites)} site(s): {listing(missing)}; it "
                f"has {listing(close, 4)}. Give estimate_update the same targets and exclude as the Spec"
            )
        for site in sites:
            expected, found = (site.out_features, site.in_features), tuple(estimate.shapes[site.name])
            if found != expected:
                raise AdapterError(
                    f"the update estimate is {found} at {site.name!r}, the model's weight is {expected} (out, in): "
                    "it was made for another model"
                )
        return estimate

    def emit(self, e: Emitter) -> fx.Node:
        return emit_latent(e, self.dropout, 1.0)

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        return local["A"], local["B"] @ local["R"]
