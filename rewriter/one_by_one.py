"""A sequence whose tensors are made when they are asked for: of a quantised model one weight at a time is in floating
point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from torch import Tensor


class OneByOne(Sequence[Tensor]):
    """`make(0)`, `make(1)`, ... up to a length. None is kept."""

    def __init__(self, length: int, make: Callable[[int], Tensor]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        found = range(self._length)[index]
        return self._make(found) if isinstance(found, int) else [self._make(i) for i in found]
