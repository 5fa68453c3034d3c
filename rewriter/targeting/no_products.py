"""Modules of torch with 2-d weights of which none is a product `x W^T`, and why an adapter cannot be put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_RECURRENT = (
    "its weights are multiplied at every time step inside one call of torch's recurrent kernel, so there is no "
    "product an adapter could stand beside"
)
_INSTEAD = "write the recurrence with nn.Linear layers, or train it in full with Spec(train=...)"

_KINDS: tuple[tuple[type[nn.Module], str, str], ...] = (
    (nn.RNNBase, _RECURRENT, _INSTEAD),
    (
        nn.RNNCellBase,
        "both of its weights are multiplied inside one call of torch's cell kernel, so there is no product an adapter "
        "could stand beside",
        _INSTEAD,
    ),
    (
        nn.Bilinear,
        "its weight is 3-d and multiplied with two inputs at once, which is no linear map of one of them",
        "train it in full with Spec(train=...)",
    ),
    (
        nn.EmbeddingBag,
        "it sums or averages rows of its weight and returns no row by itself",
        "use nn.Embedding and a sum, or train it in full with Spec(train=...)",
    ),
    (nn.LayerNorm, "it scales its input by its weight element by element", "train it in full with Spec(train=...)"),
)
_HOOKS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}  # torch's older way
WITHOUT_PRODUCTS = tuple(kind for kind, _, _ in _KINDS)


def why_none(module: nn.Module) -> str | None:
    """The reason and the way out for a module of these kinds; None for any other."""
    return next((f"{why}; {instead}" for kind, why, instead in _KINDS if isinstance(module, kind)), None)


def computed_weight(module: nn.Module) -> str | None:
    """Why a layer whose weight is computed anew at every call (weight_norm, spectral_norm) takes no adapter; None for
    any other layer."""
    if is_parametrized(module, "weight"):
        kinds = "+".join(type(one).__name__.lstrip("_") for one in module.parametrizations.weight)  # type: ignore
        undo = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    else:
        hooks = (hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ in _HOOKS)
        kinds = next((type(hook).__name__ for hook in hooks), "")
        undo = f"torch.nn.utils.{_HOOKS.get(kinds)}(layer)"
    if not kinds:
        return None
    return (
        f"its weight is computed anew from other tensors at every call ({kinds}), and an adapter could be merged into "
        f"none of them; make it a plain weight first, {undo}"
    )


def refused_weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """`(name, module)` of every such module, and of each of its weights by its own name."""
    for path, module in modules.items():
        if path and isinstance(module, WITHOUT_PRODUCTS):
            yield path, module
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1:
                    yield f"{path}.{attribute}", module
