"""What a model computes before rounding: the same program in a wider type, without a second copy of the weights.

    mm(x: float32, w: float32)  ->  mm(x: float64, w.double())

Every operator's floating operands are widened as it is called, and so are the dtypes it is asked to make, so that a
norm that goes to float32 on purpose is no exception. One operator's operands are in memory twice at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class Wide(TorchDispatchMode):
    """Inside the block every operator computes in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._narrow = [narrow for narrow in _NARROW if narrow is not dtype and narrow.itemsize <= dtype.itemsize]

    def widen(self, value: Any) -> Any:
        """A tensor, or a dtype, that is narrower, in the wider one; anything else as it is."""
        if isinstance(value, torch.Tensor) and value.dtype in self._narrow:
            return value.to(self.dtype)
        return self.dtype if isinstance(value, torch.dtype) and value in self._narrow else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wide_args, wide_kwargs = tree_map(self.widen, (args, kwargs))
        result = func(*wide_args, **wide_kwargs)
        if not func._schema.is_mutable:
            return tree_map(self.widen, result)
        # What is written in place is the operand itself, not its widened copy.
        for argument, position in zip(func._schema.arguments, range(len(func._schema.arguments)), strict=True):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            by_place = position < len(args)
            own = args[position] if by_place else kwargs.get(argument.name)
            wide = wide_args[position] if by_place else wide_kwargs.get(argument.name)
            if isinstance(own, torch.Tensor) and own is not wide:
                own.copy_(wide)
                result = own if result is wide else result
        return result


# Functions that look at the dtypes of their operands before an operator is called.
_CHECKED = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, torch.bilinear, torch.prelu, F.scaled_dot_product_attention,
    F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.bilinear, F.prelu, F.multi_head_attention_forward,
}  # fmt: skip


class _Checked(TorchFunctionMode):
    def __init__(self, mode: Wide) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CHECKED:
            args, kwargs = tree_map(self.mode.widen, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def widely(model: torch.nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model's output for keyword `inputs`, computed in `dtype`. Raises whatever the model raises."""
    mode = Wide(dtype)
    given = tree_map(mode.widen, dict(inputs))
    with torch.no_grad(), mode, _Checked(mode):
        return model(**given)
