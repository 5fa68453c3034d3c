"""Every verb on a `torch.export.ExportedProgram`: it works on the program's module, and the result is exported again.

    ExportedProgram  ->  GraphModule  ->  verb  ->  GraphModule  ->  ExportedProgram

An adapted program holds the module it was exported from. Both have the same tensors, so training the program, or
swapping values, is seen in both; names, dynamic dimensions and example inputs stay. What `torch.export.save` writes is
the graph alone: an adapter of it is part of that graph, and no verb can tell it from the model any more.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .adapter_tensors import ADAPTERS, SHARED, Container
from .base_names import in_order
from .calls.forward_inputs import NAMES, first_tensor
from .errors import AdapterError, CaptureError

MODULE = "fxgraft_module"  # plain attribute of an adapted program: the module it was exported from
F = TypeVar("F", bound=Callable[..., Any])


def over_programs(verb: F) -> F:
    """Let a function of a model take programs too; a graph it returns is exported as the program was."""
    return _over(verb, changes=False)


def opening_on_programs(verb: F) -> F:
    """The same for a function that opens a trained adapter: on a plain program it is there to be served, as a graph
    tells no mode that it was exported in, and has none to change later."""
    return _over(verb, changes=False, serves=True)


def changing_programs(verb: F) -> F:
    """The same for a function that changes its model: the program becomes what its module is then."""
    return _over(verb, changes=True)


def _over(verb: F, changes: bool, serves: bool = False) -> F:
    signature = inspect.signature(verb)
    first = next(iter(signature.parameters))
    takes_example = "example_inputs" in signature.parameters

    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get(first)
        args, kwargs = tuple(map(_opened, args)), {key: _opened(value) for key, value in kwargs.items()}
        if not isinstance(model, ExportedProgram):
            return verb(*args, **kwargs)
        if takes_example and signature.bind(*args, **kwargs).arguments.get("example_inputs") is None:
            kwargs["example_inputs"] = _example_of(model)
        result = verb(*args, **kwargs)
        if serves and MODULE not in model.__dict__:
            for part in result.modules():
                part.training = False
        if changes:
            module = args[0] if args else kwargs[first]
            model.__dict__.update(exported_again(module, model).__dict__)
        return exported_again(result, model) if isinstance(result, fx.GraphModule) else result

    return cast(F, call)


def _opened(value: Any) -> Any:
    """Programs as their modules, those of a mapping too."""
    if isinstance(value, ExportedProgram):
        return module_of(value)
    if type(value) is dict and any(isinstance(v, ExportedProgram) for v in value.values()):
        return {key: _opened(v) for key, v in value.items()}
    return value


def _example_of(program: ExportedProgram) -> Any:
    args, kwargs = _inputs_of(program)
    if args and kwargs:
        placeholders = [str(name) for name in program.graph_signature.user_inputs]
        return {**dict(zip(placeholders, args, strict=False)), **kwargs}
    return dict(kwargs) if kwargs else tuple(args)


def _inputs_of(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if program.example_inputs is None:
        raise CaptureError("this ExportedProgram has no example inputs; make it again with torch.export.export")
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """The module that a program was adapted as, or else its own, in the order of the original model.

    Raises:
        AdapterError: the program has adapters in its graph and no record of them: it was saved and loaded, or run
            through other passes.
    """
    held = program.__dict__.get(MODULE)
    if held is not None:
        return held
    if any(part in (ADAPTERS, SHARED) for key in program.state_dict for part in key.split(".")):
        raise AdapterError(
            "this ExportedProgram has adapters of fxgraft in its graph and no record of them any more "
            "(torch.export.save and run_decompositions drop it): keep the base program, save adapters with "
            "fg.save_adapter, and open them with fg.load_adapter(program, folder)"
        )
    module = program.module(check_guards=False)
    in_order(module, [*program.state_dict, *program.constants])
    return module


def exported_again(module: nn.Module, like: ExportedProgram) -> ExportedProgram:
    """A module as a program with the inputs and dynamic dimensions of another; one with adapters keeps the module.

    Raises:
        CaptureError: the program carries no example inputs to be exported again with.
    """
    args, kwargs = _inputs_of(like)
    shapes = _dynamic_shapes(like, args, kwargs)
    for name in module.__dict__.get(NAMES, ()):  # a bank is told which sample takes which adapter
        first = first_tensor(args, kwargs, 0)
        kwargs = {**kwargs, name: torch.zeros(2 if first is None else first.shape[0], dtype=torch.int64)}
        shapes = (*(shapes or (None,) * (len(args) + len(kwargs) - 1)), {0: Dim.AUTO})
    called = _Called(module) if NAMES in module.__dict__ else module
    program = torch.export.export(called, args, kwargs, dynamic_shapes=shapes, strict=False)
    if any(isinstance(part, Container) for part in module.modules()):
        program.__dict__[MODULE] = module
    return program


class _Called(nn.Module):
    """A graph module under its own names for torch.export, which of a graph would run the graph and not the forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__.update({key: module.__dict__[key] for key in ("_parameters", "_buffers", "_modules", "training")})
        self.__dict__["_non_persistent_buffers_set"] = module._non_persistent_buffers_set

        def forward(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward


def _dynamic_shapes(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The dynamic dimensions of a program as a spec for exporting it again: a symbol becomes `Dim.AUTO`."""
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    specs = []
    for user_input in program.graph_signature.user_inputs:
        node = placeholders.get(str(user_input))
        value = node.meta.get("val") if node is not None else None
        shape = value.shape if isinstance(value, torch.Tensor) else ()
        dims = {i: Dim.AUTO for i, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        specs.append(dims or None)
    flat, tree = pytree.tree_flatten((args, dict(kwargs)))
    if len(flat) != len(specs):
        raise CaptureError(f"this ExportedProgram has {len(specs)} inputs but {len(flat)} example inputs")
    if not any(specs):
        return None
    positional, named = pytree.tree_unflatten(specs, tree)
    return (*positional, *named.values())
