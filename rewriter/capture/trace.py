"""Module -> torch.fx graph of that module alone, traced once per structure and per what its forward reads of Python."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError, listing
from ..quantised.quantised import opaque_graph, quantised
from .absent_arguments import Absent, ways
from .known_functions import open_known
from .multihead_attention import attention_graph, is_attention
from .observation import Observation, is_bookkeeping, protected
from .reads import Read
from .surroundings import Surroundings
from .transposed_convolution import is_transposed, numbers_of, transposed_graph


@dataclass(frozen=True)
class Trace:
    """The traced forward of one module structure. `graph` is read only: copy before editing.

    `ways` are the graphs of calls that leave arguments out, where these take another way; None for one that cannot be
    followed. `reads` is what else the forward looked at; for a module where any of it is different the graph does not
    stand.
    """

    graph: fx.Graph
    signature: tuple[Any, ...]
    reads: tuple[Read, ...] = ()
    ways: tuple[tuple[Absent, fx.Graph | None], ...] = ()

    def fits(self, module: nn.Module) -> bool:
        return all(read.now(module) == read.frozen for read in self.reads)


class _BufferProxy(fx.Proxy):
    """A buffer in a trace: its values are read at every call, its shape and dtype are those of the structure."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, buffer: Tensor) -> None:
        super().__init__(node, tracer)
        self._buffer = buffer

    @property
    def shape(self) -> torch.Size:
        return self._buffer.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    @property
    def ndim(self) -> int:
        return self._buffer.ndim

    def dim(self) -> int:
        return self._buffer.dim()

    def numel(self) -> int:
        return self._buffer.numel()


class _OwnTracer(fx.Tracer):
    """Every submodule is a leaf: only the module's own arithmetic is traced. Buffers are read at every call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            name = next((n for n, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None and name not in parameter_proxy_cache:
                node = self.create_node("get_attr", name, (), {})
                parameter_proxy_cache[name] = _BufferProxy(self, node, attr_val)
            if name is not None:
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


_FACTORIES = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.logspace, torch.eye,
              torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.tensor, torch.as_tensor,
              torch.scalar_tensor, torch.tril_indices, torch.triu_indices}  # fmt: skip


_FACTS = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "element_size"}


class _Factories(TorchFunctionMode):
    """A tensor that a forward makes is made at every call; nothing is drawn, and no tensor computed, while tracing."""

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        given = pytree.tree_leaves((args, kwargs))
        real = any(isinstance(value, Tensor) for value in given) and not any(isinstance(v, fx.Proxy) for v in given)
        if real and getattr(func, "__name__", "") not in _FACTS:
            raise CaptureError(f"it calls {func.__name__} of a tensor it does not reach as an attribute of a module")
        return func(*args, **(kwargs or {}))


_traces: dict[tuple[Any, ...], list[Trace]] = {}
_MAX_TRACES = 1024
_MAX_VALUES = 64  # traces of one structure that differ in what was read
_lock = threading.RLock()


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What decides the graph of a module whatever its forward reads: its class, its tensors, its children.

    A forward of the user's own is watched like all that runs (`surroundings.py`); one of torch's may be another too.
    """
    tensors = itertools.chain(module._parameters.items(), module._buffers.items())
    return (
        type(module),
        type(module).forward,
        tuple((n, None if t is None else (tuple(t.shape), t.dtype)) for n, t in tensors),
        tuple((n, type(m)) for n, m in module._modules.items()),
        tuple(n for n, t in module.__dict__.items() if isinstance(t, Tensor) and not is_bookkeeping(n)),
        tuple(n for n in module.__dict__ if hasattr(type(module), n) and not is_bookkeeping(n)),  # instead of methods
    )


def _replaced(module: nn.Module) -> str:
    """Who may have replaced a forward, and what to do."""
    if getattr(module.__dict__["forward"], "__qualname__", "").endswith(".tp_forward"):
        return (
            "by transformers' tp_plan; load the model without it and give it to parallelize_module of "
            "torch.distributed.tensor.parallel"
        )
    return "an offloading hook? Remove it"


def trace(module: nn.Module) -> Trace:
    """Trace a module's own forward with its submodules as leaves. The module is not touched.

    Raises:
        CaptureError: the forward is replaced on the instance, torch.fx cannot follow it, or a graph would not compute
            what it does: it changes attributes, or depends on what a graph cannot ask at every call.
    """
    if isinstance(module, fx.GraphModule):
        return Trace(module.graph, (type(module), module.code))
    if "forward" in module.__dict__:
        raise CaptureError(
            f"{type(module).__name__} has its forward replaced on the instance ({_replaced(module)} before rewriting)"
        )
    if (kind := quantised(module)) is not None:
        bias = getattr(module, "bias", None) is not None
        return Trace(opaque_graph(module), (type(module), type(module).forward, kind.name, kind.size(module), bias))
    structure = _structure(module)
    if is_attention(module):
        out = module._modules["out_proj"]
        structure += (None if out is None else tuple(n for n, p in out._parameters.items() if p is not None),)
    if is_transposed(module):
        structure += numbers_of(module)
    with _lock:
        for known in _traces.get(structure, ()):
            if known.fits(module):
                return known
        result = _make(module, structure)
        if structure not in _traces and len(_traces) >= _MAX_TRACES:
            _traces.pop(next(iter(_traces)))
        _traces.setdefault(structure, []).append(result)
        del _traces[structure][:-_MAX_VALUES]
        return result


def _make(module: nn.Module, structure: tuple[Any, ...]) -> Trace:
    if is_attention(module):
        return Trace(attention_graph(module), structure)
    if is_transposed(module):
        return Trace(transposed_graph(module), structure)
    reads: dict[Any, Read] = {}

    def traced(absent: Absent) -> fx.Graph:
        graphs = []
        for training in (False, True):
            graph, found = _run(module, training, absent)
            graphs.append(graph)
            reads.update(found)
        return _unify_modes(type(module).__name__, *graphs)

    graph = traced(frozenset())
    others = tuple(ways(module, graph, traced))
    values = tuple(reads.values())
    signature = (structure, frozenset((key, read.frozen) for key, read in reads.items()))
    for one in (graph, *(other for _, other in others if other is not None)):
        open_known(one)
    return Trace(graph, signature, values, others)


def _run(module: nn.Module, training: bool, absent: Absent) -> tuple[fx.Graph, dict[Any, Read]]:
    """The graph of one mode, and what the forward read."""
    name = type(module).__name__
    try:
        twin = protected(module)
    except Exception as error:
        raise CaptureError(
            f"{name} holds something that cannot be copied ({type(error).__name__}: {error}); "
            "remove it from the module's attributes before rewriting"
        ) from error
    twin.__dict__["training"] = training
    tracer = _OwnTracer()
    try:
        notes = Observation(module, twin, tracer)
        with Surroundings(twin) as around, _Factories(tracer):
            graph = tracer.trace(twin, dict.fromkeys(absent)) if absent else tracer.trace(twin)
    except CaptureError as error:
        raise CaptureError(f"the forward of {name} cannot be a graph: {error}") from error
    except Exception as error:
        raise CaptureError(f"torch.fx cannot trace the forward of {name}: {type(error).__name__}: {error}") from error
    if changed := notes.changed():
        made = [c for c in changed if "._tensor_constant" in c]
        around.refusals.append(
            "it uses a tensor that belongs to no module"
            if len(made) == len(changed)
            else f"it changes {listing([c for c in changed if c not in made], 4)}, which a graph would do never or once"
        )
    if around.refusals:
        raise CaptureError(f"the forward of {name} cannot be a graph: {'; '.join(around.refusals)}")
    return graph, {**{(None, *path): read for path, read in notes.reads.items()}, **around.reads}


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
