"""Module -> torch.fx graph of that module alone, traced once per structure."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .errors import CaptureError

#: nn.Module bookkeeping that does not influence what forward computes
_BOOKKEEPING = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
                "training", "call_super_init", "dump_patches", "_version", "_compiled_call_impl"}  # fmt: skip
_SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Trace:
    """The traced forward of one module structure. `graph` is read only: copy before editing."""

    graph: fx.Graph
    signature: tuple[Any, ...]


class _OwnTracer(fx.Tracer):
    """Every submodule is a leaf: only the module's own arithmetic is traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Same:
    """Hashes any attribute by identity and keeps it alive, so that its id cannot be reused by another object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


_traces: dict[tuple[Any, ...], Trace] = {}
_MAX_TRACES = 1024


def _freeze(value: Any) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_freeze, value))
    return _Same(value)


def _is_bookkeeping(attribute: str) -> bool:
    return attribute in _BOOKKEEPING or "_hooks" in attribute or attribute.startswith("_fxgraft")


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What decides the graph of a module: its class, its tensors' shapes and dtypes, its plain attributes."""
    tensors = itertools.chain(module._parameters.items(), module._buffers.items())
    return (
        type(module),
        tuple((n, None if t is None else (tuple(t.shape), t.dtype)) for n, t in tensors),
        tuple((n, type(m)) for n, m in module._modules.items()),
        tuple((k, _freeze(v)) for k, v in module.__dict__.items() if not _is_bookkeeping(k)),
    )


def trace(module: nn.Module) -> Trace:
    """Trace a module's own forward with its submodules as leaves.

    Raises:
        CaptureError: the forward is replaced on the instance, or torch.fx cannot follow it.
    """
    key = signature(module)
    if (known := _traces.get(key)) is not None:
        return known
    if "forward" in module.__dict__:
        raise CaptureError(
            f"{type(module).__name__} has its forward replaced on the instance (an offloading hook?); "
            "remove the hook before rewriting"
        )
    graphs = []
    for training in (False, True):
        # A shallow twin: tracing in both modes must not flip the flag of the module it was given.
        twin = copy.copy(module)
        twin.__dict__["training"] = training
        try:
            graphs.append(_OwnTracer().trace(twin))
        except Exception as error:
            raise CaptureError(
                f"torch.fx cannot trace the forward of {type(module).__name__}: {type(error).__name__}: {error}"
            ) from error
    result = Trace(_unify_modes(type(module).__name__, *graphs), key)
    if len(_traces) >= _MAX_TRACES:
        _traces.pop(next(iter(_traces)))
    _traces[key] = result
    return result


def _unify_modes(name: str, evaluation: fx.Graph, training: fx.Graph) -> fx.Graph:
    """Make the mode a value again: tracing bakes `self.training` into `F.dropout(x, p, training=True)`."""
    pairs = list(zip(evaluation.nodes, training.nodes, strict=False))
    same_shape = len(evaluation.nodes) == len(training.nodes) and all(
        a.op == b.op and a.target == b.target and a.name == b.name for a, b in pairs
    )
    if not same_shape:
        raise CaptureError(f"the forward of {name} takes another path in training than in evaluation")
    for a, b in pairs:

        def mode(x: Any, y: Any, at: fx.Node = a) -> Any:
            if x is False and y is True:
                with evaluation.inserting_before(at):
                    return evaluation.get_attr("training")
            if isinstance(x, slice):
                return slice(*map(mode, (x.start, x.stop, x.step), (y.start, y.stop, y.step)))
            if isinstance(x, (tuple, list)):
                return type(x)(map(mode, x, y))
            if not isinstance(x, fx.Node) and x != y:
                raise CaptureError(f"the forward of {name} uses another constant in training ({y!r} for {x!r})")
            return x

        a.args = tuple(map(mode, a.args, b.args))
        a.kwargs = {k: mode(v, b.kwargs[k]) for k, v in a.kwargs.items()}
    return evaluation
