"""What is refused, and what is said, where an adapter goes beside quantised layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import TargetError
from ..quantised.quantised import quantised
from ..state import Group
from ..targeting.patterns import inside


def check_quantised(
    modules: Mapping[str, nn.Module], groups: Sequence[Group], train: Sequence[str], training: bool
) -> None:
    """Raise where a layer that is to be trained through gives its input no gradient; say what a method costs that
    multiplies with the weight itself.

    Raises:
        TargetError: a quantised layer without a gradient, or one that is to be trained in full.
    """
    for path in train:
        found = [(name, kind) for name, m in modules.items() if inside(name, [path]) and (kind := quantised(m))]
        if found:
            raise TargetError(
                f"train={path!r}: {found[0][0]!r} is stored as {found[0][1].name}, and such weights cannot be trained. "
                "Adapt it as a target, or train it in fg.dequantise(model)"
            )
    dense: dict[str, int] = {}
    for group in groups:
        for site in group.sites:
            owner = modules[site.owner]
            kind = quantised(owner)
            if kind is None:
                continue
            if training and (reason := kind.no_gradient(owner)) is not None:
                raise TargetError(
                    f"{site.name!r} cannot be adapted: {reason}. To serve an adapter that is trained: fg.load_adapter"
                )
            if group.method.weighs:
                size = site.in_features * site.out_features * site.dtype.itemsize
                dense[type(group.method).__name__] = dense.get(type(group.method).__name__, 0) + size
    for method, size in dense.items():
        warnings.warn(
            f"{method} multiplies with the weights themselves: quantised ones are dequantised at every call, and in "
            f"training {size / 2**20:.1f} MiB of them are kept until the backward pass. LoRA and the other low-rank "
            "methods leave them as they are",
            stacklevel=4,
        )


def guard_quantised(modules: Mapping[str, nn.Module]) -> None:
    """Keep the quantised layers of a copy from cutting off gradients, those without an adapter too."""
    for module in modules.values():
        if (kind := quantised(module)) is not None:
            kind.guard(module)


def release_quantised(modules: Mapping[str, nn.Module]) -> None:
    """Undo `guard_quantised`."""
    for module in modules.values():
        if (kind := quantised(module)) is not None:
            kind.release(module)
