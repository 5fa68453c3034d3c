"""What goes into and out of a model, by name: example inputs, dynamic axes, and other sizes for them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...rewriter.errors import ExportError, listing

Axes = dict[str, dict[int, str]]
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Example:
    """Example inputs, all by parameter name: `tensors` become inputs of the graph, `constants` are baked into it.

    `extra` are the names that `forward` takes through its `**catch_all`. An argument that is a dict is in `nested` as
    {argument: {key: name}}, and its values are among the tensors and constants. `ones` are masks that hide nothing,
    in random inputs too.
    """

    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any]
    catch_all: str = ""
    extra: tuple[str, ...] = ()
    nested: dict[str, dict[str, str]] = field(default_factory=dict)
    ones: tuple[str, ...] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.tensors, **self.constants}

    def shapes(self, dims: Mapping[str, Any]) -> dict[str, Any]:
        """`dims` ({input: dynamic dimensions}) as `torch.export` takes it: every argument, the extra ones nested."""
        flat = {name: dims.get(name) for name in self.kwargs}
        nested = {name: flat.pop(name) for name in self.extra}
        return {**flat, self.catch_all: nested} if nested else flat


def bind(model: torch.nn.Module, example_inputs: Any, dicts: bool = False) -> Example:
    """Name every example input after the parameter of `model.forward` that takes it.

    `example_inputs` is a tuple (or list) of positional arguments or a mapping of keyword arguments; the values are
    tensors, or constants (None, bool, int, float, str), and with `dicts` also dicts of these, whose entries are then
    inputs under their keys. Raises `ExportError` for anything else.
    """
    signature = inspect.signature(model.forward)
    if isinstance(example_inputs, Mapping):
        given, args = dict(example_inputs), ()
    elif isinstance(example_inputs, (tuple, list)):
        given, args = {}, tuple(example_inputs)
    else:
        raise ExportError(
            f"example_inputs is a {type(example_inputs).__name__}; give a tuple of positional arguments, as in (x,), "
            "or a dict of keyword arguments"
        )
    try:
        bound = signature.bind(*args, **given)
    except TypeError as error:
        raise ExportError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from None
    named: dict[str, Any] = {}
    catch_all, extra = "", ()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
            catch_all, extra = name, tuple(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise ExportError(f"{type(model).__name__}.forward takes *{name}: inputs without a name cannot be exported")
        else:
            named[name] = value
    nested = {}
    if dicts:
        for name in [name for name, value in named.items() if isinstance(value, Mapping)]:
            entries = named.pop(name)
            keys = {key: str(key) if str(key) not in named else f"{name}.{key}" for key in entries}
            if not all(isinstance(key, str) for key in entries) or set(keys.values()) & set(named):
                raise ExportError(
                    f"example input {name!r} is a dict with the keys {listing(map(str, entries))}: give "
                    "strings that no other input is called by"
                )
            nested[name] = keys
            named.update({keys[key]: value for key, value in entries.items()})
    for name, value in named.items():
        if not isinstance(value, (torch.Tensor, *_CONSTANTS)):
            raise ExportError(
                f"example input {name!r} is a {type(value).__name__}; inputs are torch tensors, and None, bool, int, "
                "float or str for arguments that become constants of the graph"
            )
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ExportError("example_inputs hold no tensor, so the graph would have no input")
    constants = {name: value for name, value in named.items() if name not in tensors}
    # A decoder returns its KV cache unless told otherwise; a cache is no tensor and needs an export of its own.
    caches = getattr(getattr(model, "config", None), "use_cache", None)
    if caches and "use_cache" not in named and "use_cache" in signature.parameters:
        constants["use_cache"] = False
    return Example(tensors, constants, catch_all, extra, nested)


def arguments(values: Mapping[str, Any], nested: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Keyword arguments for a model from tensors and constants by name; every tensor a copy, so that a model that
    writes into its inputs leaves them as they were."""
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    dicts = {name: {key: given.pop(flat) for key, flat in keys.items()} for name, keys in nested.items()}
    return {**given, **dicts}


def automatic_axes(example: Example) -> Axes:
    """Dynamic axes for `dynamic_shapes=None`.

    Axis 0 of every input is "batch" where it has the batch size (that of the first input). Axis 1 of integer and
    boolean inputs, and of inputs called `*mask*` or `*embeds*`, is a sequence; `decoder_*` inputs and inputs of another
    length get a sequence axis of their own. Sequences of length 1 stay fixed.
    """
    tensors = {name: tensor for name, tensor in example.tensors.items() if tensor.dim()}
    if not tensors:
        return {}
    batch = next(iter(tensors.values())).shape[0]
    lengths: dict[str, int] = {}
    axes: Axes = {}
    for name, tensor in tensors.items():
        axes[name] = {0: "batch"} if tensor.shape[0] == batch else {}
        sequential = not tensor.is_floating_point() or "mask" in name or "embeds" in name
        if tensor.dim() < 2 or not sequential or tensor.shape[1] == 1:
            continue
        length = tensor.shape[1]
        symbol = "decoder_sequence" if name.startswith("decoder_") else "sequence"
        if lengths.setdefault(symbol, length) != length:
            symbol = f"{name}_sequence"
            lengths[symbol] = length
        axes[name][1] = symbol
    for name, tensor in tensors.items():
        # Position vectors of shape (sequence,) have no batch.
        if tensor.dim() == 1 and not axes[name] and tensor.shape[0] == lengths.get("sequence"):
            axes[name][0] = "sequence"
    return {name: named for name, named in axes.items() if named}


def given_axes(example: Example, dynamic_shapes: Any) -> tuple[Axes, dict[str, Any]]:
    """`dynamic_shapes` as axis names, and in the form `torch.export` takes.

    Accepts a mapping of input name, or a sequence in the order of the inputs, to {axis: name | torch.export.Dim},
    a sequence with one entry per axis, or None. A name stands for a dimension of any size; a `Dim` keeps its bounds.
    Raises `ExportError` for unknown inputs, axes out of range and other values.
    """
    if isinstance(dynamic_shapes, Sequence) and not isinstance(dynamic_shapes, str):
        if len(dynamic_shapes) != len(example.tensors):
            raise ExportError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(example.tensors)} inputs "
                f"({listing(example.tensors)})"
            )
        dynamic_shapes = dict(zip(example.tensors, dynamic_shapes, strict=True))
    if not isinstance(dynamic_shapes, Mapping):
        raise ExportError("dynamic_shapes is a dict like {'input_ids': {0: 'batch', 1: 'sequence'}}, or None")
    axes: Axes = {}
    for name, shape in dynamic_shapes.items():
        if name not in example.tensors:
            raise ExportError(f"dynamic_shapes names {name!r}; the inputs are {listing(example.tensors)}")
        if shape is None:
            continue
        entries = shape.items() if isinstance(shape, Mapping) else enumerate(shape)
        for axis, dim in entries:
            rank = example.tensors[name].dim()
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise ExportError(f"dynamic_shapes[{name!r}] has axis {axis!r}, but the input has {rank} dimensions")
            if dim is None or isinstance(dim, int):
                continue
            axis %= rank
            label = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
            if isinstance(dim, type(torch.export.Dim.AUTO)):
                label = f"{name}_axis_{axis}"
            if not isinstance(label, str) or not label:
                raise ExportError(
                    f"dynamic_shapes[{name!r}][{axis}] is {dim!r}; give a name such as 'batch' or a torch.export.Dim"
                )
            axes.setdefault(name, {})[axis] = label
    dims: dict[str, Any] = {}
    for name, labels in axes.items():
        shape, rank = dynamic_shapes[name], example.tensors[name].dim()
        given = {axis % rank: dim for axis, dim in (shape.items() if isinstance(shape, Mapping) else enumerate(shape))}
        dims[name] = {
            axis: torch.export.Dim.DYNAMIC if isinstance(given[axis], str) else given[axis] for axis in labels
        }
    return axes, dims


def check_sizes(example: Example, axes: Axes) -> None:
    """Raise `ExportError` where a dynamic axis has size 0 or 1 in the example: torch would silently fix it there."""
    for name, named in axes.items():
        for axis, symbol in named.items():
            size = example.tensors[name].shape[axis]
            if size < 2:
                raise ExportError(
                    f"example input {name!r} has size {size} in dynamic axis {axis} ({symbol!r}). torch would "
                    "silently fix the axis to that size: give an example of at least 2 there, or name the dynamic axes "
                    "yourself with dynamic_shapes (dynamic_shapes={} fixes every axis)"
                )


def symbols(
    graph: torch.fx.Graph, axes: Mapping[str, Mapping[int, str]]
) -> tuple[dict[str, str], list[tuple[str, int, str, int]]]:
    """`{torch's symbol: axis name}`, and the (input, axis, name, size) that torch fixed although they were named."""
    named: dict[str, str] = {}
    fixed: list[tuple[str, int, str, int]] = []
    values = {node.name: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
    for name, wanted in axes.items():
        if name not in values:
            raise ExportError(f"torch.export renamed input {name!r}; the graph has {sorted(values)}")
        for axis, label in wanted.items():
            size = values[name].shape[axis]
            # A specialised size may still be a symbolic integer, with a number for an expression.
            if isinstance(size, int) or size.node.expr.is_number:
                fixed.append((name, axis, label, int(size)))
            else:
                named.setdefault(str(size.node.expr), label)
    return named, fixed


def other_sizes(example: Example, axes: Axes) -> list[dict[str, int]]:
    """Two more choices of sizes for the named axes: a single sample, and a bigger batch; never a longer sequence.

    Longer sequences may be outside the model (a table of positions ends somewhere), shorter ones never are.
    """
    sizes = with_parts(
        {symbol: example.tensors[name].shape[axis] for name, named in axes.items() for axis, symbol in named.items()}
    )
    if not sizes:
        return []
    single, bigger = {}, {}
    for symbol, size in sizes.items():
        if "batch" in symbol:
            single[symbol], bigger[symbol] = 1, size + 1
        else:
            single[symbol], bigger[symbol] = (size - 1, size // 2 + 1) if size > 2 else (size, size)
    if "past" in sizes:  # a cache begins empty, and grows by one token at a time
        single["past"], bigger["sequence"] = 0, 1
    return [add_up(single), add_up(bigger)]


def add_up(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, those named as a sum (`past + sequence`) or as the smaller of two (`min(past, 7)`) made what they
    say; numbers stand for themselves."""
    return {symbol: _size_of(symbol, sizes) for symbol in sizes}


def with_parts(sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, with the first part of a sum that is an axis of no input: what the sum leaves of it."""
    found = dict(sizes)
    for symbol, size in sizes.items():
        first, *others = symbol.split(" + ")
        if others and first not in sizes:
            found[first] = size - sum(_size_of(other, sizes) for other in others)
    return found


def _size_of(symbol: str, sizes: Mapping[str, int]) -> int:
    if symbol.startswith("min("):
        return min(_size_of(part, sizes) for part in symbol[4:-1].split(", "))
    if " + " in symbol:
        return sum(_size_of(part, sizes) for part in symbol.split(" + "))
    return int(symbol) if symbol.isdigit() else sizes[symbol]


def named_tensors(output: Any, prefix: str = "", dropped: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a model's output, in order, under their names.

    Fields of a mapping (model-output dataclasses are mappings) keep their names, a nested one is joined with a dot, the
    entries of a tuple are `output_0`, `output_1`, ..., and a single tensor is `output`. Where `dropped` is given, plain
    dataclasses are taken too, and numbers and texts go into it by name. Raises `ExportError` for leaves that are
    something else (a KV cache, for example).
    """
    if isinstance(output, torch.Tensor):
        return {prefix or "output": output}
    if output is None:
        return {}
    if isinstance(output, Mapping):
        entries = [(str(key), value) for key, value in output.items()]
    elif dropped is not None and dataclasses.is_dataclass(output) and not isinstance(output, type):
        entries = [(one.name, getattr(output, one.name)) for one in dataclasses.fields(output)]
    elif isinstance(output, (tuple, list)):
        entries = [(str(index), value) for index, value in enumerate(output)]
        if not prefix:
            entries = [(f"output_{key}", value) for key, value in entries]
    elif dropped is not None and isinstance(output, (*_CONSTANTS, torch.SymInt, torch.SymFloat, torch.SymBool)):
        dropped[prefix or "output"] = output
        return {}
    else:
        kind = type(output).__name__
        hint = (
            ". Pass use_cache=False, or export a decoder with cache=True: keys and values are inputs and outputs then"
            if kind.endswith("Cache")
            else ""
        )
        raise ExportError(
            f"the model's output {prefix or 'itself'} is a {kind}; a graph gives tensors, in tuples, "
            f"lists, mappings and dataclasses{hint}"
        )
    found: dict[str, torch.Tensor] = {}
    for key, value in entries:
        for name, tensor in named_tensors(value, f"{prefix}.{key}" if prefix else key, dropped).items():
            found[free_name(name, found)] = tensor
    return found


def free_name(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is taken."""
    if name not in taken:
        return name
    return next(f"{name}_{count}" for count in itertools.count(2) if f"{name}_{count}" not in taken)
