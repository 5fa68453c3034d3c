"""The sums of the gradients of target weights: hooks that add and free each, and the reduction over processes."""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....rewriter.base_names import base_modules
from ....rewriter.errors import SpecError, listing
from ....rewriter.products.stacked_matrices import all_matrices
from ....rewriter.sites import Site
from .lora_sb import pack_signs

Key = tuple[str, str]  # owner path, attribute


class Meter:
    """Bytes held per device, now and at most. Backward runs a thread per device."""

    def __init__(self) -> None:
        self.now: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, device: torch.device, size: int) -> None:
        with self._lock:
            self.now[str(device)] += size
            self.peak[str(device)] = max(self.peak[str(device)], self.now[str(device)])


class Sums:
    """Trainable aliases of some target weights in the twin, and the running sums of their gradients by site."""

    def __init__(self, twin: nn.Module, sites: dict[Key, list[Site]], where: torch.device, meter: Meter) -> None:
        self.meter = meter
        self.seen: set[str] = set()
        self.values: dict[str, Tensor] = {}
        self._undo: list[Callable[[], Any]] = []
        self.device = next(iter(twin.parameters())).device
        owners = dict(base_modules(twin))
        for (path, attribute), group in sites.items():
            owner = owners[path]
            stored: Any = owner._parameters[attribute]
            # an alias of its own: a weight tied to an embedding must not collect the embedding's gradient
            alias = nn.Parameter(stored.detach(), requires_grad=True)
            owner._parameters[attribute] = alias
            wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
            for site in all_matrices(group):
                total = torch.zeros(site.out_features, site.in_features, dtype=wide, device=where)
                meter.add(where, total.nbytes)
                self.values[site.name] = total
            handle = alias.register_post_accumulate_grad_hook(partial(self._take, group))
            self._undo += [handle.remove, partial(owner._parameters.update, {attribute: stored})]

    def _take(self, group: Sequence[Site], parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        parameter.grad = None
        self.meter.add(gradient.device, gradient.nbytes)
        parts = [part for site in group for part in _parts(site, site.linear_layout(gradient))]
        for site, part in zip(all_matrices(group), parts, strict=True):
            total = self.values[site.name]
            moved = part.to(total.device)
            extra = moved.nbytes if moved is not part else 0
            self.meter.add(total.device, extra)
            total.add_(moved)
            self.meter.add(total.device, -extra)
            self.seen.add(site.name)
        self.meter.add(gradient.device, -gradient.nbytes)

    def detach(self) -> None:
        """Put the frozen weights back."""
        for undo in self._undo:
            undo()

    def pack(self, group: Processes) -> Iterator[tuple[str, Tensor]]:
        """Reduce over the processes, and give up one sum after the other for its signs."""
        broken, zero = [], []
        for name in list(self.values):
            total = self.values.pop(name)
            held, where = total.nbytes, total.device
            total = group.sum(total)
            if not torch.isfinite(total).all():
                broken.append(name)
            elif not total.any():
                zero.append(name)
            signs = pack_signs(total).cpu()
            self.meter.add(signs.device, signs.nbytes)
            self.meter.add(where, -held)
            yield name, signs
        if broken:
            raise SpecError(
                f"the gradients of {len(broken)} target weight(s) have NaN or infinite values: {listing(broken)}. "
                "A narrow dtype overflows? Scale the loss down (only the sign counts), or estimate in float32"
            )
        if zero:
            warnings.warn(
                f"the gradients of {len(zero)} target weight(s) are all zero: {listing(zero)}. They have no estimate "
                "to start from; a narrow dtype may underflow: scale the loss up (only the sign counts)",
                stacklevel=3,
            )


def _parts(site: Site, layout: Tensor) -> Sequence[Tensor]:
    """The matrices of a site's gradient."""
    return layout.unbind(0) if site.experts else [layout]


class Processes:
    """The processes of `torch.distributed`, or this one alone."""

    def __init__(self, device: torch.device) -> None:
        self.size, self.rank, self.device = 1, 0, device
        if dist.is_available() and dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
            if "gloo" in str(dist.get_backend_config()):
                self.device = torch.device("cpu")

    def share(self, samples: int) -> int:
        """How many of the samples this process takes."""
        return samples // self.size + (self.rank < samples % self.size)

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            value = value.to(self.device)
            dist.all_reduce(value)
        return value

    def agree(self, error: Exception | None, count: int, seen: list[bool]) -> tuple[int, list[bool]]:
        """Samples of all processes and what any of them has seen; raises everywhere if one has failed."""
        flags = self.sum(torch.tensor([error is not None, count, *seen], dtype=torch.int64)).tolist()
        if error is not None:
            raise error
        if flags[0]:
            raise SpecError(f"estimate_update failed in {flags[0]} other process(es); their own errors say why")
        return flags[1], [bool(flag) for flag in flags[2:]]
