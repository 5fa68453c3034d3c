"""The estimate LoRA-SB starts from: gradients of the target weights, summed over a few samples, down to their signs
(arXiv 2411.19557, section 3)."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ....rewriter.capture.outline import outline_linears
from ....rewriter.errors import SpecError, TargetError, listing
from ....rewriter.sites import Site
from ....rewriter.spec import Spec, Target
from ....rewriter.state import base_modules, lookup, unwrap
from ....rewriter.switch import base_of
from ....rewriter.targets import resolve
from .lora_sb import LoRASB, UpdateEstimate, pack_signs

Loss = Callable[[Any, Any], Tensor]
Forward = Callable[[Any, Any], Any]


def estimate_update(
    model: nn.Module | torch.export.ExportedProgram,
    batches: Iterable[Any],
    *,
    targets: str | Target | Sequence[str | Target] = ("all-linear",),
    exclude: str | Sequence[str] = (),
    loss: Loss | None = None,
    forward: Forward | None = None,
    samples: int = 50,
    lr: float,
    warmup_ratio: float = 0.02,
    total_steps: int | None = None,
    epochs: int = 1,
    rounds: int = 1,
    accumulate_on: str | torch.device = "cpu",
    training: bool = False,
    progress: bool = True,
) -> UpdateEstimate:
    """Estimate the first update of full fine-tuning, `-eta sign(G)`, without updating anything.

    G is the sum of the target weights' gradients. Each weight's gradient is added to its sum, in float32 (float64 for
    float64 weights), and freed as soon as backward has made it: the model's device holds one weight's gradient at a
    time, never all of them. Of the sums only the signs are kept, a quarter of a byte per weight. The work is done on
    a copy of the modules over the same tensors: weights, `.grad`, requires_grad flags and modes of `model` are not
    touched, whatever happens. Adapters the model has are left out: the estimate is for its base.

    Where `torch.distributed` is initialised, every process must call this with its own batches: together they take
    `samples` examples, and the sums are all-reduced before the sign, so that all get the same estimate.

    Args:
        model: as for `rewrite`.
        batches: dicts (called as `model(**batch)`), tuples or lists (`model(*batch)`) or tensors (`model(batch)`);
            they are moved to the model's device.
        targets, exclude: as in the Spec the estimate is for.
        loss: `loss(output, batch) -> scalar`, a mean over the batch; by default the model's own `output.loss`. The
            loss is multiplied by the number of examples, so examples count alike in batches of different size. A mean
            over tokens weighs long examples more: give batches of one example for the sum over examples of the paper.
        forward: `forward(model, batch) -> output`, where the model is to be called in another way.
        samples: how many examples to use. A batch with more than are left is cut along the first dimension of its
            tensors, if it holds nothing but tensors, numbers and None; otherwise it is used whole. The result says how
            many were used; too few in `batches` is a warning.
        lr, warmup_ratio, total_steps: of the training run to come, `eta = lr / (warmup_ratio * total_steps)`.
            `total_steps` is by default `len(batches) * epochs`, as in the authors' code, which gives the training
            loader here: right if you do, wrong for a handful of batches.
        epochs: for that default.
        rounds: run over the samples this many times, each time for another part of the weights: the sums take that
            much less memory. The batches used are kept in between.
        accumulate_on: device of the sums.
        training: run the model in training mode (dropout on, gradient checkpointing where the model has it on).
        progress: a progress bar, if standard error is a terminal.

    Raises:
        SpecError: a value outside its range; no examples; no loss; a loss or a gradient that is not finite.
        TargetError: a target matches nothing, cannot be differentiated, or got no gradient.
    """
    _check_numbers(lr=lr, warmup_ratio=warmup_ratio)
    _check_counts(samples=samples, epochs=epochs, rounds=rounds)
    if isinstance(batches, (str, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise SpecError(f"estimate_update(batches={type(batches).__name__}): give an iterable of batches; one: [batch]")
    eta = lr / (warmup_ratio * _total_steps(batches, total_steps, epochs))
    if eta > lr * (1 + 1e-6):
        warnings.warn(
            f"eta = lr / (warmup_ratio * total_steps) = {eta:.3g} is above lr = {lr:.3g}: the warm-up is shorter than "
            "one step. Is total_steps the number of optimiser steps of the training to come?",
            stacklevel=2,
        )
    twin, sites = _prepare(model, Spec(LoRASB(rank=1), targets=targets, exclude=exclude))  # type: ignore[arg-type]
    with contextlib.suppress(NotImplementedError):  # an exported program has its mode built in
        twin.train(training)
    group = _Processes(next(iter(sites.values()))[0].device)
    wanted = group.share(samples)
    used: Iterable[tuple[Any, int]] = _limited(batches, wanted)
    meter, taken = _Meter(), 0
    packed: dict[str, Tensor] = {}
    parts = _split(sites, rounds)
    with _bar(progress and group.rank == 0, wanted * len(parts)) as advance:
        for part in parts:
            sums = _Sums(twin, part, torch.device(accumulate_on), meter)
            error: Exception | None = None
            count = 0
            try:
                if len(parts) > 1 and not isinstance(used, list):
                    used = list(used)
                for batch, examples in used:
                    _backward(twin, batch, examples, sums.device, loss, forward)
                    count += examples
                    advance(examples)
            except Exception as raised:  # the other processes wait in the reduction: tell them first
                error = raised
            finally:
                sums.detach()
            taken, seen = group.agree(error, count, [name in sums.seen for name in sums.values])
            if taken == 0:
                raise SpecError("estimate_update: batches is empty; an iterator may have been used up before")
            if unseen := [name for name, hit in zip(sums.values, seen, strict=True) if not hit]:
                raise TargetError(
                    f"{len(unseen)} target weight(s) got no gradient: {listing(unseen)}. The loss does not depend on "
                    "them, or a reentrant gradient checkpoint cuts it off; exclude them or change the loss"
                )
            packed.update(sums.pack(group))
    if taken < samples:
        warnings.warn(f"estimate_update: {samples} samples were asked for, batches had {taken}", stacklevel=2)
    shapes = {site.name: (site.out_features, site.in_features) for s in sites.values() for site in s}
    full = sum(_base_weight(twin, *key).nbytes for key in sites)
    return UpdateEstimate(eta, packed, shapes, taken, dict(meter.peak), full)


# -- arguments -------------------------------------------------------------------------------------------------
def _check_numbers(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise SpecError(f"estimate_update({name}={value!r}): allowed are finite numbers above 0")


def _check_counts(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"estimate_update({name}={value!r}): allowed are whole numbers from 1 up")


def _total_steps(batches: Iterable[Any], total_steps: int | None, epochs: int) -> int:
    if total_steps is not None:
        _check_counts(total_steps=total_steps)
        return total_steps
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise SpecError("estimate_update: batches has no length: give total_steps=... of the training") from None
    if length == 0:
        raise SpecError("estimate_update: batches is empty")
    return length * epochs


# -- the model -------------------------------------------------------------------------------------------------
Key = tuple[str, str]  # owner path, attribute


def _prepare(model: Any, spec: Spec) -> tuple[nn.Module, dict[Key, list[Site]]]:
    """A plain twin over the same tensors with nothing to train, and its target weights with their sites."""
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module(check_guards=False)
    if not isinstance(model, nn.Module):
        raise SpecError(f"estimate_update({type(model).__name__}, ...): give what rewrite takes, such as an nn.Module")
    source = unwrap(model)
    if isinstance(source, torch.fx.GraphModule):
        source = outline_linears(source)
    twin = base_of(source)
    sites: dict[Key, list[Site]] = {}
    for site, _ in resolve(twin, spec).sites:
        sites.setdefault((site.owner, site.weight), []).append(site)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    for key, group in sites.items():
        weight = _base_weight(twin, *key)
        if not weight.is_floating_point() or weight.is_meta or type(weight.data) is not Tensor:
            raise TargetError(
                f"{group[0].name!r}: its weight is {type(weight.data).__name__} of {weight.dtype} on {weight.device}, "
                "which has no gradient; estimate on the dequantised, materialised model"
            )
    return twin, sites


def _base_weight(twin: nn.Module, owner: str, attribute: str) -> Tensor:
    weight = lookup(twin, owner)._parameters[attribute]
    assert weight is not None
    return weight


def _split(sites: dict[Key, list[Site]], rounds: int) -> list[dict[Key, list[Site]]]:
    """Consecutive parts with about the same number of weights; none is empty."""
    sizes = {key: sum(s.in_features * s.out_features for s in group) for key, group in sites.items()}
    total, before = sum(sizes.values()), 0
    parts: dict[int, dict[Key, list[Site]]] = defaultdict(dict)
    for key, group in sites.items():
        parts[before * rounds // total][key] = group
        before += sizes[key]
    return list(parts.values())


# -- sums ------------------------------------------------------------------------------------------------------
class _Meter:
    """Bytes held per device, now and at most. Backward runs a thread per device."""

    def __init__(self) -> None:
        self.now: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, device: torch.device, size: int) -> None:
        with self._lock:
            self.now[str(device)] += size
            self.peak[str(device)] = max(self.peak[str(device)], self.now[str(device)])


class _Sums:
    """Trainable aliases of some target weights in the twin, and the running sums of their gradients by site."""

    def __init__(self, twin: nn.Module, sites: dict[Key, list[Site]], where: torch.device, meter: _Meter) -> None:
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
            for site in group:
                total = torch.zeros(site.out_features, site.in_features, dtype=wide, device=where)
                meter.add(where, total.nbytes)
                self.values[site.name] = total
            handle = alias.register_post_accumulate_grad_hook(partial(self._take, group))
            self._undo += [handle.remove, partial(owner._parameters.update, {attribute: stored})]

    def _take(self, group: Sequence[Site], parameter: Tensor) -> None:
        gradient: Any = parameter.grad
        parameter.grad = None
        self.meter.add(gradient.device, gradient.nbytes)
        for site in group:
            total = self.values[site.name]
            part = site.linear_layout(gradient)
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

    def pack(self, group: _Processes) -> Iterator[tuple[str, Tensor]]:
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


# -- batches ---------------------------------------------------------------------------------------------------
def _limited(batches: Iterable[Any], samples: int) -> Iterator[tuple[Any, int]]:
    """`(batch, its number of examples)` up to so many examples, the last batch cut where it can be."""
    left = samples
    for batch in batches if left else ():
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        leaves = pytree.tree_leaves(batch)
        size = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), 0)
        if size == 0:
            raise SpecError(
                f"estimate_update: a batch is a {type(batch).__name__} without a tensor of examples; give dicts, "
                "tuples, lists or tensors"
            )
        if size > left and all(isinstance(leaf, (Tensor, int, float, bool, type(None))) for leaf in leaves):
            batch = _cut(batch, size, left)
            size = left
        yield batch, size
        left -= size
        if left <= 0:
            return


def _cut(batch: Any, size: int, keep: int) -> Any:
    """The first `keep` examples of a batch of `size`; tensors of another length do not count examples."""

    def cut(leaf: Any) -> Any:
        return leaf[:keep] if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else leaf

    return pytree.tree_map(cut, batch)


def _backward(
    twin: nn.Module, batch: Any, examples: int, device: torch.device, loss: Loss | None, forward: Forward | None
) -> None:
    """Add one batch's gradients to the sums: backward runs their hooks."""
    batch = pytree.tree_map(lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t, batch)
    with torch.enable_grad():
        if forward is not None:
            output = forward(twin, batch)
        elif isinstance(batch, dict):
            output = twin(**batch)
        else:
            output = twin(*batch) if isinstance(batch, (tuple, list)) else twin(batch)
        value: Any = getattr(output, "loss", None) if loss is None else loss(output, batch)
        if loss is None and value is None:
            raise SpecError(
                f"estimate_update: the model's output ({type(output).__name__}) has no loss; put labels into the "
                "batches, or give loss=lambda output, batch: ..."
            )
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise SpecError(f"estimate_update: the loss is {shape}, not one number")
        if not torch.isfinite(value):
            raise SpecError(f"estimate_update: the loss is {value.item()}; no gradient can be taken from it")
        if value.requires_grad:  # otherwise no target took part, which the caller reports by name
            (value.reshape(()) * examples).backward()


# -- processes -------------------------------------------------------------------------------------------------
class _Processes:
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


@contextlib.contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error that goes away when done, if that is a terminal."""
    if not wanted:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("estimating the update", total=total)
        yield lambda done: progress.advance(task, done)
