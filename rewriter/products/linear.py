"""Linear products: which node multiplies with which weight, which way round, and adds which bias.

`F.linear`, `addmm` (HF Conv1D), `matmul` / `@` / `mm` with a parameter on the right and their ATen forms are one thing
here. Whatever looks like one and is none is a `NoMatch` with the reason."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .product import Call, NoMatch, Product, ProductNode, Use, bind, vector

aten = torch.ops.aten

_LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
_ADD = {torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
_METHODS = {"matmul": torch.matmul, "mm": torch.mm, "addmm": torch.addmm, "add": torch.add, "add_": torch.add}


@dataclass(frozen=True)
class Linear(Product):
    """`y = x W^T`.

    Args:
        contracted: which dimension of the stored weight is summed over: 1 for `(out, in)`, 0 for `(in, out)`.
    """

    plain: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    several: ClassVar[str] = "is used both as it is and transposed"

    contracted: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        return weight if self.contracted == 1 else weight.t()

    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        return weight if self.contracted == 1 else call(torch.t, weight)


LINEAR = Linear()


@dataclass(frozen=True)
class _Written:
    """The operands of a product as it is written; `linear` says that the weight is `(out, in)` there."""

    form: str
    x: object
    weight: object
    bias: object
    linear: bool


def _callee(node: fx.Node) -> Any:
    return _METHODS.get(str(node.target)) if node.op == "call_method" else node.target


def _product(node: fx.Node) -> _Written | NoMatch | None:
    target = _callee(node)
    if target in _LINEAR:
        bound = bind(node, ("input",), ("weight",), ("bias",))
        if bound is not None:
            return _Written("linear", bound[0], bound[1], bound[2], True)
    elif target in _ADDMM:
        bound = bind(node, ("input", "self"), ("mat1",), ("mat2",), ("beta",), ("alpha",))
        if bound is not None:
            scaled = len(node.args) > 3 or any(not _is_one(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))
            if scaled:
                return NoMatch("addmm with alpha or beta other than 1", node.name)
            return _Written("addmm", bound[1], bound[2], bound[0], False)
    elif target in _MATMUL:
        bound = bind(node, ("input", "self"), ("other", "mat2"))
        if bound is not None:
            return _Written("matmul", bound[0], bound[1], None, False)
    else:
        return None
    return NoMatch(f"{node.target} is called with arguments that are not understood", node.name)


def _is_one(value: object) -> bool:
    return isinstance(value, (int, float)) and value == 1


def is_linear_call(node: fx.Node) -> bool:
    """Whether a node calls one of the functions of a linear product."""
    return isinstance(_product(node), _Written)


def match_linear(use: Use) -> ProductNode | NoMatch | None:
    """The linear product that a node computes with a 2-d weight."""
    name, node = use.name, use.node
    if use.tensors[name].dim() != 2:
        return None
    product = _product(node)
    if product is None or isinstance(product, NoMatch):
        return product
    if isinstance(product.x, fx.Node) and product.x in use.views:
        return NoMatch(f"{name!r} is the left operand of the product", node.name)
    if product.weight not in use.views or product.bias in use.views:
        return NoMatch(f"{name!r} is no weight of the product", node.name)
    if not isinstance(product.x, fx.Node):
        return NoMatch("the input is a constant", node.name)
    contracted = int(product.linear != use.views[product.weight])  # type: ignore[index]
    out_features = use.tensors[name].shape[1 - contracted]
    bias = product.bias
    if product.form == "matmul":
        bias = added(node)
    found = None if bias is None else vector(bias, out_features, use.tensors)
    if bias is not None and found is None and product.form != "matmul":
        return NoMatch("the bias is not a plain parameter", node.name)
    return ProductNode(node, product.x, use.read, name, Linear(contracted=contracted), found, product.form)


def added(node: fx.Node) -> object:
    """What is added, unscaled, to a product that nothing else reads: `x @ W + b`."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    bound = bind(user, ("input", "self"), ("other",), ("alpha",)) if _callee(user) in _ADD else None
    if bound is None or len(user.args) > 2 or not _is_one(user.kwargs.get("alpha", 1)):
        return None
    first, second = bound[:2]
    return second if first is node else first
