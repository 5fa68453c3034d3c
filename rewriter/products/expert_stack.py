"""What a forward of experts sees in the place of an adapted weight `(E, ...)`: the base's, whose products add deltas.

    F.linear(x, stack[e])                    ->  F.linear(x, W[e]) + delta of x with expert e's tensors
    x @ stack[e], torch.bmm(x, stack)        likewise
    torch.bmm(stack[ids], x)                 a row of ids for every matrix (transformers' batched_mm)
    grouped_mm(x, stack, offs)               rows sorted by expert (transformers' grouped_mm)
    anything else                            is computed with W + delta, made for it

So every implementation of an experts layer computes the adapted layer, and those with known products never make
`W + delta`. What asks for shape, dtype, device or layout is told those of the base's weight.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError
from .expert_product import ALL, Where

_FACTS = frozenset((
    "dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "itemsize", "nbytes", "requires_grad",
    "size", "dim", "numel", "nelement", "stride", "storage_offset", "data_ptr", "is_contiguous", "is_floating_point",
    "is_complex", "element_size", "get_device", "is_quantized", "is_sparse", "is_leaf", "names", "device_mesh",
))  # fmt: skip
_LINEAR = {F.linear}
_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_BMM = {torch.bmm, Tensor.bmm}
_GROUPED = {getattr(place, name) for place, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(place, name)}


def grouped_functions() -> frozenset[Any]:
    """What multiplies rows that are sorted by expert: torch's functions, and transformers' where it is loaded."""
    fallback = (
        getattr(torch.ops.transformers, "grouped_mm_fallback", None) if hasattr(torch.ops, "transformers") else None
    )
    return frozenset(_GROUPED if fallback is None else {*_GROUPED, fallback, fallback.default})


class _Lazy(abc.ABC):
    """A weight that is there as the base's tensor and what is added to its products.

    Args:
        base: the base's tensor, or a view of it.
        beside: the adapters, each with its tensors.
        in_last: whether `in` is the last dimension.
        training: of the owner.
    """

    def __init__(self, base: Tensor, beside: Any, in_last: bool, training: bool, grouped: Any = ()) -> None:
        self.base, self.beside, self.in_last, self.training, self.grouped = base, beside, in_last, training, grouped

    @abc.abstractmethod
    def like(self, base: Tensor, in_last: bool) -> Any:
        """The same of another view of the base's tensor."""

    @abc.abstractmethod
    def materialised(self) -> Tensor:
        """The base's tensor and what the adapters add to it."""

    @abc.abstractmethod
    def product(self, x: Tensor, y: Tensor, where: Where) -> Tensor:
        """y, the base's product with x, and what the adapters add to it."""

    # -- views and facts -----------------------------------------------------------------------------------------
    def transpose(self, first: int, second: int) -> Any:
        last = {(d + self.base.dim()) % self.base.dim() for d in (first, second)}
        if last == {self.base.dim() - 2, self.base.dim() - 1}:
            return self.like(self.base.transpose(-2, -1), not self.in_last)
        return self.materialised().transpose(first, second)

    @property
    def mT(self) -> Any:
        return self.transpose(-2, -1)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self.like(self.base.to(*args, **kwargs), self.in_last)

    def float(self) -> Any:
        return self.to(torch.float32)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def double(self) -> Any:
        return self.to(torch.float64)

    def type_as(self, other: Tensor) -> Any:
        return self.to(other.dtype)

    def contiguous(self) -> Any:
        return self.like(self.base.contiguous(), self.in_last)

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.base, name)
        return getattr(self.materialised(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, {} if kwargs is None else kwargs)

    def _whole(self, wide: Tensor, where: Where) -> Tensor:
        """`W + delta` of matrices `(n, ...)`: what the adapters make of the identity."""
        if self.training and any(getattr(method, "dropout", 0) for _, _, _, method in self.beside):
            raise AdapterError(
                "an experts layer uses an adapted weight in another way than in a product, which leaves no input to "
                "drop out: train with dropout=0 there, or choose config._experts_implementation 'eager'"
            )
        y = wide.transpose(-2, -1) if self.in_last else wide  # (n, in, out)
        identity = torch.eye(y.shape[1], dtype=y.dtype, device=y.device).expand(y.shape[0], -1, -1)
        y = self._added(identity, y.clone(), where, False)
        return y.transpose(-2, -1) if self.in_last else y

    def _added(self, x: Tensor, y: Tensor, where: Where, training: bool) -> Tensor:
        for functions, own, others, _ in self.beside:
            y = functions.many(x, y, where, training, *own, *others)
        return y


class Stack(_Lazy):
    """All experts' matrices, `(E, ...)`."""

    def like(self, base: Tensor, in_last: bool) -> Stack:
        return Stack(base, self.beside, in_last, self.training, self.grouped)

    def __getitem__(self, index: Any) -> Any:
        if (
            isinstance(index, Tensor)
            and index.dim() == 1
            and not index.is_floating_point()
            and index.dtype != torch.bool
        ):
            return Rows(self, self.base[index], self.in_last, index)
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            return One(self, self.base[index], self.in_last, index)
        return self.materialised()[index]

    def product(self, x: Tensor, y: Tensor, where: Where) -> Tensor:
        return self._added(x, y, where, self.training)

    def materialised(self) -> Tensor:
        return self._whole(self.base, ALL)

    def of_one(self, index: Any) -> list[tuple[Any, ...]]:
        """Every adapter with the tensors of one expert. Taken apart once per call: a select has a gradient as large as
        all experts' tensors, for every expert it is made for."""
        if torch.compiler.is_compiling():
            return [(f.one, *[t[index] for t in own], *others) for f, own, others, _ in self.beside]
        parts = self.__dict__.get("parts")
        if parts is None:
            parts = self.parts = [[t.unbind(0) for t in own] for _, own, _, _ in self.beside]
        e = int(index)
        taken = zip(self.beside, parts, strict=True)
        return [(f.one, *[part[e] for part in own], *others) for (f, _, others, _), own in taken]


class One(_Lazy):
    """One expert's matrix."""

    def __init__(self, stack: Stack, base: Tensor, in_last: bool, index: Any) -> None:
        super().__init__(base, stack.beside, in_last, stack.training)
        self.stack, self.index = stack, index

    def like(self, base: Tensor, in_last: bool) -> One:
        return One(self.stack, base, in_last, self.index)

    def t(self) -> One:
        return self.like(self.base.t(), not self.in_last)

    @property
    def T(self) -> One:
        return self.t()

    def product(self, x: Tensor, y: Tensor, where: Where) -> Tensor:
        for function, *tensors in self.stack.of_one(self.index):
            y = function(x, y, self.training, *tensors)
        return y

    def materialised(self) -> Tensor:
        index = self.index if isinstance(self.index, Tensor) else torch.tensor(self.index)
        ids = index.reshape(1).to(self.base.device)
        return self._whole(self.base.unsqueeze(0), ("rows", ids))[0]


class Rows(_Lazy):
    """The matrices of these experts, one after the other, `(S, ...)`."""

    def __init__(self, stack: Stack, base: Tensor, in_last: bool, ids: Tensor) -> None:
        super().__init__(base, stack.beside, in_last, stack.training)
        self.stack, self.ids = stack, ids

    def like(self, base: Tensor, in_last: bool) -> Rows:
        return Rows(self.stack, base, in_last, self.ids)

    def product(self, x: Tensor, y: Tensor, where: Where) -> Tensor:
        return self._added(x, y, ("rows", self.ids), self.training)

    def materialised(self) -> Tensor:
        return self._whole(self.base, ("rows", self.ids))


# -- products ----------------------------------------------------------------------------------------------------
def computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A call of torch with such weights among its arguments."""
    if func in _LINEAR and not kwargs.keys() - {"bias", "weight", "input"}:
        x, weight, bias = _bound(args, kwargs, ("input", "weight", "bias"))
        if isinstance(weight, One) and weight.in_last and isinstance(x, Tensor) and not isinstance(bias, _Lazy):
            return weight.product(x, F.linear(x, weight.base, bias), ALL)
    elif func in _MATMUL and len(args) == 2 and not kwargs:
        x, weight = args
        if isinstance(weight, One) and not weight.in_last and isinstance(x, Tensor):
            return weight.product(x, torch.matmul(x, weight.base), ALL)
    elif func in _BMM and len(args) == 2 and not kwargs:
        first, second = args
        if isinstance(second, (Rows, Stack)) and not second.in_last and isinstance(first, Tensor):
            return second.product(first, torch.bmm(first, second.base), ALL)
        if isinstance(first, (Rows, Stack)) and first.in_last and isinstance(second, Tensor):
            y = torch.bmm(first.base, second).transpose(1, 2)
            return first.product(second.transpose(1, 2), y, ALL).transpose(1, 2)
    else:
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, Stack) and func in weight.grouped and not weight.in_last and isinstance(args[0], Tensor):
            said = {name: value for name, value in kwargs.items() if value is not None}  # bias and dtype: not given
            offsets = args[2] if len(args) == 3 else said.get("offs")
            if offsets is not None and len(args) + len(said) == 3:
                y = _grouped(func, args[0], weight.base, offsets)
                return weight.product(args[0], y, ("grouped", _by(func), offsets))
    return func(*(_plain(value) for value in args), **{name: _plain(value) for name, value in kwargs.items()})


def _bound(args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _grouped(func: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return func(x, weight, offs=offsets)  # type: ignore[no-any-return]


def _by(func: Any) -> Any:
    def grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return func(x, weight, offs=offsets)  # type: ignore[no-any-return]

    return grouped


def _plain(value: Any) -> Any:
    if isinstance(value, _Lazy):
        return value.materialised()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value)
    return value
