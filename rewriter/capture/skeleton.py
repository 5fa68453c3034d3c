"""Copy a model's modules without copying its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_tensors import Container
from ..errors import CaptureError
from ..modules.offloaded import is_dispatched, loaded, release_moves, shared_stores
from ..modules.scripted import share_scripted
from ..modules.wrappers import M, strip_wrappers, unwrap
from ..quantised.quantised import quantised
from .source_writes import written

#: buffers up to this many bytes are copied without asking who writes them
SMALL = 64 * 1024


def _normal(tensor: Tensor) -> Tensor:
    """The same memory as a tensor autograd takes: one made in inference mode is refused by every backward."""
    if not tensor.is_inference() or type(tensor.data) is not Tensor:
        return tensor.detach()
    view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """A new, frozen parameter over the same storage: flags and `.data` of the original stay out of reach."""
    if type(parameter) is nn.Parameter or nn.Parameter not in type(parameter).__mro__:
        alias = nn.Parameter(_normal(parameter), requires_grad=False)
        alias.__dict__.update(parameter.__dict__)
        return alias
    # A subclass with state of its own (bitsandbytes' Params4bit): its own shallow copy knows what belongs to it.
    alias = copy.copy(parameter)
    if alias.is_floating_point():
        alias.requires_grad_(False)
    return alias


def _storage(tensor: Tensor) -> int | None:
    """Where a tensor's memory is; None for one without memory of its own (meta, a wrapper around others)."""
    if tensor.is_meta or type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()._cdata


def _shared_tensors(model: nn.Module, adapters: set[int]) -> list[Tensor]:
    """The buffers and plain tensors of a model that a copy may share: views of a weight, and large ones that no code of
    the model writes into (quantised weights, masks, tables). All others are copied, ties and views kept."""
    weights = {_storage(p) for m in model.modules() for p in m._parameters.values() if p is not None} - {None}
    shared, large = [], []
    for module in model.modules():
        if id(module) in adapters:
            continue
        for name, value in [*module._buffers.items(), *module.__dict__.items()]:
            if not isinstance(value, Tensor):
                continue
            storage = _storage(value)
            if storage in weights or value.grad_fn is not None:
                shared.append(value)
            elif (value.nbytes if storage is None else value.untyped_storage().nbytes()) > SMALL:
                large.append((name, value))
    if large:
        classes = {type(m) for m in model.modules()}
        names = written(classes, {name for name, _ in large})
        changing = {id(value) for name, value in large if name in names}
        shared += [value for _, value in large if id(value) not in changing]
    return shared


@torch.inference_mode(False)
def copy_skeleton(model: M) -> M:
    """A copy of every module; parameters become frozen aliases over the same storage, ties are kept.

    Tensors of adapters are copied: training one in the copy must not train it in the original. Buffers are copied too,
    so that running the copy changes nothing in the original, except large ones that no code of the model writes into.
    Everything else an attribute holds is deep-copied.
    """
    memo: dict[int, Any] = {}
    keep: list[Tensor] = []  # deepcopy's memo is keyed by id: the keys must stay alive
    adapters = {id(m) for c in model.modules() if isinstance(c, Container) for m in c.modules()}
    for module in model.modules():
        if id(module) in adapters:
            for name in module._non_persistent_buffers_set:  # derived: never written, so shared
                memo[id(module._buffers[name])] = module._buffers[name]
            continue
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _alias(parameter)
                keep.append(parameter)
    stores = shared_stores(model)
    memo.update({id(store): store for store in stores})
    for tensor in _shared_tensors(model, adapters):
        memo[id(tensor)] = _normal(tensor) if tensor.is_inference() else tensor
        keep.append(tensor)
    for module in model.modules():
        if (kind := quantised(module)) is not None:
            kind.share(module, memo)
    try:
        result = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} holds something that cannot be copied ({type(error).__name__}: {error}); "
            "remove it from the model's attributes before rewriting"
        ) from error
    share_scripted(model, result)
    if stores:
        release_moves(result)
    return result


def bare(model: nn.Module) -> nn.Module:
    """What an exporter captures: the model inside its wrappers; where children are wrapped, or offloaded by accelerate,
    a copy without."""
    model = unwrap(model)
    dispatched = is_dispatched(model)
    if not dispatched and all(unwrap(module) is module for module in model.modules()):
        return model
    twin = strip_wrappers(copy_skeleton(model))
    return loaded(twin) if dispatched else twin
