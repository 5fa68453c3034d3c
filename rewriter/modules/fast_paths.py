"""Layers of torch.nn that, in evaluation, compute their children's weights in one fused call and skip the children.

`nn.TransformerEncoderLayer` does so with `linear1` and `linear2`, and `nn.TransformerEncoder` feeds it nested tensors
for it. An adapter on such a child would be silently skipped, so the fused path is off while one is active inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..calls.disabled import Switch
from ..grafted_class import allow_fused, forbid_fused

#: class -> the attribute that allows the fused path, and the value that forbids it
_SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def set_fast_paths(modules: Mapping[str, nn.Module], adapted: Iterable[str], switch: Switch) -> None:
    """Forbid the fused path of every layer that contains one of the `adapted` owners; allow it again elsewhere."""
    inside = {path[:end] for path in adapted for end in _prefix_ends(path)}
    for path, module in modules.items():
        for kind, (attribute, off) in _SWITCHES.items():
            if not isinstance(module, kind):
                continue
            if path in inside:
                forbid_fused(module, attribute, off, switch)
            else:
                allow_fused(module)


def _prefix_ends(path: str) -> list[int]:
    return [0, *(i for i, c in enumerate(path) if c == "."), len(path)]
