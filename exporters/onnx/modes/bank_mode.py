"""Graphs with slots for many adapters and an input that says which slot each sample takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ....backends.artifact.signature import Axes, Example, arguments
from ....passes.models.bank import BANK, bank, bank_record, prove_rows
from ....passes.models.opened import copy_rows, opened_bank
from ....rewriter.errors import AdapterError, ExportError
from ....rewriter.forms import RANK, form_of
from ....rewriter.method import ADAPTER_IDS
from ....rewriter.state import ModelState, find_state
from ....rewriter.switch import base_of
from ...adapterfiles import graph_manifest as manifest
from ...adapterfiles.adapter_inputs import at_site, difference
from ..graph import open_inputs
from ..graph.graph_rewrites import refuse_negative_ids
from .export_plan import Arrays, Inputs, Plan, Run, Truth, tensors_in, truth_of
from .one_adapter import alone
from .twin_inputs import legs_of, randomised


class Banked(Plan):
    """The base with slots for many adapters and an input that says which slot each sample takes.

    The truth is torch with one adapter at a time: every row of a batch is held against the model that has only the
    row's adapter.
    """

    name = None

    def __init__(self, model: torch.nn.Module, name: str | None, capacity: int | None, rank: int | None):
        if name is not None:
            raise ExportError(
                f"name={name!r}: a bank takes every adapter of the model; fg.bank(model, tenants) makes one of some"
            )
        banked = model if bank_record(model) is not None else _stack(model)
        record = bank_record(banked)
        assert record is not None
        if record.batch_axis:
            raise ExportError(
                f"this bank's samples are along dimension {record.batch_axis} of its inputs (batch_axis=); a graph "
                "with a bank takes them along dimension 0: export a model whose forward transposes"
            )
        self._banked = banked
        self.tenants = dict(record.tenants)
        # Slots behind the last tenant are made by whoever runs the graph.
        slots = max(self.tenants.values(), default=1) + 1
        self.base = base_of(banked).eval()
        self.twin = opened_bank(banked, BANK, slots)
        self.module, self.truth = self.twin.module.eval(), self.base
        self.capacity = _room(capacity, record.slots - 1, "capacity", "the number of tenants", slots - 1)
        most = max(form.sizes[RANK] for form, _ in self.twin.sites.values())
        self.rank = _room(rank, most, "rank", "the rank of the bank", most)
        self.alone = {
            name: _slot(banked, slot) if banked is model else truth_of(alone(model, name))
            for name, slot in self.tenants.items()
        }
        self.sites, self.heads = tuple(sorted(self.twin.sites)), self.twin.heads
        self.trained = tuple(sorted(self.heads))
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def about(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "rank": self.rank, "tenants": self.tenants}

    def extend(self, example: Example, axes: Axes, dims: dict[str, Any]) -> tuple[Example, Axes, dict[str, Any]]:
        first = next((name for name, tensor in example.tensors.items() if tensor.dim()), None)
        if first is None:
            raise ExportError("no example input has a batch axis, so there are no samples to choose adapters for")
        self._tell_rows(arguments(example.kwargs, example.nested))
        tensors = {**example.tensors, ADAPTER_IDS: self._ids(example.tensors, 0)}
        if 0 in axes.get(first, {}):
            axes = {**axes, ADAPTER_IDS: {0: axes[first][0]}}
            dims = {**dims, ADAPTER_IDS: {0: dims[first][0]}}
        return dataclasses.replace(example, tensors=tensors), axes, {**dims, ADAPTER_IDS: dims.get(ADAPTER_IDS)}

    def _tell_rows(self, inputs: Mapping[str, Any]) -> None:
        """Tell the module which rows of its sites' inputs are which sample's, found out on the bank."""
        first = next(tensor for tensor in tensors_in(inputs).values() if tensor.dim())
        if first.shape[0] > 1:
            prove_rows(self._banked, inputs)
            copy_rows(self._banked, BANK, self.module)

    def _ids(self, tensors: Inputs, start: int) -> torch.Tensor:
        """Tenants in turn, and the base model."""
        batch = next(tensor for tensor in tensors.values() if tensor.dim()).shape[0]
        slots = [*self.tenants.values(), 0]
        return torch.tensor([slots[(i + start) % len(slots)] for i in range(batch)])

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        self._slots = ids
        open_inputs.pin(model, list(self.heads))
        stacks = {stack: (difference(key), values) for key, (stack, values) in self.heads.items()}
        return {**open_inputs.open_sites(model, legs_of(self.twin), ids), **open_inputs.open_stacks(model, stacks, ids)}

    def close(self, model: Any) -> None:
        state = self.base.state_dict()
        open_inputs.unpin(model, {key: state[key] for key in self.heads})
        refuse_negative_ids(model, self._slots)

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        ids = self._ids(tensors, step)
        yield "no adapter", truth_of(self.base), {ADAPTER_IDS: torch.zeros_like(ids)}
        feeds = {ADAPTER_IDS: ids}
        if step:  # other slots and ranks than the graph was traced with
            for site, (form, values) in self.twin.sites.items():
                feeds |= at_site(site, form.grown(values, step))
            for key, (_, stack) in self.heads.items():
                feeds[difference(key)] = torch.cat([stack, stack.new_zeros(step, *stack.shape[1:])])
        larger = f", {step} more slots, rank + {step}" if step else ""
        yield f"mixed batch{larger}", lambda inputs, dtype=None: self._rows(inputs, ids.tolist(), dtype), feeds
        if not step and self.twin.sites:
            run = truth_of(self.module)

            def told(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
                self._tell_rows(inputs)
                return run({**inputs, ADAPTER_IDS: ids}, dtype)

            truth, loud = randomised(self.twin, told)
            yield "random tenants", truth, {ADAPTER_IDS: ids, **loud}

    def probes(self, tensors: Inputs) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        ids = self._ids(tensors, 0)
        yield "no adapter", {ADAPTER_IDS: torch.zeros_like(ids)}
        yield "mixed batch", {ADAPTER_IDS: ids}

    def _rows(self, inputs: dict[str, Any], slots: list[int], dtype: torch.dtype | None) -> Arrays:
        """Every row from the model with the row's adapter alone."""
        names = {slot: name for name, slot in self.tenants.items()}
        outputs = {
            slot: (self.alone[names[slot]] if slot else truth_of(self.base))(inputs, dtype)
            for slot in dict.fromkeys(slots)
        }
        rows = {}
        for key, first in outputs[slots[0]].items():
            if not first.ndim or first.shape[0] % len(slots):
                raise ExportError(
                    f"output {key!r} {first.shape} has no row for each of the {len(slots)} samples, so it cannot come "
                    "from a batch of several adapters; leave it out of the model's outputs, or export 'swappable'"
                )
            split = {slot: np.split(given[key], len(slots)) for slot, given in outputs.items()}
            rows[key] = np.concatenate([split[slot][i] for i, slot in enumerate(slots)])
        return rows


def _stack(model: torch.nn.Module) -> torch.nn.Module:
    """The bank of a model's adapters."""
    if ADAPTER_IDS in inspect.signature(model.forward).parameters:
        raise ExportError(
            f"{type(model).__name__}.forward takes {ADAPTER_IDS!r} itself, the name of a bank's own input; call it "
            "something else, or export 'swappable'"
        )
    for name, record in (find_state(model) or ModelState()).adapters.items():
        groups = [group for group in record.groups if form_of(group.method) is None]
        sites = [site for group in groups for site in group.sites]
        if sites and groups[0].method.unmergeable is None:
            size = sum(site.out_features * (site.in_features + 1) * site.dtype.itemsize for site in sites)
            raise ExportError(
                f"adapter {name!r} has no small tensors ({groups[0].method.not_low_rank}), so in a bank every slot "
                f"would hold whole weights, {size:,} bytes, and every sample of a batch would gather as much. Export "
                "it with adapters='swappable' and give each run one adapter, or each adapter a merged graph"
            )
    return bank(model)


def _slot(banked: torch.nn.Module, slot: int) -> Truth:
    def run(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
        batch = next(tensor for tensor in tensors_in(inputs).values() if tensor.dim()).shape[0]
        return truth_of(banked)({**inputs, ADAPTER_IDS: torch.full((batch,), slot)}, dtype)

    return run


def _room(value: Any, default: int, name: str, what: str, least: int) -> int:
    if value is None:
        return max(default, least)
    if isinstance(value, bool) or not isinstance(value, int) or value < max(least, 1):
        raise AdapterError(f"{name}={value!r}: give a whole number from {max(least, 1)} up, {what}")
    return value
