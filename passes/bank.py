"""Many adapters in one graph, chosen sample by sample: `fg.bank`.

    y = linear(x) + fxgraft::<method>(x, ...)   ->   y = linear(x) + fxgraft::bank_<...>(x, adapter_ids, stacks)

Slot 0 is the base model. Heads that the adapters train come along as stacked differences, where they are linears.
Does not handle: methods that are neither a low-rank product nor bring a bank of their own (GLoRA), trained modules
other than linears, and sites whose input is not in the order of the batch (experts that a router sends tokens to).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..rewriter.api import active, adapter_modules, base_of, check_state, graft_adapter, trained_modules, write_state
from ..rewriter.api import adapter_state as state_of_adapter
from ..rewriter.errors import AdapterError, MergeError, listing
from ..rewriter.method import BankMethod, Method
from ..rewriter.sites import Site
from ..rewriter.spec import Spec
from ..rewriter.state import AdapterTensors, M, find_state, lookup, record_of, unwrap
from .factors import sites_as_targets
from .methods.bank_dense import DenseBank
from .methods.bank_lora import LoRABank

BANK = "bank"  # the adapter's name, and with an underscore the attribute that holds the record


@dataclass
class BankRecord:
    """What a banked model knows: which tenant sits in which slot, and how a state without a config is read."""

    slots: int
    spec: Spec | None
    tenants: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """One adapter in a model of its own: where a slot's values come from."""

    root: nn.Module
    name: str

    @property
    def sites(self) -> tuple[Site, ...]:
        return record_of(self.root, self.name).sites

    @property
    def methods(self) -> list[Method]:
        return [group.method for group in record_of(self.root, self.name).groups]

    def modules(self) -> dict[str, AdapterTensors]:
        found = adapter_modules(self.root, self.name, record_of(self.root, self.name))
        return {tensors.site.name: tensors for _, tensors in found if tensors.site is not None}

    def heads(self) -> dict[str, nn.Linear]:
        record = record_of(self.root, self.name)
        if record.ties:
            raise AdapterError(
                f"adapter {self.name!r} trains {record.ties[0].trained!r} and, tied to it, "
                f"{listing(t.full for t in record.ties)}: a bank stacks linear layers only. Serve it on its own, or "
                "train it with Spec(keep_ties=False)"
            )
        return dict(_linears(self.name, trained_modules(self.root, self.name, record)))


def _linears(name: str, trained: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Linear]]:
    for path, module in trained.items():
        for inner, child in module.named_modules():
            if isinstance(child, nn.Linear):
                yield (f"{path}.{inner}" if inner else path), child
            elif any(True for _ in child.parameters(recurse=False)):
                raise AdapterError(
                    f"adapter {name!r} trains {path!r}, which holds a {type(child).__name__}: a bank can stack linear "
                    "layers only. Serve it on its own, or train it without that module"
                )


# -- making one --------------------------------------------------------------------------------------------------
def bank(
    model: M,
    tenants: Mapping[str, Mapping[str, Tensor] | nn.Module] | None = None,
    *,
    spec: Spec | None = None,
    capacity: int | None = None,
    rank: int | None = None,
    expand: bool = False,
    dtype: torch.dtype | None = None,
) -> M:
    """One model that serves many adapters of a method, each sample of a batch with its own.

    The result is of the model's class and shares the base's tensors; its forward also takes `adapter_ids`, a vector
    of slots `(batch,)`: `banked(**inputs, adapter_ids=fg.adapter_ids(banked, ["a", None, "b"]))`. Without it every
    sample gets the base model. Tenants come and go (`add_tenant`, `remove_tenant`) without recompilation.

    Memory per tenant: its factors (`r * (in + out)` per site); for Uni-LoRA adapters with one projection, the vector.

    Args:
        model: an adapted model, or a plain one with `spec`.
        tenants: name -> what `adapter_state` gives, of the model's active adapter (or of `spec`; LoRA states may have
            other ranks), or an adapted model with one active adapter. Default: every adapter of the model.
        spec: how states are read, where the model has no adapter.
        capacity: how many tenants fit; by default as many as there are.
        rank: the largest rank that fits; by default that of the tenants.
        expand: Uni-LoRA only: hold factors instead of vectors, more memory and less work per call.
        dtype: of the stacks; by default as `rewrite` chooses.

    Raises:
        MergeError: the tenants' method cannot be stacked, with the reason.
        AdapterError: a state that does not fit, no tenant, or more than the capacity.
    """
    root = unwrap(model)
    base = base_of(root)
    if spec is None and find_state(root) is not None and len(active(root)) == 1:
        spec = record_of(root, active(root)[0]).spec
    given: Mapping[str, Any] = _own(root) if tenants is None else tenants
    if not given:
        raise AdapterError("bank(...): no tenant; give {name: adapter_state(...)} or an adapted model")
    sources = {name: _open(base, spec, name, value) for name, value in given.items()}
    capacity = len(sources) if capacity is None else capacity
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < len(sources):
        raise AdapterError(f"bank(capacity={capacity!r}): {len(sources)} tenants need a whole number of at least that")

    method = _bank_method(list(sources.values()), capacity + 1, rank, expand)
    sites = {site.name: site for source in sources.values() for site in source.sites}
    heads = {name for source in sources.values() for name in source.heads()}
    overrides = {"re:" + "|".join(map(re.escape, sorted(heads))): DenseBank(slots=capacity + 1)} if heads else {}
    targets = (*sites_as_targets(list(sites.values())), *overrides)
    banked = graft_adapter(
        base, Spec(method, targets=targets, overrides=overrides), BANK, dtype=dtype, order=list(sites)
    )  # fmt: skip
    banked.__dict__[f"_{BANK}"] = BankRecord(capacity + 1, spec)
    for name, source in sources.items():
        _fill(banked, name, source)
    return banked.train(root.training)


def _own(root: nn.Module) -> dict[str, _Source]:
    state = find_state(root)
    return {name: _Source(root, name) for name in state.adapters} if state else {}


def _open(base: nn.Module, spec: Spec | None, name: str, value: Any) -> _Source:
    if isinstance(value, _Source):
        return value
    if isinstance(value, nn.Module):
        on = active(value)
        if len(on) != 1:
            raise AdapterError(f"tenant {name!r}: an adapted model with one active adapter, not {on}")
        return _Source(unwrap(value), on[0])
    if not isinstance(value, Mapping):
        raise AdapterError(f"tenant {name!r}: give adapter_state(...) or an adapted model, not {type(value).__name__}")
    if spec is None:
        raise AdapterError(f"tenant {name!r} is a state without a config, and the model has no one active adapter: "
                           "give spec=, or the adapted model instead of its state")  # fmt: skip
    twin = graft_adapter(base, spec, "tenant", initialise=False)
    if (other := _at_its_rank(spec, twin, value)) is not None:
        twin = graft_adapter(base, other, "tenant", initialise=False)
    check_state(state_of_adapter(twin, "tenant"), value, f"the state of tenant {name!r}")
    write_state(twin, "tenant", value)
    return _Source(twin, "tenant")


def _at_its_rank(spec: Spec, twin: nn.Module, state: Mapping[str, Tensor]) -> Spec | None:
    """The spec with another rank, if that is what it takes to fit the state."""
    old, rank = state_of_adapter(twin, "tenant"), getattr(spec.method, "rank", None)
    changed = [
        (was, now)
        for key, tensor in old.items()
        if key in state
        for was, now in zip(tensor.shape, state[key].shape, strict=False)
        if was != now
    ]
    if rank is None or spec.overrides or len(set(changed)) != 1 or changed[0][0] != rank:
        return None
    return replace(spec, method=replace(spec.method, rank=changed[0][1]))  # type: ignore[call-arg]


def _bank_method(sources: Sequence[_Source], slots: int, rank: int | None, expand: bool) -> BankMethod:
    methods = [method for source in sources for method in source.methods]
    kinds = {type(method) for method in methods}
    if len(kinds) == 1 and not expand and len({source.sites for source in sources}) == 1:
        own = methods[0].bank(methods, slots)
        if own is not None:
            return own
    for method in methods:
        if method.not_low_rank:
            raise MergeError(
                f"{type(method).__name__} adapters cannot be stacked with {listing(sorted(k.__name__ for k in kinds))}"
                f" in a bank of low-rank factors: {method.not_low_rank}"
            )
    most = max(A.shape[0] for source in sources for A in _ranks(source))
    if rank is not None and rank < most:
        raise AdapterError(f"bank(rank={rank}): a tenant has rank {most}; give at least that")
    return LoRABank(slots=slots, rank=rank or most)


def _ranks(source: _Source) -> Iterator[Tensor]:
    for tensors in source.modules().values():
        yield tensors.method.factors(tensors.shared_tensors(), tensors.tensors())[0]


# -- tenants -----------------------------------------------------------------------------------------------------
def bank_record(model: nn.Module) -> BankRecord | None:
    """What a bank knows of itself; None for any other model."""
    return unwrap(model).__dict__.get(f"_{BANK}")


def _record(banked: nn.Module) -> BankRecord:
    record = bank_record(banked)
    if record is None:
        raise AdapterError(f"this {type(unwrap(banked)).__name__} is no bank: fg.bank(model, tenants) makes one")
    return record


def tenants(banked: nn.Module) -> dict[str, int]:
    """The tenants of a bank and their slots, from 1 up."""
    return dict(_record(banked).tenants)


def adapter_ids(banked: nn.Module, names: Sequence[str | None]) -> Tensor:
    """The slots of these tenants, `(len(names),)` int64 on the model's device; None is the base model.

    Raises:
        AdapterError: a name that is no tenant.
    """
    slots = _record(banked).tenants
    if isinstance(names, str):
        raise AdapterError(f"adapter_ids(banked, {names!r}): give a list with a name, or None, for every sample")
    if unknown := [name for name in names if name is not None and name not in slots]:
        raise AdapterError(f"no tenant {listing(unknown)} in this bank; it has {listing(slots)}")
    device = next(unwrap(banked).parameters()).device
    return torch.tensor([0 if name is None else slots[name] for name in names], dtype=torch.int64, device=device)


def add_tenant(banked: nn.Module, name: str, tenant: Mapping[str, Tensor] | nn.Module) -> None:
    """Put an adapter into a free slot, or in the place of the tenant of that name; nothing is compiled anew.

    Raises:
        AdapterError: no slot is free, or the adapter does not fit the bank: other sites, too large a rank, another
            projection.
    """
    root, record = unwrap(banked), _record(banked)
    if name not in record.tenants and len(record.tenants) == record.slots - 1:
        raise AdapterError(
            f"the bank is full ({record.slots - 1} tenants): remove_tenant one, or make it with a larger capacity"
        )
    _fill(root, name, _open(base_of(root), record.spec, name, tenant))


def remove_tenant(banked: nn.Module, name: str) -> None:
    """Free a tenant's slot. Ids that still name the slot get the base model."""
    root, record = unwrap(banked), _record(banked)
    if name not in record.tenants:
        raise AdapterError(f"no tenant {name!r} in this bank; it has {listing(record.tenants)}")
    _write(root, record.tenants.pop(name), {})


def _fill(root: nn.Module, name: str, source: _Source) -> None:
    """Check everything, then write one slot."""
    record = _record(root)
    taken = set(record.tenants.values())
    slot = record.tenants.get(name) or min(s for s in range(1, record.slots) if s not in taken)
    entries = _entries(root, name, source)
    _write(root, slot, entries)
    record.tenants[name] = slot


def _stacks(root: nn.Module) -> Iterator[tuple[str, AdapterTensors]]:
    yield from adapter_modules(root, BANK, record_of(root, BANK))


@torch.no_grad()
def _entries(root: nn.Module, name: str, source: _Source) -> dict[tuple[int, str], Tensor]:
    """(module id, tensor name) -> what the slot gets."""
    given, heads = source.modules(), source.heads()
    found: dict[tuple[int, str], Tensor] = {}
    placed = set()
    common = [site.name for site in record_of(root, BANK).sites if site.name not in heads]
    for _, stack in _stacks(root):
        site, method = stack.site, stack.method
        if site is None:
            continue
        assert isinstance(method, BankMethod)
        if site.name in heads:
            base = lookup(root, site.owner)
            head = heads[site.name]
            pairs = (("weight", head.weight, base.weight), ("bias", head.bias, base.bias))
            entry = {n: t.float() - b.float() for n, t, b in pairs if t is not None}  # type: ignore[union-attr, operator]
            shared: Mapping[str, Tensor] = {}
            local: Mapping[str, Tensor] = entry
        elif site.name in given:
            tensors = given[site.name]
            shared, local = method.entry(tensors.method, _wide(tensors.shared_tensors()), _wide(tensors.tensors()))
            if shared and list(given) != common:
                raise AdapterError(
                    f"tenant {name!r} adapts other sites than the bank, so its projection is another one; make the "
                    "bank with expand=True"
                )
        else:
            continue
        placed.add(site.name)
        places = [(stack, local)]
        if shared:
            places.append((stack.__dict__["shared"], shared))
        for module, values in places:
            for key, value in values.items():
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


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() if t.is_floating_point() and t.itemsize < 4 else t for n, t in tensors.items()}


@torch.no_grad()
def _write(root: nn.Module, slot: int, entries: Mapping[tuple[int, str], Tensor]) -> None:
    for _, stack in _stacks(root):
        for key, tensor in stack.tensors().items():
            if key in stack._non_persistent_buffers_set:
                continue  # derived: the projection is everyone's
            tensor[slot].zero_()
            value = entries.get((id(stack), key))
            if value is not None:
                tensor[slot][tuple(slice(n) for n in value.shape)].copy_(value)
