"""Modules of a model that are compiled on their own: by `layer.compile()`, or replaced by `torch.compile(layer)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..calls.disabled import tell_recomputations
from ..capture.captured import captured
from .wrappers import is_compiled


def compiled_parts(root: nn.Module) -> Iterator[nn.Module]:
    """The modules whose call runs compiled code: what is in it, no Python sees at a call."""
    return (m for m in root.modules() if m._compiled_call_impl is not None or is_compiled(m))


class _Telling:
    """A compiled call that tells the checkpoints around it under what they shall compute it again."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not captured():
            tell_recomputations()
        return self.call(*args, **kwargs)


def tell_from_compiled(root: nn.Module) -> None:
    """Let the compiled parts of a model do at every call inside `disabled` what its owners do, which compiled code
    does not: a backward pass that computes a part again (activation checkpointing) then does so as it was."""
    for module in compiled_parts(root):
        name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        call = module.__dict__[name]
        if not isinstance(call, _Telling):
            module.__dict__[name] = _Telling(call)
