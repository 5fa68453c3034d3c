"""The estimate LoRA-SB starts from: gradients of the target weights, summed over a few samples, down to their signs
(arXiv 2411.19557, section 3)."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....rewriter.base_names import lookup
from ....rewriter.capture.outline import outline_linears
from ....rewriter.errors import SpecError, TargetError, listing
from ....rewriter.modules.wrappers import unwrap
from ....rewriter.products.stacked_matrices import all_matrices
from ....rewriter.quantised.quantised import quantised
from ....rewriter.sites import Site
from ....rewriter.spec import Spec, Target
from ....rewriter.switch import base_of
from ....rewriter.targets import resolve
from .estimate_batches import Forward, Loss, backward, limited
from .gradient_sums import Key, Meter, Processes, Sums
from .lora_sb import LoRASB, UpdateEstimate


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
    group = Processes(next(iter(sites.values()))[0].device)
    wanted = group.share(samples)
    used: Iterable[tuple[Any, int]] = limited(batches, wanted)
    meter, taken = Meter(), 0
    packed: dict[str, Tensor] = {}
    parts = _split(sites, rounds)
    with _bar(progress and group.rank == 0, wanted * len(parts)) as advance:
        for part in parts:
            sums = Sums(twin, part, torch.device(accumulate_on), meter)
            error: Exception | None = None
            count = 0
            try:
                if len(parts) > 1 and not isinstance(used, list):
                    used = list(used)
                for batch, examples in used:
                    backward(twin, batch, examples, sums.device, loss, forward)
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
    shapes = {
        site.name: (site.out_features, site.in_features) for found in sites.values() for site in all_matrices(found)
    }
    full = sum(_base_weight(twin, *key).nbytes for key in sites)
    return UpdateEstimate(eta, packed, shapes, taken, dict(meter.peak), full)


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
        if (kind := quantised(lookup(twin, key[0]))) is not None:
            raise TargetError(
                f"{group[0].name!r}: its weight is stored as {kind.name}, which has no gradient; estimate on "
                "fg.dequantise(model), whose sites have the same names"
            )
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
    sizes = {key: sum(s.in_features * s.out_features for s in all_matrices(group)) for key, group in sites.items()}
    total, before = sum(sizes.values()), 0
    parts: dict[int, dict[Key, list[Site]]] = defaultdict(dict)
    for key, group in sites.items():
        parts[before * rounds // total][key] = group
        before += sizes[key]
    return list(parts.values())


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
