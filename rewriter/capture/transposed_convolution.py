"""The forward of `nn.ConvTranspose1d` to `3d` as a graph: its own asks for the input's shape to find how much to pad,
which torch.fx cannot follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

_FUNCTIONS: dict[Any, Any] = {
    nn.ConvTranspose1d.forward: F.conv_transpose1d,
    nn.ConvTranspose2d.forward: F.conv_transpose2d,
    nn.ConvTranspose3d.forward: F.conv_transpose3d,
}
_NUMBERS = ("stride", "padding", "output_padding", "groups", "dilation")


def is_transposed(module: nn.Module) -> bool:
    """Whether a module computes the forward of `nn.ConvTranspose1d` to `3d`."""
    return type(module).forward in _FUNCTIONS


def numbers_of(module: nn.Module) -> tuple[Any, ...]:
    """What its graph holds as constants."""
    return tuple(getattr(module, name) for name in _NUMBERS)


def without_size(x: Tensor, output_size: Sequence[int] | None) -> Tensor:
    """The input, if no output size is asked for."""
    if output_size is not None:
        raise ValueError(
            "an adapted transposed convolution computes the size of its module's output_padding: call it without "
            "output_size, or exclude it from the targets"
        )
    return x


def transposed_graph(module: nn.Module) -> fx.Graph:
    """`forward(input, output_size=None)`, the latter None at every call."""
    graph = fx.Graph()
    given = graph.placeholder("input")
    size = graph.placeholder("output_size", default_value=None)
    x = graph.call_function(without_size, (given, size))
    weight = graph.get_attr("weight")
    bias = None if module._parameters.get("bias") is None else graph.get_attr("bias")
    graph.output(graph.call_function(_FUNCTIONS[type(module).forward], (x, weight, bias, *numbers_of(module))))
    return graph
