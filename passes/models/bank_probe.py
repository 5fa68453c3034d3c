"""Runs of a model that look at what reaches the sites of a bank, on the inputs of a call and on others of the kind.

    y = linear(x)  ->  y = linear(x) + look(x, y)        tells the run that goes on, and adds zeros or noise

The runs are of a copy of the modules; the base's tensors are shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...rewriter.calls.call_values import current, given
from ...rewriter.create import graft_adapter
from ...rewriter.emitter import Emitter
from ...rewriter.errors import AdapterError
from ...rewriter.method import Declaration, InitContext, Method, Tensors
from ...rewriter.sites import Site
from ...rewriter.spec import Spec
from ...rewriter.switch import base_of
from .factors import sites_as_targets

PROBE = "probe"

Place = tuple[str, int]  # a site and which of its calls, or an output


class Seen(NamedTuple):
    """What reached a place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Tensor


# -- one run -----------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What is seen of every site in one run, and which rows of its output are changed."""

    stir: Mapping[Place, Tensor] = field(default_factory=dict)
    seen: dict[Place, Seen] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, x: Tensor) -> Place:
        place = name, self.calls.get(name, 0)
        self.calls[name] = place[1] + 1
        self.seen[place] = Seen(tuple(x.shape), x.dtype, _fingerprint(x))
        return place


def _fingerprint(x: Tensor) -> Tensor:
    """`(rows, 5)`: every row's length and its products with four directions, in float64."""
    x = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
    x = torch.nan_to_num(x.detach().to(torch.float64 if x.device.type != "mps" else torch.float32))
    directions = torch.randn(x.shape[-1], 4, generator=torch.Generator().manual_seed(0)).to(x)
    return torch.cat([x.norm(dim=-1, keepdim=True), x @ directions], -1).cpu()


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Which rows of two fingerprints are of rows that differ by more than rounding: a product's rows may round
    otherwise in other company."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    length = torch.maximum(one[..., 0], other[..., 0]).unsqueeze(-1)
    return ((one - other).abs() > min(eps**0.5, 4 * eps + 3e-4) * length).any(-1)


@dataclass(frozen=True)
class Probe(Method, key=""):
    """Adds nothing, or noise to some rows, and tells the run that goes on what reaches its site."""

    def declare(self, sites: Sequence[Site]) -> Declaration:
        return Declaration([{} for _ in sites])

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        return

    def emit(self, e: Emitter) -> fx.Node:
        return e.add(e.call(_look, e.x, e.y, e.tensor("site")))


def _look(x: Tensor, y: Tensor, site: Site) -> Tensor:
    run: Run = current("probe")
    stirred = run.stir.get(run.note(site.name, x))
    if stirred is None or stirred.shape != y.shape[:-1]:
        return torch.zeros_like(y)
    noise = torch.randn_like(y) * y.float().std().nan_to_num(1.0).clamp(min=1e-2).to(y.dtype)
    return noise * stirred.unsqueeze(-1).to(y)


# -- the inputs of a call ----------------------------------------------------------------------------------------
class Inputs:
    """The arguments of a call, and copies of them in which some samples are others."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, axis: int) -> None:
        found, self._tree = pytree.tree_flatten_with_path((args, dict(kwargs)))
        self._names = [pytree.keystr(path) for path, _ in found]
        self._leaves = [leaf for _, leaf in found]
        self._batch, self._axis = batch, axis
        ours = [i for i, leaf in enumerate(self._leaves) if self._of_samples(leaf)]
        self.masks = [i for i in ours if self._is_mask(i)]
        self.content = [i for i in ours if i not in self.masks and "position" not in self._names[i]]
        self.content = [i for i in self.content if self._leaves[i].dtype != torch.bool]

    def _of_samples(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > self._axis and leaf.shape[self._axis] == self._batch

    def _is_mask(self, index: int) -> bool:
        leaf = self._leaves[index]
        return "mask" in self._names[index] and (leaf.dtype == torch.bool or leaf.dim() == 2)

    def copied(self, varied: Sequence[int] = (), samples: Tensor | None = None, seed: int = 0) -> tuple[Any, Any]:
        """The arguments with other content for these samples `(batch,)` bool in the leaves `varied`."""
        generator = torch.Generator().manual_seed(seed)
        leaves = []
        for index, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                leaf = leaf.detach().clone()
                if index in varied and samples is not None:
                    shape = [1] * leaf.dim()
                    shape[self._axis] = self._batch
                    other = self._other(index, generator)
                    leaf = torch.where(samples.view(shape).to(leaf.device), other.to(leaf.device), leaf)
            elif not isinstance(leaf, (bool, int, float, str, type(None))):
                leaf = self._copy(index)
            leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self._tree)

    def _copy(self, index: int) -> Any:
        try:
            return copy.deepcopy(self._leaves[index])
        except Exception as error:
            raise AdapterError(
                f"the argument {self._names[index]} cannot be copied ({type(error).__name__}: {error}), so it cannot "
                "be tried out which rows of a layer are which sample's: give fg.bank example_inputs without it"
            ) from error

    def _other(self, index: int, generator: torch.Generator) -> Tensor:
        """Other content, valid where the given one is: for whole numbers others up to the largest there is."""
        leaf = self._leaves[index].detach().cpu()
        if index in self.masks:
            kept = leaf.shape[-1] - leaf.shape[-1] // 2
            return torch.where(torch.arange(leaf.shape[-1]) < kept, leaf, torch.zeros_like(leaf))
        if leaf.is_floating_point() or leaf.is_complex():
            wide = leaf.to(torch.complex128 if leaf.is_complex() else torch.float64)
            spread = float(torch.nan_to_num(wide.abs(), posinf=0.0).std()) if leaf.numel() > 1 else 0.0
            noise = torch.randn(leaf.shape, generator=generator, dtype=wide.dtype)
            return (wide + noise * (spread or 1.0)).to(leaf.dtype)
        count = max(int(leaf.max()), 1) + 1
        step = torch.randint(1, count, leaf.shape, generator=generator)
        return torch.where(leaf >= 0, (leaf + step) % count, leaf).to(leaf.dtype)


# -- the model ---
class Trial:
    """The model and the inputs of one call."""

    def __init__(self, root: nn.Module, sites: Sequence[Site], inputs: Inputs, batch: int) -> None:
        spec = Spec(Probe(), targets=sites_as_targets(list(sites)))
        self._twin = graft_adapter(base_of(root), spec, PROBE).eval()
        self.inputs, self.batch = inputs, batch
        devices = {p.device.index for p in self._twin.parameters() if p.device.type == "cuda"}
        self._devices = sorted(index for index in devices if index is not None)

    def run(
        self,
        varied: Sequence[int] = (),
        samples: Tensor | None = None,
        stir: Mapping[Place, Tensor] | None = None,
    ) -> Run:
        """One run: these leaves of the inputs are others for these samples, and rows of outputs at these places."""
        args, kwargs = self.inputs.copied(varied, samples, seed=len(varied))
        run = Run(stir or {})
        with torch.no_grad(), torch.random.fork_rng(self._devices), given(probe=run, inside=True):
            torch.manual_seed(0)
            output = self._twin(*args, **kwargs)
        for index, leaf in enumerate(pytree.tree_leaves(output)):
            if isinstance(leaf, Tensor) and leaf.dim() and not leaf.is_sparse:
                run.note(f"output {index}", leaf.unsqueeze(-1))
        return run

    def halves(self) -> Iterator[Tensor]:
        """Sets of samples `(batch,)` bool: for any two samples there is one with the first and without the second."""
        number = torch.arange(self.batch)
        for bit in range(max(1, math.ceil(math.log2(self.batch)))):
            for value in (1, 0):
                yield (number >> bit) & 1 == value
