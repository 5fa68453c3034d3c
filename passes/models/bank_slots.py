"""What a bank knows of itself: who sits in which slot, which calls use it, and what has been proved of its sites.

A call holds the slots it names until it ends, and a slot is written while nobody holds it: a call gets the tenant that
was there when it began, whole. Calls of other tenants go on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.calls.call_values import remembered
from ...rewriter.calls.forward_inputs import check_batch, first_tensor
from ...rewriter.errors import AdapterError, listing
from ...rewriter.method import ADAPTER_IDS
from ...rewriter.spec import Spec
from ...rewriter.state import record_of
from ...rewriter.tensors import adapter_modules
from .bank_rows import Layout, layouts, merge, rows_of

BANK = "bank"  # the adapter's name, and with an underscore the attribute that holds the record
_LEASES = "fxgraft_leases"  # attribute of a tensor of ids: slot -> the tenant it was made for


_NOTHING = nullcontext()


class _Holding(threading.local):
    """The slots that calls of this thread hold, one entry per call that goes on."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, frozenset[int]]] = []  # id of the record, slots


_holding = _Holding()


@dataclass
class BankRecord:
    """The record of a banked model; also the guard of its calls (`rewriter.inputs.Guard`).

    Args:
        slots: `K`, the base model's slot 0 included.
        spec: how a state without a config is read.
        batch_axis: the dimension of the model's inputs that the samples are along.
        tenants: name -> slot.
    """

    slots: int
    spec: Spec | None
    batch_axis: int = 0
    tenants: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = {slot: name for name, slot in self.tenants.items()}
        self._layouts: dict[str, Layout] = {}
        self._proved: set[Any] = set()  # kinds of calls
        self._reset()

    def _reset(self) -> None:
        self.writers = threading.RLock()  # tenants come and go one at a time
        self._proving = threading.RLock()
        self._changed = threading.Condition()
        self._pins = [0] * self.slots
        self._closed: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        left = ("writers", "_proving", "_changed", "_pins", "_closed")
        return {key: value for key, value in self.__dict__.items() if key not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # -- tenants -------------------------------------------------------------------------------------------------
    def free_slot(self) -> int | None:
        taken = set(self.tenants.values())
        return next((slot for slot in range(1, self.slots) if slot not in taken), None)

    def lease(self, name: str, slot: int) -> None:
        """The tenant sits in the slot from here on."""
        with self._changed:
            self.tenants[name], self._names[slot] = slot, name

    def release(self, name: str) -> int:
        """The tenant's slot, which ids that named the tenant no longer get."""
        with self._changed:
            slot = self.tenants.pop(name)
            del self._names[slot]
            return slot

    def ids(self, names: Sequence[str | None], device: torch.device) -> Tensor:
        """The slots of these tenants, on a tensor that remembers their names."""
        with self._changed:
            if unknown := [name for name in names if name is not None and name not in self.tenants]:
                raise AdapterError(f"no tenant {listing(unknown)} in this bank; it has {listing(self.tenants)}")
            slots = {name: self.tenants[name] for name in names if name is not None}
        ids = torch.tensor([0 if name is None else slots[name] for name in names], dtype=torch.int64, device=device)
        setattr(ids, _LEASES, {slot: name for name, slot in slots.items()})
        return ids

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """Wait until no call uses the slot, and let none begin that does."""
        if any(record == id(self) for record, _ in _holding.slots):
            raise AdapterError("tenants cannot come and go inside a call of the bank: it would wait for itself")
        with self._changed:
            self._closed.add(slot)
            self._changed.wait_for(lambda: not self._pins[slot])
        try:
            yield
        finally:
            with self._changed:
                self._closed.discard(slot)
                self._changed.notify_all()

    # -- calls ---------------------------------------------------------------------------------------------------
    @contextmanager
    def call(
        self, root: nn.Module, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        ids = given[ADAPTER_IDS]
        check_batch(given, args, kwargs, self.batch_axis)
        if ids is None or not ids.shape[0]:
            with remembered({ADAPTER_IDS: None}) if torch.is_grad_enabled() else _NOTHING:
                yield {}
            return
        if _has_no_values(ids):
            yield {ADAPTER_IDS: ids}
            return
        slots, leases = self._slots(ids), getattr(ids, _LEASES, {})
        first = first_tensor(args, kwargs, self.batch_axis)
        if first is not None and first.device != ids.device:
            ids = ids.to(first.device)
        if ids.shape[0] > 1:
            self.prove(root, ids.shape[0], args, kwargs)
        self._hold(slots, leases)
        try:
            with remembered({ADAPTER_IDS: ids}) if torch.is_grad_enabled() else _NOTHING:
                yield {ADAPTER_IDS: ids}
        finally:
            self._let_go(slots)

    def _slots(self, ids: Tensor) -> frozenset[int]:
        """The slots that ids name, without the base's."""
        slots = frozenset(ids.tolist())
        if wrong := [slot for slot in slots if not 0 <= slot < self.slots]:
            raise AdapterError(
                f"adapter_ids: there is no slot {listing(map(str, sorted(wrong)))}; slots go from 0 (no adapter) to "
                f"{self.slots - 1}: take them from fg.adapter_ids"
            )
        return slots - {0}

    def _hold(self, slots: frozenset[int], leases: Mapping[int, str]) -> None:
        """Keep the tenants of these slots where they are, once nobody is writing there."""
        with self._changed:
            if self._closed and not any(record == id(self) for record, _ in _holding.slots):
                # A call inside another does not wait: that one may hold what would be waited for.
                self._changed.wait_for(lambda: not self._closed & slots)
            for slot, name in leases.items():
                if self._names.get(slot) != name:
                    now = f"{self._names[slot]!r} sits there now" if slot in self._names else "nobody sits there now"
                    raise AdapterError(
                        f"adapter_ids: slot {slot} was tenant {name!r} when these ids were made, and {now}: take them "
                        "from fg.adapter_ids again"
                    )
            for slot in slots:
                self._pins[slot] += 1
        _holding.slots.append((id(self), slots))

    def _let_go(self, slots: frozenset[int]) -> None:
        _holding.slots.pop()
        with self._changed:
            for slot in slots:
                self._pins[slot] -= 1
            if self._closed:
                self._changed.notify_all()

    @contextmanager
    def generation(
        self, root: nn.Module, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Around `generate`: its calls get one version of their tenants, and so do the parts that it calls itself."""
        ids = given[ADAPTER_IDS]
        check_batch(given, args, kwargs, 0)
        slots = self._slots(ids)
        if getattr(getattr(root, "config", None), "is_encoder_decoder", False) and ids.shape[0] > 1:
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
            del tensors[ADAPTER_IDS]
            if (main := args[0] if args else tensors.pop("inputs", None)) is not None:
                tensors[str(root.main_input_name)] = main
            device = next(iter(tensors.values())).device
            tensors.setdefault("decoder_input_ids", torch.zeros(ids.shape[0], 2, dtype=torch.int64, device=device))
            self.prove(root, ids.shape[0], (), tensors)
        self._hold(slots, getattr(ids, _LEASES, {}))
        try:
            yield given
        finally:
            self._let_go(slots)

    def compiled(self, given: dict[str, Any]) -> dict[str, Any]:
        """Inside somebody else's graph the values of ids cannot be looked at: the graph does it."""
        ids = given[ADAPTER_IDS]
        if ids is not None:
            there = (ids >= 0) & (ids < self.slots)
            torch._assert_async(there.all(), f"adapter_ids: slots go from 0 (no adapter) to {self.slots - 1}")
            # Inductor of torch 2.11 drops the assertion: there, the stacks have no such slot
            return {**given, ADAPTER_IDS: torch.where(there, ids, self.slots)}
        return given

    # -- rows ----------------------------------------------------------------------------------------------------
    def prove(self, root: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out how the samples lie in every site's input, once for every kind of call.

        Raises:
            AdapterError: a site's rows do not belong to single samples.
        """
        kind = _kind(args, kwargs)
        if kind in self._proved:
            return
        with self._proving:
            if kind in self._proved:
                return
            stacks = [t for _, t in adapter_modules(root, BANK, record_of(root, BANK)) if t.site is not None]
            sites = [tensors.site for tensors in stacks if tensors.site is not None]
            found = layouts(root, sites, batch, args, kwargs, self.batch_axis)
            joined = {name: merge(name, self._layouts.get(name), layout) for name, layout in found.items()}
            self._layouts.update(joined)
            for tensors in stacks:
                if (layout := self._layouts.get(tensors.site.name)) is not None:  # type: ignore[union-attr]
                    tensors.rows = rows_of(layout)
            self._proved.add(kind)


def _has_no_values(ids: Tensor) -> bool:
    """Whether this call only records what to do: a fake tensor, or a CUDA graph that is replayed with other values."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What decides how a forward treats its inputs, as far as it can be seen: which there are, and of which
    dimensions."""
    return tuple(map(_kind_of, args)), tuple((name, _kind_of(kwargs[name])) for name in sorted(kwargs))


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(min(size, 2) for size in value.shape)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind_of, value))
    if isinstance(value, dict):
        return tuple((name, _kind_of(one)) for name, one in value.items())
    return type(value)
