"""The forms a model can be exported in: which module is traced, what is opened, and what it is held against."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ...backends.artifact.parity import reference, sizes_of
from ...backends.artifact.signature import Axes, Example, arguments
from ...passes.models.bank import BANK, bank, bank_record, prove_rows
from ...passes.models.merge import merge
from ...passes.models.opened import Twin, base_weights, copy_rows, opened, opened_bank, whole_weights
from ...rewriter.analysis.dataflow import tied_names
from ...rewriter.capture.skeleton import copy_skeleton
from ...rewriter.errors import AdapterError, ExportError
from ...rewriter.forms import RANK, form_of
from ...rewriter.method import ADAPTER_IDS
from ...rewriter.state import ModelState, find_state, record_of
from ...rewriter.switch import active_weights, base_of, set_active
from ..adapterfiles import graph_manifest as manifest
from ..adapterfiles.adapter_inputs import at_site, difference, symbol
from ..adapterfiles.export_adapter import swappable_head
from ..adapterfiles.structured import describe, own_keys, own_tensors
from . import open_inputs
from .graph_rewrites import refuse_negative_ids

Inputs = Mapping[str, torch.Tensor]
Arrays = dict[str, np.ndarray]
# Arguments of a model -> torch's outputs, as the model computes them or in the dtype that is given.
Truth = Callable[..., Arrays]
# What a run feeds beside the inputs, and what must come out: (label, truth, other feeds).
Run = tuple[str, Truth, dict[str, torch.Tensor]]


class Plan:
    """What the modes have in common. `module` is traced, `truth` runs on the example, `base` is the base model."""

    module: torch.nn.Module
    truth: torch.nn.Module
    base: torch.nn.Module
    name: str | None = None
    sites: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    fingerprint = 0

    def extend(self, example: Example, axes: Axes, dims: dict[str, Any]) -> tuple[Example, Axes, dict[str, Any]]:
        """The example the module is traced with, from the user's."""
        return example, axes, dims

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        """Turn adapter tensors into inputs, before the optimizer runs. `ids` is a bank's input for the slots."""
        return {}

    def close(self, model: Any) -> None:
        """Undo, behind the optimizer, what `open` did for its sake only."""

    def about(self) -> dict[str, Any]:
        """What the manifest says of the mode."""
        return {}

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        """The comparisons to make on these inputs; `step` from 0 up asks for adapters of other sizes."""
        raise NotImplementedError

    def probes(self, tensors: Inputs) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Runs that need nothing but the graph itself, and the `adapter_ids` they feed beside the inputs."""
        yield "no adapter" if self.sites else "merged", {}


def truth_of(module: torch.nn.Module) -> Truth:
    # A bfloat16 graph is run widened, so what torch rounds at every step is no part of the truth.
    own = torch.float32 if any(parameter.dtype is torch.bfloat16 for parameter in module.parameters()) else None

    def run(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
        return reference(module, inputs, sizes_of(tensors_in(inputs)), dtype or own)

    return run


def tensors_in(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments of a model, those in dicts too."""
    flat = {**inputs, **{k: v for one in inputs.values() if isinstance(one, Mapping) for k, v in one.items()}}
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}


class Merged(Plan):
    """One plain graph: the adapters are in the weights, and the truth is the adapted model itself."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.base = name, base_of(adapted).eval()
        if find_state(adapted) is None:  # a model nobody has grafted anything into is its own merged form
            self.module = self.truth = self.base
            return
        self.module = merge(adapted, None if name is None else [name]).eval()
        # A chosen adapter need not be the active one; then the merged weights are the only form that has just it.
        self.truth = adapted if name is None or active_weights(adapted) == {name: 1} else self.module

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "merged", truth_of(self.truth), {}


class Swappable(Plan):
    """The base with room for an adapter: two truths, the base model without one and the adapted model with one."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.truth = one_active(adapted, name)
        self.base = base_of(adapted).eval()
        self.twin = opened(adapted, self.name)
        self.module = self.twin.module.eval()
        self.head = swappable_head(adapted, self.name)
        state = self.base.state_dict()
        self.defaults = {key: state[key] for key in self.head} | base_weights(self.base, self.twin.whole)
        self.trained = tuple(sorted(self.defaults))
        self.sites = tuple(sorted(site.name for site in record_of(adapted, self.name).sites))
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        # Of tied tensors the graph has one, under either name.
        ties, there = tied_names(self.module), model.graph.initializers
        keys = {key: next((n for n in sorted(ties.get(key, ())) if n in there), key) for key in self.defaults}
        heads = open_inputs.open_trained(model, self.defaults, {k: n for k, n in keys.items() if k not in there})
        return {**open_inputs.open_sites(model, legs_of(self.twin)), **heads}

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "no adapter", truth_of(self.base), {}
        feeds = {**self.head, **self.twin.whole}
        for site, (form, values) in self.twin.sites.items():
            # The graph must not remember the sizes it was traced with.
            feeds |= at_site(site, form.grown(values, step) if step else values)
        larger = f", rank + {step}" if step and self.twin.sites else ""
        yield f"adapter {self.name!r}{larger}", truth_of(self.truth), feeds
        if not step and self.twin.sites:
            truth, loud = randomised(self.twin, truth_of(self.module))
            yield "random adapter", truth, {**self.head, **self.twin.whole, **loud}


class Own(Plan):
    """The model with its adapter's own tensors as inputs: the graph does the method's arithmetic. Zeros are no adapter:
    every method's delta is a product with a tensor that starts at zero, or of the vector itself."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.truth = one_active(adapted, name)
        self.module = self.truth
        self.base = base_of(adapted).eval()
        whole_weights(adapted, self.name)  # a supernet says here that it has no one path yet
        own, frozen = own_tensors(self.truth, self.name)
        self.values = {**own, **frozen}
        self.keys = own_keys(self.truth, self.name)
        state, head = self.base.state_dict(), swappable_head(adapted, self.name)
        self.defaults = {
            key: state[key] if key in head else torch.zeros_like(tensor) if tensor.is_floating_point() else tensor
            for key, tensor in self.values.items()
        }
        self.trained = tuple(sorted(self.defaults))
        self.described = describe(adapted, self.name)
        self.sites = tuple(sorted(site.name for site in record_of(adapted, self.name).sites))
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def about(self) -> dict[str, Any]:
        return {"own": self.described}

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        return open_inputs.open_trained(model, self.defaults, self.keys)

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "no adapter", truth_of(self.base), {}
        yield f"adapter {self.name!r}", truth_of(self.truth), self.values


def randomised(twin: Twin, run: Truth) -> tuple[Truth, dict[str, torch.Tensor]]:
    """The twin with random tensors at its sites, as large as what they are added to, and these tensors by input name:
    what is wrong with a site shows, however small its own adapter is, or zero, as when nothing has been trained."""
    generator = torch.Generator().manual_seed(0)
    state = twin.module.state_dict()
    values: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site, (form, tensors) in twin.sites.items():
        for leg, own in tensors.items():
            key = f"{site}.{leg}"
            random = torch.randn(own.shape, generator=generator) / own.shape[-2] ** 0.5
            if form.slots:
                random[0] = 0  # the base model
            values[key] = state[twin.keys[site][leg]], random.to(own)

    def truth(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
        before = [(held, held.clone()) for held, _ in values.values()]
        for held, random in values.values():
            held.copy_(random)
        try:
            return run(inputs, dtype)
        finally:
            for held, own in before:
                held.copy_(own)

    return truth, {key: random for key, (_, random) in values.items()}


def legs_of(twin: Twin) -> dict[str, dict[str, open_inputs.Opened]]:
    """What becomes an input at every site. One adapter is left out as tensors of size 0; stacks are there already."""
    sites: dict[str, dict[str, open_inputs.Opened]] = {}
    for site, (form, tensors) in twin.sites.items():
        symbols = {axis: symbol(site, axis) for axis in form.open_axes}
        for leg, tensor in tensors.items():
            sizes = zip(form.layout(leg), tensor.shape, strict=True)
            shape = tuple(symbols.get(axis, size) for axis, size in sizes)
            default = tensor if form.slots else tensor.new_zeros([0 if isinstance(n, str) else n for n in shape])
            sites.setdefault(site, {})[leg] = open_inputs.Opened(twin.keys[site][leg], shape, default)
    return sites


def one_active(adapted: torch.nn.Module, name: str | None) -> tuple[str, torch.nn.Module]:
    """The adapter's name, and a model in which it alone is active."""
    on = active_weights(adapted)
    if name is None:
        if len(on) != 1:
            raise ExportError(f"a swappable graph is made for one adapter and {len(on)} are active: give name=")
        ((name, weight),) = on.items()
        if weight != 1:
            raise ExportError(
                f"{name!r} is active with a weight of {weight}, and a swappable graph takes adapters as they are: give "
                f"name={name!r}, or make the weight part of an adapter (fg.combine)"
            )
    return name, adapted if on == {name: 1} else alone(adapted, name)


def alone(adapted: torch.nn.Module, name: str) -> torch.nn.Module:
    record_of(adapted, name)
    twin = copy_skeleton(adapted)
    set_active(twin, [name])
    return twin.eval()


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


def make_plan(
    adapted: torch.nn.Module, mode: str, name: str | None, expanded: bool, capacity: int | None, rank: int | None
) -> Plan:
    """The plan of a mode of `export_onnx`, with its options."""
    if mode == "bank":
        return Banked(adapted, name, capacity, rank)
    if mode == "merged":
        return Merged(adapted, name)
    return Swappable(adapted, name) if expanded else Own(adapted, name)
