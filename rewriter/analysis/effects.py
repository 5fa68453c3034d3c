"""What a node of a graph does besides giving its result: what it writes and what its result shares memory with.

Read off schemas and signatures. Where nothing is known, a node may write all it is given, its result may be any of
that, and nothing moves across it. `fx` itself takes every method call for harmless, `scatter_` and `copy_` too.
"""

from __future__ import annotations

import functools
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._functorch import predispatch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from ..dialect import traits_of


@dataclass(frozen=True)
class Effect:
    """What a node does.

    Args:
        writes: nodes whose memory it may change.
        shares: nodes whose memory its result may lie in.
        pure: it may go when nobody reads it, and of two equal ones one will do.
        fixed: nothing may move across it: it is not known at all.
    """

    writes: tuple[fx.Node, ...] = ()
    shares: tuple[fx.Node, ...] = ()
    pure: bool = False
    fixed: bool = False


# -- what is known of torch ------------------------------------------------------------------------------------------
_TWO = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "xor")
_WRITERS = {getattr(operator, f"i{name}") for name in (*_TWO, "and", "or")} | {operator.setitem, operator.delitem}
_ONE = ("neg", "invert", "abs", "eq", "ne", "lt", "le", "gt", "ge", "not_", "is_", "is_not", "and_", "or_")
_ARITHMETIC = {getattr(operator, name) for name in (*_TWO, *_ONE)}
_READERS = {operator.getitem, operator.pos, operator.index, getattr, slice, tuple, list, min, max, sum, len, int, float,
            bool, abs, round, isinstance, torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not,
            torch.sym_ite, torch.sym_sum, torch.is_tensor, torch.is_floating_point, torch.is_complex}  # fmt: skip
_CHECKS = {torch._assert, torch._assert_async, torch._check, torch._check_value, torch._check_index,
           torch._check_with, torch._check_type, torch._check_is_size}  # fmt: skip
_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous", "type", "to",
            "storage_offset", "get_device", "float", "double", "half", "bfloat16", "int", "long", "short", "byte",
            "char", "bool", "cpu", "cuda", "unflatten", "split", "new_tensor", "tolist", "item", "__len__"}  # fmt: skip
#: change what a tensor is, not only its values
_UNKNOWN = {"set_", "resize_", "resize_as_", "requires_grad_", "detach_", "swap_", "apply_", "map_", "map2_"}
#: composites whose result is new memory; of others the schema does not say that they may hand back what they got
_FRESH = {"linear", "matmul", "scaled_dot_product_attention", "layer_norm", "rms_norm", "group_norm", "conv1d", "where",
          "conv2d", "conv3d", "bilinear", "inner", "outer", "cross_entropy_loss", "one_hot", "square", "std", "var",
          "hstack", "vstack", "concat", "concatenate", "column_stack"}  # fmt: skip
#: say how what stands behind them is computed: autocast, gradients, the transforms of `torch.func`
_SWITCHES = {_enter_autocast, _exit_autocast, torch._C._set_grad_enabled}
_NOTHING = {torch._C._log_api_usage_once, getattr(predispatch, "lazy_load_decompositions", None)}
_BATCH = {f for name, f in vars(predispatch).items() if name in ("_add_batch_dim", "_remove_batch_dim")}
_MODULES = {"torch", "torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special", "torch.functional"}
_FUNCTIONAL = {f for f in vars(F).values() if inspect.isfunction(f)}
#: higher-order operators that do what the graphs they are given do
_WRAPPERS = {"tag_activation_checkpoint", "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "flex_attention",
             "cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph"}  # fmt: skip


#: methods of Python for operators of the dispatcher: Dynamo of torch 2.11 leaves them in its graphs
_COMPARISONS = {f"__{name}__": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@functools.lru_cache(maxsize=4096)
def _overloads(name: str) -> tuple[torch._ops.OpOverload, ...]:
    """What the dispatcher knows of an ATen name; TorchScript's own operators on lists and numbers left out."""
    packet = getattr(torch.ops.aten, _COMPARISONS.get(name, name), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):  # nothing, or an attribute of Python's own
        return ()
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return tuple(op for op in found if torch._C._dispatch_has_kernel(op.name()))


@dataclass(frozen=True)
class _Facts:
    """Of all overloads that a call may mean: written and shared arguments (index, name), and the flags."""

    writes: tuple[tuple[int, str], ...]
    shares: tuple[tuple[int, str], ...] | None  # None: any
    pure: bool


@functools.lru_cache(maxsize=4096)
def _facts(overloads: tuple[torch._ops.OpOverload, ...]) -> _Facts:
    writes: set[tuple[int, str]] = set()
    shares: set[tuple[int, str]] = set()
    honest, pure = True, True
    for op in overloads:
        schema, annotated = op._schema, False
        for index, argument in enumerate(schema.arguments):
            if argument.name in ("running_mean", "running_var"):
                writes.add((index, argument.name))  # written in training, which the schema does not say
            if argument.alias_info is not None:
                annotated = True
                (writes if argument.alias_info.is_write else shares).add((index, argument.name))
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
            honest = honest and (annotated or schema.name.split("::")[1] in _FRESH)
        random = torch.Tag.nondeterministic_seeded in op.tags
        gives = any("Tensor" in str(result.type) for result in schema.returns)
        pure = pure and gives and not random and op.namespace in ("aten", "prims") and not schema.is_mutable
    return _Facts(tuple(writes), tuple(shares | writes) if honest else None, pure)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda node: found.append(node))
    return found


def _by_schema(node: fx.Node, overloads: tuple[torch._ops.OpOverload, ...]) -> Effect:
    """The effect of a call that means one of these overloads; those with `out=` count only where it is given."""

    def fits(op: torch._ops.OpOverload) -> bool:
        needed = [a.name for a in op._schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]
        return all(name in node.kwargs for name in needed) or "out" in node.kwargs

    facts = _facts(tuple(op for op in overloads if fits(op)))

    def given(places: tuple[tuple[int, str], ...]) -> tuple[fx.Node, ...]:
        values = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in places]
        return tuple(_nodes([*values, node.kwargs.get("out")]))

    shares = tuple(node.all_input_nodes) if facts.shares is None else given(facts.shares)
    return Effect(given(facts.writes), shares, facts.pure and "out" not in node.kwargs)


def _by_signature(node: fx.Node) -> Effect:
    """The effect of a Python function of `torch.nn.functional`: its arguments say what it writes."""
    inputs = tuple(node.all_input_nodes)
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Effect(inputs, inputs, fixed=True)
    written = [given.get(name) for name in ("running_mean", "running_var", "out")]
    if given.get("inplace"):
        written.append(next(iter(given.values())))
    if given.get("max_norm") is not None:
        written.append(given.get("weight"))
    return Effect(tuple(_nodes(written)), inputs)


def _of_subgraphs(node: fx.Node) -> Effect:
    """The effect of a higher-order operator: none, if the graphs it calls have none."""
    inputs = tuple(node.all_input_nodes)
    unknown = Effect(inputs, inputs, fixed=True)
    if getattr(node.target, "_name", getattr(node.target, "__name__", "")) not in _WRAPPERS:
        return unknown
    for part in inputs:
        body = attribute(part) if part.op == "get_attr" else None
        if isinstance(body, fx.GraphModule) and any(
            effect(inner).writes or effect(inner).fixed for inner in body.graph.nodes
        ):
            return unknown
    return Effect(shares=inputs)


def effect(node: fx.Node) -> Effect:
    """What one node does."""
    inputs = tuple(node.all_input_nodes)
    unknown = Effect(inputs, inputs, fixed=True)
    target: Any = node.target
    if node.op in ("placeholder", "get_attr"):
        return Effect(pure=node.op == "get_attr")
    if node.op == "output":
        return Effect(shares=inputs)
    if node.op == "call_method":
        overloads = () if target in _UNKNOWN else _overloads(target)
        if target in _METHODS or overloads:
            return _by_schema(node, overloads) if overloads else Effect(shares=inputs)
        return unknown
    if node.op != "call_function":
        return unknown
    if isinstance(target, torch._ops.OpOverload) and not traits_of(target).fresh:
        name = target._schema.name.split("::")[1]
        nothing = not target._schema.returns and not target._schema.is_mutable and target.namespace != "aten"
        return unknown if name in _UNKNOWN or nothing else _by_schema(node, (target,))
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = tuple(getattr(target, name) for name in target.overloads())
        return _by_schema(node, tuple(op for op in overloads if torch._C._dispatch_has_kernel(op.name())))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _of_subgraphs(node)
    try:
        return _of_function(node, target, inputs)
    except TypeError:  # a target that cannot be hashed
        return unknown


def _of_function(node: fx.Node, target: Any, inputs: tuple[fx.Node, ...]) -> Effect:
    declared = traits_of(target)
    if declared.fresh or declared.factor:
        return Effect(shares=() if declared.fresh else inputs, pure=True)
    if target in _WRITERS:
        first = tuple(_nodes(node.args[:1]))
        return Effect(first, first)
    if target in _ARITHMETIC:  # lists are added too
        return Effect(shares=() if value(node) is not None else inputs, pure=True)
    if target in _CHECKS or target in _NOTHING or switches(node):
        return Effect()
    if target is torch.tensor:
        return Effect(shares=inputs)
    if target in _READERS or target in _BATCH or getattr(target, "__module__", None) == "math":
        return Effect(shares=inputs, pure=target is operator.getitem)
    if target in _FUNCTIONAL:
        return _by_signature(node)
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) in _MODULES and name not in _UNKNOWN and (overloads := _overloads(name)):
        return _by_schema(node, overloads)
    return Effect(inputs, inputs, fixed=True)


def switches(node: fx.Node) -> bool:
    """Whether a node says how what stands behind it is computed."""
    return node.op == "call_function" and (
        node.target in _SWITCHES or getattr(node.target, "__name__", "").endswith("crement_nesting")
    )


# -- values ----------------------------------------------------------------------------------------------------------
def attribute(node: fx.Node) -> Any:
    """What a `get_attr` node reads."""
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def value(node: object) -> Tensor | None:
    """What a compiler recorded of a node's result: its shape, dtype and device."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    if found is None and node.op == "get_attr":
        found = attribute(node)
    return found if isinstance(found, Tensor) else None
