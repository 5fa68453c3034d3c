"""Convolutions of one to three dimensions, transposed ones too: the weight as a matrix `(out, in / groups * k...)`.

    halves   conv(conv(x, down as a kernel), up 1 x 1)      down has the base's kernel, stride, padding and dilation
    weight   conv(x, W')                                     of an operator that says what weight it amounts to
    rows     op(patches of x)                                anything else; a row is what one kernel position sees

With groups every group has its own rows, `(..., groups, in)`, and takes of the delta what it produces itself: one
factor A serves all groups. A pad in another mode than zeros stands in front of the product and is none of its business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .patches import patches_of, upsampled
from .product import Call, NoMatch, Product, ProductNode, Use, bind, vector

_FORWARD: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
for _n in (1, 2, 3):
    _packet = getattr(torch.ops.aten, f"conv{_n}d")
    _FORWARD |= {_packet.default: _n, _packet.padding: _n}
    _packet = getattr(torch.ops.aten, f"conv_transpose{_n}d")
    _TRANSPOSED |= {getattr(_packet, name): _n for name in _packet.overloads()}
_GENERAL = torch.ops.aten.convolution.default
_DIMS = _FORWARD | _TRANSPOSED
# what follows input, weight and bias, and what it is where it is not given
_FORWARD_NAMES: tuple[tuple[str, Any], ...] = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
_TRANSPOSED_NAMES = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
_GENERAL_NAMES = (*_FORWARD_NAMES[:3], ("transposed", False), ("output_padding", 0), ("groups", 1))
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_BACK = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Convolution(Product):
    """`y = conv(x, W)`: x `(..., channels, *spatial)`, W `(out, in / groups, *kernel)`, transposed `(in, out / groups,
    *kernel)`.

    Args:
        kernel, stride, dilation: one number per dimension; padding: the same, or `same` or `valid`.
        output_padding: of a transposed one; empty for others.
    """

    takes_weights: ClassVar[bool] = True

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    @property
    def channel(self) -> int:
        return -len(self.kernel) - 1

    @property
    def undivided(self) -> str:
        return "its groups would be cut through" if self.groups > 1 else ""

    @property
    def free_factors(self) -> bool:
        return self.groups == 1 and not self.output_padding  # others copy or turn the factor, of the size it has

    # -- the weight ------------------------------------------------------------------------------------------------
    def matrix(self, weight: Tensor) -> Tensor:
        return kernels_as_matrix(weight, self.groups, bool(self.output_padding))

    def put(self, weight: Tensor, offset: int, rows: Tensor) -> None:
        if not self.output_padding:
            weight.narrow(0, offset, rows.shape[0]).copy_(rows.unflatten(1, weight.shape[1:]))
            return
        whole = self.matrix(weight).clone()
        whole.narrow(0, offset, rows.shape[0]).copy_(rows)
        weight.copy_(matrix_as_kernels(whole, self.kernel, self.groups, True))

    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        return call(kernels_as_matrix, weight, self.groups, bool(self.output_padding))

    # -- beside the product ----------------------------------------------------------------------------------------
    @property
    def _numbers(self) -> tuple[Any, ...]:
        return self.kernel, self.stride, self.padding, self.dilation, self.groups, self.output_padding

    def down(self, call: Call, x: fx.Node, factor: fx.Node) -> fx.Node:
        return call(conv_with_factor, x, factor, *self._numbers)

    def up(self, call: Call, z: fx.Node, across: fx.Node) -> fx.Node:
        return call(conv_up, z, across, len(self.kernel), self.groups)

    def by_weight(self, call: Call, x: fx.Node, weight_and_bias: fx.Node) -> fx.Node:
        return call(conv_with_matrix, x, weight_and_bias, *self._numbers)

    def last(self, call: Call, z: fx.Node) -> fx.Node:
        return call(channels_last, z, len(self.kernel), self.groups)

    def rows(self, call: Call, x: fx.Node) -> fx.Node:
        return call(conv_rows, x, *self._numbers)

    def unrolled(self, call: Call, delta: fx.Node) -> fx.Node:
        return call(channels_back, delta, len(self.kernel), self.groups)


# -- what stands in graphs -------------------------------------------------------------------------------------------
def kernels_as_matrix(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The stored weight as `(out, in / groups * k...)`; a view where it is contiguous and not transposed."""
    if transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def matrix_as_kernels(matrix: Tensor, kernel: tuple[int, ...], groups: int, transposed: bool) -> Tensor:
    """The inverse: `(out, in / groups * k...)` as the weight is stored."""
    weight = matrix.unflatten(1, (-1, *kernel))
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if transposed else weight


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, back: Any
) -> Tensor:
    dims = len(stride)
    if back:
        return _BACK[dims - 1](x, weight, bias, stride, padding, back, groups, dilation)  # type: ignore[no-any-return]
    return _CONVOLVE[dims - 1](x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


def conv_with_factor(
    x: Tensor, factor: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, back: Any
) -> Tensor:
    """x with `factor (q, in / groups * k...)` as the kernels of every group: `(..., groups * q, *spatial)`."""
    if factor.dtype != x.dtype:
        factor = factor.to(x.dtype)
    if groups > 1:
        factor = factor.repeat(groups, 1)
    return _convolve(x, matrix_as_kernels(factor, kernel, groups, bool(back)), None, stride, padding, dilation, groups,
                     back)  # fmt: skip


def conv_up(z: Tensor, across: Tensor, dims: int, groups: int) -> Tensor:
    """z `(..., groups * q, *spatial)` through `across (out, q)`, every group to what it produces: `(..., out, ...)`."""
    weight = across.to(z.dtype).reshape(*across.shape, *(1,) * dims)
    return _CONVOLVE[dims - 1](z, weight, groups=groups)  # type: ignore[no-any-return]


def conv_with_matrix(
    x: Tensor, given: tuple[Tensor, Tensor | None], kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    back: Any,
) -> Tensor:  # fmt: skip
    """x with a weight `(out, in / groups * k...)` and a bias `(out,)` or None."""
    weight, bias = given
    weight = matrix_as_kernels(weight.to(x.dtype), kernel, groups, bool(back))
    return _convolve(x, weight, None if bias is None else bias.to(x.dtype), stride, padding, dilation, groups, back)


def channels_last(z: Tensor, dims: int, groups: int) -> Tensor:
    """z `(..., groups * q, *spatial)` -> `(..., *spatial, q)`, with groups `(..., *spatial, groups, q)`."""
    z = z.movedim(-dims - 1, -1)
    return z if groups == 1 else z.unflatten(-1, (groups, -1))


def channels_back(delta: Tensor, dims: int, groups: int) -> Tensor:
    """The delta of rows `(..., *spatial, [groups,] out)` -> `(..., out, *spatial)`, of every group what it produces."""
    if groups > 1:
        own = delta.unflatten(-1, (groups, -1)).diagonal(0, -3, -2)  # (..., out / groups, groups)
        delta = own.transpose(-1, -2).flatten(-2)
    return delta.movedim(-1, -dims - 1)


def conv_rows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int, back: Any) -> Tensor:
    """What every position of the result sees of x: `(..., *spatial, in * k...)`, with groups `(..., groups, ...)`."""
    if back:  # a transposed one is a plain one of the spread input with the kernel turned around
        x = upsampled(x, kernel, stride, padding, dilation, back)
        stride, padding = (1,) * len(kernel), (0,) * len(kernel)
    return patches_of(x, kernel, stride, padding, dilation, groups, turned=bool(back))


# -- finding one -----------------------------------------------------------------------------------------------------
def match_convolution(use: Use) -> ProductNode | NoMatch | None:
    """The convolution that a node computes with a weight."""
    node, stored = use.node, use.tensors[use.name]
    if node.op != "call_function":
        return None
    back, dims = node.target in _TRANSPOSED, _DIMS.get(node.target, stored.dim() - 2)
    if node.target in _FORWARD:
        names = _FORWARD_NAMES
    elif back:
        names = _TRANSPOSED_NAMES
    elif node.target is _GENERAL:
        names = _GENERAL_NAMES
    else:
        return None
    bound = bind(node, ("input",), ("weight",), ("bias",), *((name,) for name, _ in names))
    if bound is None or stored.dim() != dims + 2:
        return NoMatch(f"{node.target} is called with arguments that are not understood", node.name)
    x, weight, bias, *rest = bound
    given = {name: default if value is None else value for (name, default), value in zip(names, rest, strict=True)}
    if weight not in use.views or x in use.views or bias in use.views:
        return NoMatch(f"{use.name!r} is no weight of the convolution", node.name)
    if not isinstance(x, fx.Node):
        return NoMatch("the input is a constant", node.name)
    back = bool(given.pop("transposed", back))
    groups = given.pop("groups")
    numbers = {name: _each(value, dims) for name, value in given.items()}
    if type(groups) is not int or None in numbers.values():
        return NoMatch(f"the stride, padding, dilation or groups of {node.name} are computed at every call", node.name)
    product = Convolution(
        tuple(stored.shape[2:]), numbers["stride"], numbers["padding"], numbers["dilation"],  # type: ignore[arg-type]
        groups, numbers["output_padding"] if back else (),  # type: ignore[arg-type]
    )  # fmt: skip
    found = None if bias is None else vector(bias, product.matrix(stored).shape[0], use.tensors)
    if bias is not None and found is None:
        return NoMatch("the bias is not a plain parameter", node.name)
    return ProductNode(node, x, use.read, use.name, product, found, "convolution")


def _each(value: Any, dims: int) -> tuple[int, ...] | str | None:
    """One number per dimension, or the padding's name; None for what is no constant."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return (value,) * dims
    if isinstance(value, (tuple, list)) and all(type(v) is int for v in value):
        return tuple(value) if len(value) == dims else tuple(value) * dims if len(value) == 1 else None
    return None
