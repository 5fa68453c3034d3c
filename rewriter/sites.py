"""Sites: linear-like nodes of a graph and the roles of their dimensions.

`F.linear`, `addmm` (HF Conv1D), `matmul` / `@` / `mm` with a parameter on the right, their ATen forms, and a part of a
fused weight are one thing here: an input, a weight with a contracted and a produced dimension, maybe a bias. Whatever
is not linear-like is a `NoMatch` with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

_LINEAR = {F.linear, aten.linear.default}
_ADDMM = {torch.addmm, aten.addmm.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default}
_ADD = {torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
_TRANSPOSE = {torch.t, torch.transpose, torch.permute, aten.t.default, aten.transpose.int, aten.permute.default,
              aten.numpy_T.default}  # fmt: skip
_CAST = {"to", "type_as", "float", "half", "bfloat16", "type"}
_CAST_OPS = {aten.to.dtype, aten._to_copy.default, torch.ops.prims.convert_element_type.default}


@dataclass(frozen=True)
class NoMatch:
    """Why a node (or a tensor) is not a site."""

    reason: str
    node: str = ""


@dataclass(frozen=True)
class LinearNode:
    """One linear-like node of a traced graph.

    Args:
        node: the node that computes `x W^T (+ b)`.
        x: its input, `(..., in)`.
        weight: the `get_attr` of the weight; `weight_name` its attribute path.
        contracted: which dimension of the stored weight is summed over: 1 for `(out, in)`, 0 for `(in, out)`.
        bias_name: attribute path of the bias, or None.
        form: how it is written: `linear`, `addmm` or `matmul`.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    weight_name: str
    contracted: int
    bias_name: str | None
    form: str


@dataclass(frozen=True)
class Site:
    """Where one adapter goes: a whole weight, or one part of a fused one.

    Args:
        name: dotted name in the model: the owner's path, plus the weight's name unless that is `weight`, plus
            `[i]` for part i of a fused weight.
        owner: dotted path of the module that owns the weight; empty for the root.
        weight: the weight's attribute name in the owner.
        bias: the bias' attribute name, or None.
        in_features, out_features: lengths of the contracted and the produced dimension (of the part).
        contracted: index of the contracted dimension in the stored weight.
        offset: where the part starts in the produced dimension; 0 for a whole weight.
        part, parts: which of how many equal parts of the produced dimension; `0, 1` is the whole weight.
        dtype, device: of the weight.
        form: how the model writes the product.
    """

    name: str
    owner: str
    weight: str
    bias: str | None
    in_features: int
    out_features: int
    contracted: int
    offset: int
    part: int
    parts: int
    dtype: torch.dtype
    device: torch.device
    form: str

    def __deepcopy__(self, memo: object) -> Site:
        return self

    @property
    def whole(self) -> bool:
        return self.parts == 1

    @property
    def key(self) -> str:
        """The site's name inside its owner: empty for the whole of a parameter called `weight`."""
        stem = "" if self.weight == "weight" else self.weight.replace(".", "_")
        return stem if self.whole else f"{stem}part{self.part}"

    def linear_layout(self, weight: Tensor) -> Tensor:
        """A view `(out, in)` of this site's part of the stored weight."""
        view = weight if self.contracted == 1 else weight.t()
        return view.narrow(0, self.offset, self.out_features)


def _argument(node: fx.Node, position: int, *names: str) -> object:
    if len(node.args) > position:
        return node.args[position]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return None


def _is_transpose(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("t", "transpose", "permute") and len(node.args) in (1, 3)
    if node.op != "call_function":
        return False
    return node.target in _TRANSPOSE or (node.target is getattr and node.args[1:] in (("T",), ("mT",)))


def _weight_of(node: object) -> tuple[fx.Node, bool] | None:
    """Follow casts and transposes of a 2-d parameter back to its `get_attr`; the flag says that it is transposed."""
    transposed = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return node, transposed
        if _is_transpose(node):
            transposed = not transposed
        elif not (
            (node.op == "call_method" and node.target in _CAST)
            or (node.op == "call_function" and node.target in _CAST_OPS)
        ):
            return None
        node = node.args[0]
    return None


def _bias_name(node: object, length: int, tensors: Mapping[str, Tensor]) -> str | None:
    found = _weight_of(node)
    if found is None:
        return None
    name = str(found[0].target)
    return name if name in tensors and tuple(tensors[name].shape) == (length,) else None


def match_linear(node: fx.Node, tensors: Mapping[str, Tensor]) -> LinearNode | NoMatch:
    """Recognise one node. `tensors` are the parameters the graph's `get_attr` nodes may name."""
    target: Any = node.target
    if node.op == "call_method":
        target = {"matmul": torch.matmul, "mm": torch.mm, "addmm": torch.addmm}.get(str(node.target), node.target)
    if target in _LINEAR:
        form, x, w, b, stored_as_linear = (
            "linear",
            _argument(node, 0, "input"),
            _argument(node, 1, "weight"),
            None,
            True,
        )
        b = _argument(node, 2, "bias")
    elif target in _ADDMM:
        form, stored_as_linear = "addmm", False
        b, x, w = _argument(node, 0, "input"), _argument(node, 1, "mat1"), _argument(node, 2, "mat2")
        if any(node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")):
            return NoMatch("addmm with alpha or beta other than 1", node.name)
    elif target in _MATMUL:
        form, b, stored_as_linear = "matmul", None, False
        x, w = _argument(node, 0, "input", "self"), _argument(node, 1, "other", "mat2")
    else:
        return NoMatch(f"{node.op} {node.target} is not a linear product", node.name)

    found = _weight_of(w)
    if found is None:
        left = _weight_of(x)
        if left is not None and str(left[0].target) in tensors:
            return NoMatch("the parameter is the left operand of the product", node.name)
        return NoMatch("the right operand is not a parameter (it is computed)", node.name)
    weight, transposed = found
    name = str(weight.target)
    if name not in tensors:
        return NoMatch(f"{name!r} is not a parameter", node.name)
    if tensors[name].dim() != 2:
        return NoMatch(f"{name!r} has {tensors[name].dim()} dimensions, a linear weight has 2", node.name)
    if not isinstance(x, fx.Node):
        return NoMatch("the input is a constant", node.name)
    contracted = int(stored_as_linear != transposed)
    out_features = tensors[name].shape[1 - contracted]
    bias = _bias_name(b, out_features, tensors)
    if b is not None and bias is None and form == "linear":
        return NoMatch("the bias is not a plain parameter", node.name)
    if form == "matmul" and len(node.users) == 1:  # x @ W + b
        (user,) = node.users
        if user.op == "call_function" and user.target in _ADD and len(user.args) == 2:
            bias = _bias_name(user.args[1] if user.args[0] is node else user.args[0], out_features, tensors)
    return LinearNode(node, x, weight, name, contracted, bias, form)


def find_linears(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, list[LinearNode] | NoMatch]:
    """For each 2-d parameter of `tensors`: its linear-like nodes, or the reason why it has none.

    A parameter that is also used in another way (a norm, an embedding, a sum) is a `NoMatch`: an adapter on the
    product alone would not be what merging the weight computes.
    """
    found: dict[str, list[LinearNode] | NoMatch] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            continue
        reads = [n for n in graph.nodes if n.op == "get_attr" and n.target == name]
        if not reads:
            found[name] = NoMatch(f"{name!r} is not read by the module's own forward")
            continue
        uses, pending = [], list(reads)
        while pending:
            for user in pending.pop().users:
                source = _weight_of(user)
                if source is not None and source[0] in reads:
                    pending.append(user)  # a cast or a transpose of the weight
                elif user not in uses:
                    uses.append(user)
        matches = [match_linear(user, tensors) for user in uses]
        wrong = next((m for m in matches if isinstance(m, NoMatch)), None)
        if wrong is not None:
            found[name] = wrong
        else:
            found[name] = [m for m in matches if isinstance(m, LinearNode) and m.weight_name == name] or NoMatch(
                f"{name!r} is read but not used in a product"
            )
    return found
