"""Adapted model -> plain model with the adapters folded into the weights.

    W, b, adapters  ->  W', b'          float32 (float64 for float64 weights), one cast at the end

Does not handle methods whose delta depends on the input (HydraLoRA): they are refused. A weight that was tied to
another parameter gets a tensor of its own, so the other one (an embedding) keeps the base's values.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.active_adapters import check_together, chosen_weights
from ...rewriter.adapter_tensors import AdapterTensors
from ...rewriter.analysis.dataflow import tied_names
from ...rewriter.base_names import base_modules, lookup
from ...rewriter.capture.outline import AdaptableGraphModule, inline_linears
from ...rewriter.capture.skeleton import copy_skeleton
from ...rewriter.errors import AdapterError, MergeError, listing
from ...rewriter.grafted_class import plain_view
from ...rewriter.modules.bias_slot import bias_slot
from ...rewriter.modules.offloaded import put_values as keep_values
from ...rewriter.modules.offloaded import values_of
from ...rewriter.modules.wrappers import M, strip_wrappers, unwrap
from ...rewriter.products.stacked_matrices import fold
from ...rewriter.program_verbs import over_programs
from ...rewriter.quantised.quantised import quantised
from ...rewriter.state import ModelState, Tie, grafted_modules, record_of, state_of
from ...rewriter.switch import active_weights, base_of
from ...rewriter.tensors import adapter_modules, trained_modules
from .dequantise import check_floating, dequantised
from .requantise import requantise as put_back

_TIES = "tie_word_embeddings"


@over_programs
@torch.inference_mode(False)
def merge(
    adapted: M,
    names: Sequence[str] | Mapping[str, float] | None = None,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
    requantise: bool = False,
) -> M:
    """A new plain model of the original module types with the adapters folded in; `adapted` stays as it is.

    Weights without an adapter share the base's memory. Parameters require grad as they did before the first rewrite.
    A merged `nn.TransformerEncoder` takes PyTorch's fused path in eval mode again where the base does: that gives zeros
    at padded positions, where the adapted model, like the base in training, has values that mean nothing.
    A layer without a bias gets one where an adapter adds one (GLoRA's C and E).

    Args:
        names: the adapters to fold, in this order, or adapters with their weights; by default the active ones with the
            weights they have (`set_active`).
        weights: of the deltas, in the order of `names`, or by name. A trained module with a weight goes between the
            base's and its own, which is exact for linears and embeddings and refused for others.
        dtype: of the merged layers of a quantised base, which become plain `nn.Linear`; quantised layers without an
            adapter stay. Choose what the rest of the model computes in.
        requantise: quantise the merged layers of such a base again, as they were; a warning says what that loses.

    Raises:
        MergeError: a quantised base, and neither `dtype` nor `requantise` is given; a method that cannot be merged,
            values that are not finite, adapters or weights that do not go together, or nothing to merge.
    """
    root, state = unwrap(adapted), state_of(adapted)
    if names is None:
        names = weights if isinstance(weights, Mapping) else active_weights(root) if weights is None else state.active
        weights = None if isinstance(names, Mapping) else weights
    if len(set(names)) != len(names):
        raise MergeError(f"merge(names={list(names)}): each adapter at most once")
    chosen = chosen_weights(state, names, weights, "merge")
    if not chosen:
        raise MergeError(f"no adapter is active; name the ones to merge: {listing(state.adapters)}")
    try:
        check_together(root, state, chosen)
    except AdapterError as error:
        raise MergeError(str(error)) from error
    modules = grafted_modules(root)
    if paths := _quantised_owners(state, chosen, modules, dtype, requantise):
        return _merged_quantised(root, chosen, paths, dtype)
    replaced = _fold(root, chosen, modules)
    trained = {
        path: (module, weight)
        for name, weight in chosen.items()
        for path, module in trained_modules(root, name, state.adapters[name], modules).items()
    }

    ties = tied_names(root)
    plain = strip_wrappers(base_of(root))
    owners = dict(base_modules(plain))
    for (path, attribute), tensor in replaced.items():
        full = f"{path}.{attribute}".lstrip(".")
        owners[path].register_parameter(attribute, nn.Parameter(tensor, requires_grad=full in state.trained))
        keep_values(owners[path], {attribute: tensor})
    for path, (copied, weight) in copy.deepcopy(trained).items():  # together: what is tied among them stays tied
        if weight != 1:
            pull(copied, plain_view(modules[path]), weight)
        for n, parameter in copied.named_parameters():
            parameter.requires_grad_(f"{path}.{n}" in state.trained)
        put_values(owners[path], copied)
    for name in chosen:
        follow(plain, state.adapters[name].ties)
    now = tied_names(plain)
    _untie(plain, [name for name, tied in ties.items() if now.get(name) != tied])
    plain = plain.train(root.training) if root.training != plain.training else plain
    return inline_linears(plain) if isinstance(plain, AdaptableGraphModule) else plain  # type: ignore[return-value]


def _quantised_owners(
    state: ModelState,
    chosen: Mapping[str, float],
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | None,
    again: bool,
) -> list[str]:
    """The paths of the quantised layers that are merged into, once it is clear what they shall become."""
    check_floating(dtype)
    owners = dict.fromkeys(site.owner for name in chosen for site in state.adapters[name].sites)
    kinds = {path: kind for path in owners if (kind := quantised(modules[path])) is not None}
    if not kinds:
        if dtype is not None or again:
            raise MergeError(
                "merge(dtype=..., requantise=...) is for a quantised base, and none of the merged layers is quantised: "
                "leave it out, and use .to(dtype) on the result"
            )
        return []
    if (dtype is None) == (not again):
        first = next(iter(kinds))
        raise MergeError(
            f"{first!r} is stored as {kinds[first].name}, which cannot hold a merged weight without loss: "
            + ("choose one of the two. " if again else "say what it shall become. ")
            + "merge(dtype=torch.float32) makes the merged layers plain ones of that dtype, "
            "merge(requantise=True) quantises them again and reports the loss"
        )
    return list(kinds)


def _merged_quantised(root: M, chosen: Mapping[str, float], paths: Sequence[str], dtype: torch.dtype | None) -> M:
    """Merge into quantised layers: in float32, then cast to `dtype`, or quantised again where that is None."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    within = set(paths)
    work = dequantised(copy_skeleton(root), wide, lambda path: path in within, marks=dtype is not None)
    plain = merge(work, chosen)
    modules = dict(base_modules(plain))
    if dtype is None:
        put_back(modules, dict(base_modules(base_of(root))), list(paths))
        return plain
    for path in paths:
        for name, parameter in modules[path]._parameters.items():
            if parameter is None:
                continue
            cast = parameter.detach().to(dtype)
            if not torch.isfinite(cast).all():
                raise MergeError(f"{path!r}: the merged {name} overflows {dtype}; merge in a wider dtype")
            modules[path]._parameters[name] = nn.Parameter(cast, requires_grad=False)
    return plain


@torch.no_grad()
def pull(module: nn.Module, base: nn.Module, weight: float) -> None:
    """Let a copy of a trained module be `weight` of the way from the base's to it, in place."""
    start = dict(base.named_parameters())
    for name, parameter in module.named_parameters():
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        origin = start[name].to(wide)
        parameter.copy_(origin + weight * (parameter.to(wide) - origin))


def put_values(module: nn.Module, trained: nn.Module) -> None:
    """Give a module of the base the parameters and buffers of its trained copy. The module stays: others, such as
    methods bound to it, may hold it."""
    for path, source in base_modules(trained):
        target = lookup(module, path)
        target._parameters.update(source._parameters)
        target._buffers.update(source._buffers)
        keep_values(target, source._parameters)


def follow(plain: nn.Module, ties: Sequence[Tie]) -> None:
    """Let parameters that are tied to trained ones be these again."""
    for tie in ties:
        holder, _, leaf = f"{tie.trained}.{tie.name}".rpartition(".")
        lookup(plain, tie.path)._parameters[tie.attribute] = lookup(plain, holder)._parameters[leaf]


def fold_weights(root: nn.Module, name: str, only: Callable[[AdapterTensors], bool]) -> dict[tuple[str, str], Tensor]:
    """`(owner path, attribute) -> merged tensor` of one adapter's sites for which `only` is true."""
    return _fold(root, {name: 1.0}, grafted_modules(root), only)


def _fold(
    root: nn.Module,
    weights: Mapping[str, float],
    modules: dict[str, nn.Module],
    only: Callable[[AdapterTensors], bool] = lambda tensors: True,
) -> dict[tuple[str, str], Tensor]:
    """`(owner path, attribute) -> merged tensor`, stored layout and dtype of the base."""
    by_weight: dict[tuple[str, str], list[tuple[str, float, AdapterTensors]]] = {}
    for name, factor in weights.items():
        for _, tensors in adapter_modules(root, name, record_of(root, name), modules):
            if tensors.site is not None and only(tensors):
                by_weight.setdefault((tensors.site.owner, tensors.site.weight), []).append((name, factor, tensors))
    replaced: dict[tuple[str, str], Tensor] = {}
    swallowed = True
    for (path, attribute), adapters in by_weight.items():
        owner = modules[path]
        stored: Any = values_of(owner, attribute)
        swallowed &= not _fold_weight(owner, stored, path, attribute, adapters, replaced)
    if by_weight and swallowed:
        warnings.warn(
            f"merging {listing(weights)} changed no weight: the deltas are zero, or too small for the weights' dtype",
            stacklevel=3,
        )
    return replaced


@torch.no_grad()
def _fold_weight(
    owner: nn.Module,
    stored: Tensor,
    path: str,
    attribute: str,
    adapters: list[tuple[str, float, AdapterTensors]],
    replaced: dict[tuple[str, str], Tensor],
) -> bool:
    """Fold all adapters of one weight; returns whether anything changed."""
    if not stored.is_floating_point() or stored.is_meta or type(stored.data) is not Tensor:
        raise MergeError(
            f"{path!r}: its weight is {type(stored.data).__name__} of {stored.dtype} on {stored.device}; merging needs "
            "plain floating-point values. Dequantise or materialise the model first"
        )
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    weight = stored.detach().to(wide, copy=True)
    first = adapters[0][2].site
    assert first is not None
    bias_name: str | None = first.bias
    base_bias = None if first.bias is None else values_of(owner, first.bias)
    bias = None if base_bias is None else base_bias.detach().to(wide)
    bias_changed = False
    base_weight, base_values = weight.clone() if len(adapters) > 1 or adapters[0][1] != 1 else weight, bias
    if bias is not None:
        bias = bias.clone()
    for index, (name, factor, tensors) in enumerate(adapters):
        site = tensors.site
        assert site is not None
        shared = {k: _wide(t, wide) for k, t in tensors.shared_tensors().items()}
        local = {k: _wide(t, wide) for k, t in tensors.tensors().items()}
        # every adapter's delta is of the base, as in the forward pass, not of what was merged before it
        base_part = site.linear_layout(base_weight)
        base_bias_part = None if base_values is None else site.take(base_values, -1)
        merged, new_bias = fold(tensors.method, site, base_part, base_bias_part, shared, local)
        if not torch.isfinite(merged).all() or (new_bias is not None and not torch.isfinite(new_bias).all()):
            where = "the base weight" if not torch.isfinite(base_part).all() else f"adapter {name!r}"
            raise MergeError(f"{site.name!r}: {where} has NaN or infinite values; nothing was merged")
        part = merged
        if index > 0 or factor != 1:
            part = site.linear_layout(weight) + factor * (merged - base_part)
        site.put(weight, part)
        if new_bias is not None and new_bias is not base_bias_part:
            if bias is None:
                bias_name = bias_slot(owner, first)
                if bias_name is None:
                    raise MergeError(
                        f"{site.name!r}: adapter {name!r} adds a bias, and {type(owner).__name__} has no empty bias "
                        "that its forward adds to this product"
                    )
                bias = weight.new_zeros(site.produced(weight))
            added = factor * (new_bias if base_bias_part is None else new_bias - base_bias_part)
            site.put_bias(bias, site.take(bias, -1) + added)
            bias_changed = True
    for key, value, base in ((attribute, weight, stored), (bias_name, bias if bias_changed else None, base_bias)):
        if value is None or key is None:
            continue
        cast = value.to(stored.dtype if base is None else base.dtype)
        if not torch.isfinite(cast).all():
            raise MergeError(f"{path!r}: the merged {key} overflows {cast.dtype}; merge in a wider dtype")
        replaced[path, key] = cast.contiguous()
    return bias_changed or not torch.equal(replaced[path, attribute], stored)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor


def _untie(plain: nn.Module, untied: Sequence[str]) -> None:
    """Tell a transformers model that its embedding and its head are no longer one tensor, or its next
    `save_pretrained` / `tie_weights` would overwrite the merged values."""
    if not untied:
        return
    configs = [m.config for _, m in base_modules(plain) if getattr(getattr(m, "config", None), _TIES, False)]
    if not configs:
        return
    for _, module in base_modules(plain):
        if _reads_ties(type(module)):
            raise MergeError(
                f"{listing(untied, 2)} are one tensor in the base model and not after merging, and the forward of "
                f"{type(module).__name__} reads config.{_TIES}: untied it would compute something else. Adapt another "
                "layer, or train the module in full with its ties kept (Spec(train=...))"
            )
    for config in configs:
        setattr(config, _TIES, False)


def _reads_ties(cls: type[nn.Module]) -> bool:
    try:
        return _TIES in inspect.getsource(cls.forward)
    except (OSError, TypeError):  # no source to read: a class made at run time
        return False
