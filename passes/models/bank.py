"""Many adapters in one graph, chosen sample by sample: `fg.bank`.

    y = linear(x) + fxgraft::<method>(x, ...)   ->   y = linear(x) + fxgraft::bank_<...>(x, adapter_ids, stacks)

Slot 0 is the base model. Heads that the adapters train come along as stacked differences, where they are linears.
Does not handle: methods that have no form (GLoRA), trained modules other than linears, and sites whose input is not in
the order of the batch (experts that a router sends tokens to).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.adapter_tensors import AdapterTensors
from ...rewriter.base_names import lookup
from ...rewriter.calls.forward_inputs import GUARD, first_tensor
from ...rewriter.create import graft_adapter
from ...rewriter.errors import AdapterError, MergeError, listing
from ...rewriter.forms import Form, forms_of, put_entry
from ...rewriter.method import ADAPTER_IDS
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.program_verbs import over_programs
from ...rewriter.sites import cut_differently
from ...rewriter.spec import Spec
from ...rewriter.state import find_state, record_of
from ...rewriter.switch import active, base_of
from ...rewriter.targeting.patterns import exactly
from ...rewriter.tensors import adapter_modules
from ..methods.dense_form import Dense
from ..methods.low_rank_factors import widened
from ..methods.low_rank_form import Factors
from .bank_slots import BANK, BankRecord
from .bank_sources import Source, Tenant, open_source
from .factors import sites_as_targets


# -- making one --------------------------------------------------------------------------------------------------
@over_programs
def bank(
    model: M,
    tenants: Mapping[str, Tenant] | None = None,
    *,
    spec: Spec | None = None,
    capacity: int | None = None,
    rank: int | None = None,
    expand: bool = False,
    dtype: torch.dtype | None = None,
    example_inputs: Any = None,
    batch_axis: int = 0,
) -> M:
    """One model that serves many adapters of a method, each sample of a batch with its own.

    The result is of the model's class and shares the base's tensors; its forward also takes `adapter_ids`, a vector
    of slots `(batch,)`: `banked(**inputs, adapter_ids=fg.adapter_ids(banked, ["a", None, "b"]))`. Without it every
    sample gets the base model. Tenants come and go (`add_tenant`, `remove_tenant`) without recompilation.

    Which rows of each layer's input are which sample's is tried out with the first call that has ids, on its inputs
    (some forward passes), and once more for every other kind of call; a layer where samples cannot be told apart is an
    error, and no numbers come out. `example_inputs` try it here and now.

    Memory per tenant: its factors (`r * (in + out)` per site); for Uni-LoRA and VeRA adapters with one projection, the
    vectors.

    Args:
        model: an adapted model, or a plain one with `spec`.
        tenants: name -> a saved folder, an adapted model with one active adapter, or what `adapter_state` gives, which
            remembers its methods; or a plain dict of tensors, taken as values of `spec` (LoRA: of any rank). Default:
            every adapter of the model.
        spec: how plain dicts are read; by default as the model's active adapter.
        capacity: how many tenants fit; by default as many as there are.
        rank: the largest rank that fits; by default that of the tenants.
        expand: Uni-LoRA and VeRA only: hold factors instead of vectors, more memory and less work per call.
        dtype: of the stacks; by default as `rewrite` chooses.
        example_inputs: a tuple of positional or a mapping of keyword arguments, two samples or more.
        batch_axis: the dimension of the model's inputs that the samples are along.

    Raises:
        MergeError: the tenants' method cannot be stacked, with the reason.
        AdapterError: a state that does not fit, no tenant, more than the capacity, or example inputs that show a layer
            where the samples cannot be told apart.
    """
    root = unwrap(model)
    base = base_of(root)
    if isinstance(batch_axis, bool) or not isinstance(batch_axis, int) or batch_axis < 0:
        raise AdapterError(f"bank(batch_axis={batch_axis!r}): a dimension, counted from 0 up")
    if ADAPTER_IDS in inspect.signature(base.forward).parameters:
        raise AdapterError(
            f"the forward of {type(base).__name__} takes {ADAPTER_IDS!r} itself, the name under which a bank is told "
            "which sample takes which adapter: rename its own"
        )
    if spec is None and find_state(root) is not None and len(active(root)) == 1:
        spec = record_of(root, active(root)[0]).spec
    given: Mapping[str, Any] = _own(root) if tenants is None else tenants
    if not given:
        raise AdapterError("bank(...): no tenant; give {name: adapter_state(...)} or an adapted model")
    sources = {name: open_source(base, spec, name, value) for name, value in given.items()}
    capacity = len(sources) if capacity is None else capacity
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < len(sources):
        raise AdapterError(f"bank(capacity={capacity!r}): {len(sources)} tenants need a whole number of at least that")

    form = _form(list(sources.values()), capacity + 1, rank, expand)
    if said := cut_differently(site for source in sources.values() for site in source.sites):
        raise AdapterError(
            f"bank(...): {said}. Give tenants of the same targets, or serve the others in a bank of their own"
        )
    sites = {site.name: site for source in sources.values() for site in source.sites}
    heads = {name for source in sources.values() for name in source.heads()}
    overrides = {exactly(sorted(heads)): Dense(slots=capacity + 1)} if heads else {}
    targets = (*sites_as_targets(list(sites.values())), *overrides)
    banked = graft_adapter(
        base, Spec(form, targets=targets, overrides=overrides), BANK, dtype=dtype, order=list(sites)
    )  # fmt: skip
    banked.__dict__[GUARD] = BankRecord(capacity + 1, spec, batch_axis)
    for name, source in sources.items():
        _fill(banked, name, source)
    banked.train(root.training)
    if example_inputs is not None:
        prove_rows(banked, example_inputs)
    return banked  # type: ignore[return-value]


def prove_rows(banked: nn.Module, example_inputs: Any) -> None:
    """Find out which rows of every site's input are which sample's, for calls like this one: before a compiler or an
    exporter looks at the bank.

    Raises:
        AdapterError: a site where the samples cannot be told apart, or inputs of fewer than two samples.
    """
    record = _record(banked)
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    kwargs.pop(ADAPTER_IDS, None)
    first = first_tensor(args, kwargs, record.batch_axis)
    batch = 0 if first is None else first.shape[record.batch_axis]
    if batch < 2:
        raise AdapterError(
            f"example inputs of {batch} sample(s) along dimension {record.batch_axis}: two or more show which rows are "
            "which sample's"
        )
    record.prove(unwrap(banked), batch, args, kwargs)


def _own(root: nn.Module) -> dict[str, Source]:
    state = find_state(root)
    return {name: Source(root, name) for name in state.adapters} if state else {}


def _form(sources: Sequence[Source], slots: int, rank: int | None, expand: bool) -> Form:
    """The form that holds all of them: one of their own kind where they are alike, else stacked factors."""
    methods = [method for source in sources for method in source.methods]
    kinds = {type(method) for method in methods}
    alone = all(len(source.methods) == 1 for source in sources)  # groups of sites derive each a projection of their own
    if len(kinds) == 1 and not expand and len({source.sites for source in sources}) == 1:
        for kind in forms_of(methods[0]):
            if (alone or not kind.derives) and (own := kind.stack_of(methods, slots)) is not None:
                return own
    for method in methods:
        if method.not_low_rank:
            raise MergeError(
                f"{type(method).__name__} adapters cannot be stacked with {listing(sorted(k.__name__ for k in kinds))}"
                f" in a bank of low-rank factors: {method.not_low_rank}"
            )
    most = max(A.shape[0] for source in sources for A in _down_halves(source))
    if rank is not None and rank < most:
        raise AdapterError(f"bank(rank={rank}): a tenant has rank {most}; give at least that")
    return Factors(slots=slots, rank=rank or most)


def _down_halves(source: Source) -> Iterator[Tensor]:
    for tensors in source.modules().values():
        yield tensors.method.factors(tensors.shared_tensors(), tensors.tensors())[0]


# -- tenants -----------------------------------------------------------------------------------------------------
def bank_record(model: nn.Module) -> BankRecord | None:
    """What a bank knows of itself; None for any other model."""
    return unwrap(model).__dict__.get(GUARD)


def _record(banked: nn.Module) -> BankRecord:
    record = bank_record(banked)
    if record is None:
        raise AdapterError(f"this {type(unwrap(banked)).__name__} is no bank: fg.bank(model, tenants) makes one")
    return record


@over_programs
def tenants(banked: nn.Module) -> dict[str, int]:
    """The tenants of a bank and their slots, from 1 up."""
    return dict(_record(banked).tenants)


@over_programs
def adapter_ids(banked: nn.Module, names: Sequence[str | None]) -> Tensor:
    """The slots of these tenants, `(len(names),)` int64 on the model's device; None is the base model.

    The tensor remembers whose the slots are: once a tenant has been removed, a call with it is an `AdapterError`. A
    copy (`.to()`, an index) is plain numbers, for which a slot is whoever sits there.

    Raises:
        AdapterError: a name that is no tenant.
    """
    record = _record(banked)
    if isinstance(names, str):
        raise AdapterError(f"adapter_ids(banked, {names!r}): give a list with a name, or None, for every sample")
    return record.ids(names, _device(unwrap(banked)))


def _device(root: nn.Module) -> torch.device:
    """The first parameter's; of an offloaded model, whose parameters are stand-ins, the first buffer's."""
    devices = [t.device for t in (*root.parameters(), *root.buffers())]
    return next((device for device in devices if device.type != "meta"), devices[0])


@over_programs
def add_tenant(banked: nn.Module, name: str, tenant: Tenant) -> None:
    """Put an adapter, or a saved one, into a free slot, or in the place of the tenant of that name; nothing is compiled
    anew.

    Other threads may call the bank meanwhile: a call that names the tenant gets the old values or the new ones, whole.

    Raises:
        AdapterError: no slot is free, or the adapter does not fit the bank: other sites, too large a rank, another
            projection.
    """
    root, record = unwrap(banked), _record(banked)
    with record.writers:
        if name not in record.tenants and record.free_slot() is None:
            raise AdapterError(
                f"the bank is full ({record.slots - 1} tenants): remove_tenant one, or make it with a larger capacity"
            )
        _fill(root, name, open_source(base_of(root), record.spec, name, tenant))


@over_programs
def remove_tenant(banked: nn.Module, name: str) -> None:
    """Free a tenant's slot. Ids that `adapter_ids` made with it are refused from here on; a plain number is a slot, and
    gets the base model until another tenant sits there."""
    root, record = unwrap(banked), _record(banked)
    with record.writers:
        if name not in record.tenants:
            raise AdapterError(f"no tenant {name!r} in this bank; it has {listing(record.tenants)}")
        slot = record.release(name)
        with record.writing(slot):
            _write(_staged(root, slot, {}))


def _fill(root: nn.Module, name: str, source: Source) -> None:
    """Check everything, then write one slot."""
    record = _record(root)
    slot = record.tenants.get(name) or record.free_slot()
    assert slot is not None
    rows = _staged(root, slot, _entries(root, name, source))
    with record.writing(slot):
        _write(rows)
    record.lease(name, slot)


def _stacks(root: nn.Module) -> Iterator[tuple[str, AdapterTensors]]:
    yield from adapter_modules(root, BANK, record_of(root, BANK))


@torch.no_grad()
def _entries(root: nn.Module, name: str, source: Source) -> dict[tuple[int, str], Tensor]:
    """(module id, tensor name) -> what the slot gets."""
    given, heads = source.modules(), source.heads()
    found: dict[tuple[int, str], Tensor] = {}
    placed = set()
    if said := cut_differently((*record_of(root, BANK).sites, *source.sites)):
        raise AdapterError(f"tenant {name!r} does not fit the bank: {said}")
    common = [site.name for site in record_of(root, BANK).sites if site.name not in heads]
    for _, stack in _stacks(root):
        site, form = stack.site, stack.method
        if site is None:
            continue
        assert isinstance(form, Form)
        if site.name in heads:
            base = lookup(root, site.owner)
            head = heads[site.name]
            pairs = (("weight", head.weight, base.weight), ("bias", head.bias, base.bias))
            entry = {n: t.float() - b.float() for n, t, b in pairs if t is not None}  # type: ignore[union-attr, operator]
        elif site.name in given:
            tensors = given[site.name]
            entry = form.entry(tensors.method, widened(tensors.shared_tensors()), widened(tensors.tensors()))
            if form.derives and (list(given) != common or len(source.methods) > 1):
                what = "other sites than the bank" if list(given) != common else "its sites in several groups"
                raise AdapterError(
                    f"tenant {name!r} adapts {what}, so its projection is another one; make the bank with expand=True"
                )
        else:
            continue
        placed.add(site.name)
        for key, value in entry.items():
            module = stack.__dict__["shared"] if key in form.shared_axes else stack
            room = module.tensors()[key].shape[1:]
            if len(room) != value.dim() or any(r < v for r, v in zip(room, value.shape, strict=True)):
                raise AdapterError(
                    f"tenant {name!r} at {site.name!r}: {key} is {tuple(value.shape)} and a slot of the bank "
                    f"{tuple(room)}; make the bank with room for it (rank=)"
                )
            if not torch.isfinite(value).all():
                raise AdapterError(f"tenant {name!r} at {site.name!r}: {key} has NaN or infinite values")
            found[id(module), key] = value
    if missing := [n for n in (*given, *heads) if n not in placed]:
        raise AdapterError(f"tenant {name!r} adapts {listing(missing)}, and the bank has no stack there")
    return found


@torch.no_grad()
def _staged(root: nn.Module, slot: int, entries: Mapping[tuple[int, str], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The slot of every stack, and what it is going to hold: on its device, in its dtype, padded with zeros."""
    staged = []
    for _, stack in _stacks(root):
        for key, tensor in stack.tensors().items():
            if key in stack._non_persistent_buffers_set:
                continue  # derived: the projection is everyone's
            row = torch.zeros_like(tensor[slot])
            value = entries.get((id(stack), key))
            if value is not None:
                put_entry(row, value)
                if not torch.isfinite(row).all():
                    raise AdapterError(f"{key} of {stack.site and stack.site.name!r} is too large for {tensor.dtype}")
            staged.append((tensor[slot], row))
    return staged


@torch.no_grad()
def _write(staged: Sequence[tuple[Tensor, Tensor]]) -> None:
    for place, row in staged:
        place.copy_(row)
