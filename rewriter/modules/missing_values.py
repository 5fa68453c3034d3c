"""Adapter tensors that have no values yet: made on the meta device, or emptied by `to_empty()`.

    tensors.A      ->   AdapterError("... fg.materialise(model) ...")       until somebody writes A

What is missing is remembered beside the tensor it is missing in: loading writes that tensor or replaces it, and both
show. So a call meets an error or right values, never whatever the memory held.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError

_MISSING = "fxgraft_missing"  # plain attribute: name -> (the tensor without values, its version then)
_probes = itertools.count()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}


def missing(module: nn.Module) -> list[str]:
    """Names of the tensors that still have no values."""
    held = _held(module)
    noted = module.__dict__.get(_MISSING, {})
    return [
        name
        for name, (tensor, version) in noted.items()
        if name in held and (held[name].is_meta or (held[name] is tensor and _version(tensor) == version))
    ]


def note(module: nn.Module, names: Iterable[str]) -> None:
    """Say that these tensors have no values; reading one raises from now on."""
    held = _held(module)
    module.__dict__[_MISSING] = {name: (held[name], _version(held[name])) for name in names}
    settle(module)


def restore(module: nn.Module) -> None:
    """After copying: the names say what is missing, as a copy counts its versions anew."""
    note(module, list(module.__dict__.get(_MISSING, ())))


def settle(module: nn.Module) -> None:
    """Let reads raise for what is missing, and for nothing else."""
    base = _base(module)
    names = tuple(missing(module))
    if names:
        module.__class__ = _class(base, names)  # type: ignore[arg-type]
    else:
        module.__dict__.pop(_MISSING, None)
        module.__class__ = base


def _base(module: nn.Module) -> type[nn.Module]:
    return next(cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, _Pending))


class _Pending(nn.Module):
    """Mixin of the classes of modules with missing tensors."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = _base(self)
        return (base.__new__, (base,), {**self.__dict__, _MISSING: missing(self)})

    def __setattr__(self, name: str, value: Any) -> None:
        for slots in (self.__dict__["_parameters"], self.__dict__["_buffers"]):
            if name in slots:
                slots[name] = value
                return
        super().__setattr__(name, value)


@functools.lru_cache(maxsize=256)
def _class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reader(name: str) -> property:
        def read(self: Any) -> Tensor:
            if name in missing(self):
                site = getattr(self, "site", None)
                raise AdapterError(
                    f"tensor {name!r} of the adapter{f' at {site.name!r}' if site is not None else ''} has no values "
                    "yet: the model was made on the meta device or emptied. Load the base weights, then the adapter "
                    "(load_state_dict, fg.swap), and call fg.materialise(model): it derives and initialises the rest"
                )
            return _held(self)[name]

        return property(read)

    return type(base.__name__, (_Pending, base), {"__module__": base.__module__, **{n: reader(n) for n in names}})


def keeps_values(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether what `nn.Module._apply` does to tensors keeps what is in them: `.to()` does, `to_empty()` does not."""
    seed = next(_probes)
    probe = torch.tensor([float((seed * 37 + i * i * 11) % 1999 + 1) for i in range(8)])
    try:
        result = function(probe.clone())
    except Exception:
        return True  # it knows the module's own tensors only
    return isinstance(result, Tensor) and not result.is_meta and bool((result.cpu().double() - probe).abs().max() <= 8)


def apply(module: nn.Module, function: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> Any:
    """`nn.Module._apply` for a module whose tensors must not be lost without a word: `run` does the work.

    Indices stay whole numbers (`.type(float16)` would take them along).
    """
    before = missing(module)
    whole = {n: b.dtype for n, b in module._buffers.items() if b is not None and not b.is_floating_point()}
    result = run()
    for name, dtype in whole.items():
        if (buffer := module._buffers[name]) is not None and buffer.dtype != dtype:
            module._buffers[name] = buffer.to(dtype)
    if gone := before if keeps_values(function) else list(_held(module)):
        note(module, gone)
    return result
