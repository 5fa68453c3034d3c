"""What a kind of product is: the roles of a weight's dimensions, and how a method's operator stands beside it.

    linear       y = x W^T                 the operator takes x, its delta has y's layout
    other kinds  y = product(x, W)         op(x, ...) -> up(product(x, down(...)), ...) where the operator has halves,
                                           rows (..., in) of x and op on them where the kind can say what they are

Sites, grafting, merging and exporters ask the product of a site and know no kind of their own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from ..analysis.weight_views import origin

#: inserts a call of a function into the graph and gives its node, `(function, *arguments) -> node`
Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Product(abc.ABC):
    """How a model multiplies with one weight. Subclasses are frozen and hold plain values: equal products are equal.

    A kind says how its weight is a matrix `(out, in)`, which initialising, merging and factors see. One that is not
    `plain` says beside it how a factor goes into its place (`down`, `up`), and if it can what its rows are.
    """

    #: a method's operator takes the product's input as it is, `(..., in)`, and gives the delta `(..., out)`
    plain: ClassVar[bool] = False
    #: an operator stands on the `rows` as it is, also one with halves: they cost next to nothing
    by_rows: ClassVar[bool] = False
    #: whether `all-linear` means it
    linear: ClassVar[bool] = False
    #: x says which one of the features counts: it has no values to drop, and starting values are not for sums of many
    one_hot: ClassVar[bool] = False
    #: whether another weight can stand in the place of the base's, `by_weight`
    takes_weights: ClassVar[bool] = False
    #: what is said of a weight whose uses are several products
    several: ClassVar[str] = "is used in products that differ"
    #: how many matrices the weight stacks along its first dimension; 0 for one that is a matrix
    experts: ClassVar[int] = 0

    @property
    def channel(self) -> int:
        """The dimension of the product's result with the produced features."""
        return -1

    @property
    def undivided(self) -> str:
        """Why a part of what it produces cannot have an adapter of its own; empty where it can."""
        return ""

    @property
    def free_factors(self) -> bool:
        """Whether `down` in an exported graph takes a factor of another rank than the one it was exported with."""
        return True

    # -- the weight ------------------------------------------------------------------------------------------------
    @abc.abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as `(out, in)`: a view where its memory allows."""

    def put(self, weight: Tensor, offset: int, rows: Tensor) -> None:
        """Write rows `(n, in)` of the matrix, from `offset` on, into the stored weight."""
        self.matrix(weight).narrow(-2, offset, rows.shape[-2]).copy_(rows)

    @abc.abstractmethod
    def matrix_node(self, call: Call, weight: fx.Node) -> fx.Node:
        """`matrix` in a graph."""

    # -- an operator beside a product that is not plain ------------------------------------------------------------
    def refusal(self, operator: str) -> str:
        """Why an operator that is more than two factors cannot stand beside this product."""
        return f"{operator} needs the rows that the weight multiplies, and a {type(self).__name__} has none"

    def down(self, call: Call, x: fx.Node, factor: fx.Node) -> fx.Node:
        """The product of x with a factor `(q, in)` in the weight's place: z."""
        raise NotImplementedError

    def up(self, call: Call, z: fx.Node, across: fx.Node) -> fx.Node:
        """From z through `across (out, q)` to the delta, in the layout of the product's result."""
        return self.unrolled(call, call(_times, self.last(call, z), across))

    def by_weight(self, call: Call, x: fx.Node, weight_and_bias: fx.Node) -> fx.Node:
        """The product of x with another weight `(out, in)`, and a bias or None, a pair, where it `takes_weights`."""
        raise NotImplementedError

    def last(self, call: Call, z: fx.Node) -> fx.Node:
        """z with its q features last, as an up half takes it."""
        return z

    def unrolled(self, call: Call, delta: fx.Node) -> fx.Node:
        """The delta of rows, `(..., out)`, in the layout of the product's result."""
        return delta

    def rows(self, call: Call, x: fx.Node) -> fx.Node | None:
        """x as rows `(..., in)` whose product with the matrix is the result; None where there are none."""
        return None


def _times(z: Tensor, across: Tensor) -> Tensor:
    return z @ across.to(z.dtype).t()


@dataclass(frozen=True)
class NoMatch:
    """Why a node (or a tensor) is not a site."""

    reason: str
    node: str = ""


@dataclass(frozen=True)
class ProductNode:
    """One product of a traced graph.

    Args:
        node: the node that computes `x W^T (+ b)`, or what a product of this kind is.
        x: its input, `(..., in)` for a plain one.
        weight: the `get_attr` of the weight; `weight_name` its attribute path.
        product: the kind.
        bias_name: attribute path of the bias the product adds, which nothing else reads, or None.
        form: how it is written: `linear`, `addmm` or `matmul`; another kind's name. A `matmul` adds its bias behind.
        host: `Site.host`.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    weight_name: str
    product: Product
    bias_name: str | None
    form: str
    host: str | None = None


@dataclass(frozen=True)
class Use:
    """A node that reads a weight, as the kinds look at it.

    Args:
        node: the node.
        name: attribute path of the weight; `read` its `get_attr`.
        views: the nodes that have the weight's values, and whether transposed (of 2-d weights only).
        tensors: the parameters around, by attribute path.
    """

    node: fx.Node
    name: str
    read: fx.Node
    views: Mapping[fx.Node, bool]
    tensors: Mapping[str, Tensor]


#: a kind's look at a use: the product; why it is none although it looks like one; None for another kind's
Matcher = Callable[[Use], ProductNode | NoMatch | None]


def bind(node: fx.Node, *names: tuple[str, ...]) -> list[Any] | None:
    """The arguments by position or by any of their names; None where there are others."""
    if len(node.args) > len(names) or set(node.kwargs) - {n for known in names for n in known}:
        return None
    given = list(node.args)
    return given + [next((node.kwargs[n] for n in known if n in node.kwargs), None) for known in names[len(given) :]]


def vector(node: object, length: int, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a parameter `(length,)`, casts aside."""
    read = origin(node)
    name = str(read.target) if read is not None else ""
    return name if name in tensors and tuple(tensors[name].shape) == (length,) else None
