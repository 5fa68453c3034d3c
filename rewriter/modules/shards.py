"""Tensors that are spread over processes: FSDP2's and tensor parallelism's `DTensor`.

Whoever reads such a tensor as a whole takes part in a collective: every process has to come here, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor only."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process; the tensor itself where it is whole already."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put(slot: Tensor, value: Tensor) -> None:
    """Copy a whole value, the same on every process, into a slot: into its own part, where that is sharded."""
    if is_sharded(slot):
        from torch.distributed.tensor import distribute_tensor

        mesh: Any = slot.device_mesh  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(slot.device), mesh, slot.placements, src_data_rank=None)  # type: ignore[attr-defined]
    slot.copy_(value)


def on_first(tensors: Iterable[Tensor], write: Callable[[], None]) -> None:
    """Call `write` here; of a sharded adapter, which all processes have come to save, in the first process only.

    All of them return when it is done, or raise what it raised: a process waits for no one who has failed.
    """
    if not any(map(is_sharded, tensors)):
        write()
        return
    import torch.distributed as dist

    failure: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # raised below, once the others know
            failure[0] = error
    told = [None if failure[0] is None else (type(failure[0]), str(failure[0]))]
    dist.broadcast_object_list(told, src=0)
    if failure[0] is not None:
        raise failure[0]
    if told[0] is not None:
        kind, text = told[0]
        raise kind(text)


def _sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 manages."""
    kinds = {type(m) for m in model.modules()}  # asked of the class: a module's own lookup is slow where nothing is
    managed = {k for k in kinds if hasattr(k, "unshard") and hasattr(k, "set_requires_gradient_sync")}
    return [m for m in model.modules() if type(m) in managed] if managed else []


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its parameters back: a forward leaves the root's gathered, and what is written there is lost."""
    for module in _sharded_modules(model):
        module.reshard()


def check_unsharded(model: nn.Module) -> None:
    """Raise for a model that FSDP2 has sharded: it would neither shard nor reduce what is grafted afterwards."""
    if _sharded_modules(model):
        raise AdapterError(
            f"this {type(model).__name__} was sharded by fully_shard, which would not know of a new adapter's tensors: "
            "rewrite or load the adapter first, on every process, and shard the adapted model. fg.swap(model, folder) "
            "gives an adapter that is there other values"
        )
