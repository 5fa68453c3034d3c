"""The slots of a graph with a bank: which tenant sits where, and the stacked tensors a run is fed.

What the graph looks like (`export_onnx(adapters="bank")`): an input `adapter_ids (batch,)` int64 with the slot of every
sample, slot 0 being the base model; and stacks, overridable initializers whose first dimension is free, the K slots. A
stack `<name>` takes the adapter tensor of that name, padded with zeros: `<site>.A (K, in, R)`, `<site>.B (K, R, out)`,
of free rank. A stack `<name>.delta` takes the difference of the adapter's `<name>` to the graph's initializer of that
name. The file holds the tenants it was exported with; the manifest says how many (`capacity`) and how large (`rank`) a
session makes room for.

The session owns a copy of the stacks and writes tenants into it while others run: a slot is written only when no run
that goes on uses it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...rewriter.errors import AdapterError, listing
from ...rewriter.forms import RANK, SLOTS, put_entry
from ..adapterfiles.adapter_inputs import axis_of, tensor_of
from ..adapterfiles.ort_values import Device, TensorInfo, to_ort
from .adapter_cache import AdapterCache, LoadedAdapter

BAKED = 0  # serial of a tenant that came with the graph
Key = tuple[str, int]  # a tenant's name, and which of the adapters that had the name


@dataclass
class _Slot:
    number: int
    pins: int = 0  # runs that go on with it; one more for a tenant of the graph itself, which no file brings back
    used: bool = False  # somebody was told that a tenant sits here


@dataclass
class Bank:
    """Slots 1 to K - 1, an LRU of tenants over them, and the stacks. Safe to share between threads.

    Args:
        stacks: input name -> `(K, ...)` on the CPU, written in place.
        cache: where a tenant's tensors come from, on the CPU.
        device: of the session.
        baked: tenants that came with the graph, and their slots. They stay until they are unloaded or replaced.
        bases: what the differences are taken to, by adapter tensor.
    """

    stacks: dict[str, torch.Tensor]
    cache: AdapterCache
    device: Device
    baked: Mapping[str, int] = field(default_factory=dict)
    bases: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = next(iter(self.stacks.values())).shape[0]
        self.fills = self.evictions = self._moved = 0
        self._changed = threading.Condition()
        # Least recently used first; a slot without a tenant has no name that anybody can ask for.
        self._held: OrderedDict[Key, _Slot] = OrderedDict()
        taken = set(self.baked.values())
        self._free = [_Slot(number) for number in range(1, self.slots) if number not in taken]
        for name, number in self.baked.items():
            self._held[name, BAKED] = _Slot(number, pins=1, used=True)
        self._values = {key: to_ort(stack, self.device) for key, stack in self.stacks.items()}

    @property
    def capacity(self) -> int:
        return self.slots - 1

    def tenants(self) -> dict[str, int]:
        """The tenants that sit in a slot now, and the slot."""
        with self._changed:
            return {name: slot.number for (name, _), slot in self._held.items()}

    @contextmanager
    def batch(self, ids: Sequence[str | int | None] | np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Slot numbers `(len(ids),)` int64 and the stacks for a run; the slots keep their tenants inside the block."""
        names = list(dict.fromkeys(entry for entry in ids if isinstance(entry, str)))
        numbers = self._checked_numbers(ids)
        held = self._hold(names, numbers)
        try:
            slots = {entry: slot.number for entry, slot in held.items()}
            yield np.array([0 if entry is None else slots.get(entry, 0) for entry in ids], np.int64), self._values
        finally:
            with self._changed:
                for slot in held.values():
                    slot.pins -= 1
                self._changed.notify_all()

    def check_room_for(self, name: str) -> None:
        """Raise `AdapterError` where the graph's own tenants leave no slot for one of this name."""
        with self._changed:
            own = [held for held, serial in self._held if serial == BAKED and held != name]
        if len(own) >= self.capacity:
            raise AdapterError(
                f"no slot for {name!r}: the graph has {self.capacity}, and its own {listing(own)} keep them. Unload "
                "one, or give OrtSession a larger capacity"
            )

    def forget(self, name: str) -> None:
        """Free the slots of a name; one that a run uses is free when the run ends."""
        with self._changed:
            for key in [key for key in self._held if key[0] == name]:
                slot = self._held.pop(key)
                slot.pins -= key[1] == BAKED
                self._free.append(slot)
                self._changed.notify_all()

    def _checked_numbers(self, ids: Sequence[Any] | np.ndarray) -> list[int]:
        """The slot numbers among the ids, each once. onnxruntime would take negative ones without a word."""
        found: dict[int, None] = {}
        for entry in ids:
            if entry is None or isinstance(entry, str):
                continue
            if isinstance(entry, (bool, np.bool_)) or not isinstance(entry, (int, np.integer)):
                raise AdapterError(f"adapter_ids: {entry!r} is neither a tenant's name, nor a slot, nor None")
            if not 0 <= entry < self.slots:
                raise AdapterError(
                    f"adapter_ids: there is no slot {entry}; slots go from 0 (no adapter) to {self.slots - 1}"
                )
            found[int(entry)] = None
        return [number for number in found if number]

    def _hold(self, names: Sequence[str], numbers: Sequence[int]) -> dict[str | int, _Slot]:
        """Pin a slot for every tenant, and the numbered slots: all or none, so that no two runs wait for each other."""
        ready: dict[Key, LoadedAdapter] = {}
        while True:
            with self._changed:
                keys = {name: self._key(name) for name in names}
                wanted = set(keys.values())
                fixed = self._numbered(numbers)
                missing = [key for key in keys.values() if key not in self._held]
                own = {key for key in self._held if key[1] == BAKED}  # no file brings them back: they stay
                needed = len(wanted | own | {key for key, slot in self._held.items() if slot.number in numbers})
                if needed > self.capacity:
                    kept = (
                        f" besides the graph's own {listing(name for name, _ in own - wanted)}" if own - wanted else ""
                    )
                    raise AdapterError(
                        f"the batch names {needed - len(own - wanted)} tenants{kept} and the graph has {self.capacity} "
                        "slots for them: split the batch, unload tenants of the graph, or give OrtSession a larger "
                        "capacity"
                    )
                if all(key in ready for key in missing):
                    places = self._places(len(missing), keep=wanted, numbers=numbers)
                    if places is None:
                        self._changed.wait()
                        continue
                    self._fill({key: ready[key] for key in missing}, places)
                    found: dict[str | int, _Slot] = {**{name: self._held[key] for name, key in keys.items()}, **fixed}
                    for slot in found.values():
                        slot.pins += 1
                    for key in keys.values():
                        self._held.move_to_end(key)
                    return found
            for key in missing:
                adapter = self.cache.get(key[0])
                ready[key[0], adapter.serial] = adapter

    def _key(self, name: str) -> Key:
        baked = (name, BAKED)
        return baked if baked in self._held else (name, self.cache.serial(name))

    def _numbered(self, numbers: Sequence[int]) -> dict[str | int, _Slot]:
        if numbers and self._moved:
            raise AdapterError(
                f"adapter_ids: slots {list(numbers)} may have another tenant by now, {self._moved} have changed hands "
                "since the session began; use names"
            )
        by_number = {slot.number: slot for slot in self._held.values()}
        if empty := [number for number in numbers if number not in by_number]:
            raise AdapterError(
                f"adapter_ids: nobody is in slot {listing(map(str, empty))}; tenants: "
                f"{', '.join(f'{name!r} in {slot.number}' for (name, _), slot in self._held.items()) or 'none'}"
            )
        return {number: by_number[number] for number in numbers}

    def _places(self, count: int, keep: set[Key], numbers: Sequence[int]) -> list[_Slot] | None:
        """Slots to write into: free ones, then those of the tenants nobody has asked for longest; None: all in use."""
        places = [slot for slot in self._free if not slot.pins][:count]
        for key, slot in self._held.items():
            if len(places) < count and key not in keep and not slot.pins and slot.number not in numbers:
                places.append(slot)
        return places if len(places) == count else None

    def _fill(self, tenants: Mapping[Key, LoadedAdapter], places: Sequence[_Slot]) -> None:
        if not tenants:
            return
        numbers = {slot.number for slot in places}
        out = [key for key, slot in self._held.items() if slot.number in numbers]
        for key in out:
            del self._held[key]
        self._free = [slot for slot in self._free if slot.number not in numbers]
        self.evictions += len(out)
        for (key, adapter), slot in zip(tenants.items(), places, strict=True):
            for name, stack in self.stacks.items():
                its = tensor_of(name)
                entry = adapter.values.get(its)
                if entry is None:
                    stack[slot.number].zero_()
                else:
                    put_entry(stack[slot.number], entry - self.bases[its] if its in self.bases else entry)
            self._moved += slot.used
            slot.used = True
            self._held[key] = slot
            self.fills += 1
        if self.device.type != "cpu":
            # New values: runs that go on still read the old ones. On the CPU the values are the stacks' own memory.
            self._values = {key: to_ort(stack, self.device) for key, stack in self.stacks.items()}


def room(
    path: Path, graph: Mapping[str, TensorInfo], capacity: int | None, rank: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A graph's stacks with room for `capacity` tenants of ranks up to `rank` (None: as they are), and the initializers
    that differences are taken to. onnxruntime gives out neither.

    Raises `AdapterError` where the tenants of the graph do not fit.
    """
    import onnx_ir as ir

    initializers = ir.load(path).graph.initializers
    sizes = {SLOTS: capacity + 1 if capacity else None, RANK: rank}
    stacks, bases = {}, {}
    for name, info in graph.items():
        stack = _copy(initializers[name].const_value)
        shape = list(stack.shape)
        for axis, size in enumerate(info.shape):
            wanted = sizes.get(axis_of(size) or "")
            if wanted is not None and wanted < shape[axis]:
                raise AdapterError(
                    f"capacity={capacity}, rank={rank}: the graph's own tenants take {stack.shape[0] - 1} slots, and "
                    f"rank {shape[axis]} in {name!r}: give at least that"
                )
            shape[axis] = wanted or shape[axis]
        if shape != list(stack.shape):
            larger = stack.new_empty(shape)
            put_entry(larger, stack)
            stack = larger
        stacks[name] = stack
        if (key := tensor_of(name)) != name:
            bases[key] = _copy(initializers[key].const_value)
    return stacks, bases


def _copy(value: Any) -> torch.Tensor:
    import onnx_ir as ir

    if value.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(value.numpy().view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(value.numpy().copy())
