"""Where a bank's tenants come from: adapted models, saved folders, states that remember their methods, plain tensors.

Everything is read into an adapter in a model of its own, whose methods say what the tensors mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ...rewriter.adapter_state import AdapterState
from ...rewriter.adapter_tensors import AdapterTensors
from ...rewriter.base_names import base_modules
from ...rewriter.create import graft_adapter
from ...rewriter.errors import AdapterError, TargetError, listing
from ...rewriter.method import Method
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.sites import Site
from ...rewriter.spec import Spec, Target
from ...rewriter.state import record_of
from ...rewriter.switch import active, active_weights
from ...rewriter.targeting.patterns import exactly
from ...rewriter.tensors import adapter_modules, check_state, trained_modules, widened_like, write_state
from ...rewriter.tensors import adapter_state as state_of_adapter

TENANT = "tenant"  # the adapter's name in a model that is made for it

Folder = str | os.PathLike[str]
Tenant = Mapping[str, Tensor] | nn.Module | Folder
_FOLDER_OPENERS: list[Callable[[nn.Module, Folder, str], nn.Module]] = []


def register_folder_opener(opener: Callable[[nn.Module, Folder, str], nn.Module]) -> None:
    """Who grafts the adapter in a folder onto a base model under a name: the exporters, which nothing here imports."""
    _FOLDER_OPENERS[:] = [opener]


@dataclass(frozen=True)
class Source:
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
        if record.parameters:
            raise AdapterError(
                f"adapter {self.name!r} trains single parameters of the base, {listing(record.parameters)}: a bank "
                "stacks linear layers only. Serve it on its own, or train it without them"
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


def open_source(base: nn.Module, spec: Spec | None, name: str, value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, (str, os.PathLike)) and _FOLDER_OPENERS:
        return Source(_FOLDER_OPENERS[0](base, value, TENANT), TENANT)
    if isinstance(value, nn.Module):
        on = active(value)
        if len(on) != 1:
            raise AdapterError(f"tenant {name!r}: an adapted model with one active adapter, not {on}")
        if (weight := active_weights(value)[on[0]]) != 1:
            raise AdapterError(
                f"tenant {name!r}: its adapter {on[0]!r} is active with weight {weight:g}, and a bank holds "
                f"adapters as they are: fg.set_active(model, [{on[0]!r}]), or fold the weight into the adapter's values"
            )
        return Source(unwrap(value), on[0])
    if not isinstance(value, Mapping):
        raise AdapterError(
            f"tenant {name!r}: give adapter_state(...), an adapted model or a folder, not {type(value).__name__}"
        )
    if isinstance(value, AdapterState):
        return _of_its_own_method(base, name, value)
    if spec is None:
        raise AdapterError(f"tenant {name!r} is a state without a config, and the model has no one active adapter: "
                           "give spec=, or the adapted model instead of its state")  # fmt: skip
    twin = graft_adapter(base, spec, TENANT, initialise=False, fit=True)
    if _shapes(state_of_adapter(twin, TENANT)) != _shapes(value):
        letter = {spec.method_at(site.answers) for site in record_of(twin, TENANT).sites}
        if not letter <= set(Source(twin, TENANT).methods):  # before layers that are too small took less
            twin = graft_adapter(base, spec, TENANT, initialise=False)
        if (other := _at_its_rank(spec, twin, value)) is not None:
            twin = graft_adapter(base, other, TENANT, initialise=False)
    check_state(state_of_adapter(twin, TENANT), value, f"the state of tenant {name!r}")
    write_state(twin, TENANT, value)
    return Source(twin, TENANT)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _at_its_rank(spec: Spec, twin: nn.Module, state: Mapping[str, Tensor]) -> Spec | None:
    """The spec with another rank, if that is what it takes to fit the state."""
    old, rank = state_of_adapter(twin, TENANT), getattr(spec.method, "rank", None)
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


def _of_its_own_method(base: nn.Module, name: str, state: AdapterState) -> Source:
    """A state that says what its tensors mean, whatever the bank's other tenants are."""
    what = f"the state of tenant {name!r}"
    try:
        spec = _spec_of(base, state)
        twin = graft_adapter(base, spec, TENANT, initialise=False, order=list(state.methods))
    except TargetError as error:
        raise AdapterError(f"{what} is of another model: {error}") from error
    expected = state_of_adapter(twin, TENANT)
    widened = widened_like(expected, state)
    check_state(expected, widened, what)
    write_state(twin, TENANT, widened)
    return Source(twin, TENANT)


def _spec_of(base: nn.Module, state: AdapterState) -> Spec:
    """The sites and methods of a state, and the modules that are trained with it: those its other tensors are of."""
    modules = dict(base_modules(base))
    parts: dict[str, list[int]] = {}
    cuts: dict[str, tuple[int | tuple[int, ...], int]] = {}
    methods: dict[str, Method] = {}
    for site, (method, out_features, in_features, _, cut) in state.methods.items():
        stem = site.rpartition("[")[0] if site.endswith("]") else site
        methods[stem] = method
        if site.endswith("]"):
            parts.setdefault(stem, []).append(int(site[len(stem) + 1 : -1]))
            groups, *sizes = cut or (1,)
            cuts[stem] = tuple(sizes) or _numel(modules, stem) // (in_features * out_features), groups
    whole = [stem for stem in methods if stem not in parts]
    targets: list[str | Target] = [exactly(whole)] if whole else []
    targets += [Target(exactly([stem]), cuts[stem][0], tuple(chosen), cuts[stem][1]) for stem, chosen in parts.items()]
    first = next(iter(methods.values()))
    stems: dict[Method, list[str]] = {}
    for stem, method in methods.items():
        stems.setdefault(method, []).append(stem)
    overrides = {exactly(names): m for m, names in stems.items() if m != first}
    owners = [key.rpartition(".")[0] for key in state]
    train = dict.fromkeys(owner for owner in owners if owner and owner in modules and owner not in state.methods)
    return Spec(first, targets=targets, overrides=overrides, train=[exactly([path]) for path in train])


def _numel(modules: Mapping[str, nn.Module], stem: str) -> int:
    """Elements of the weight that a site's name without its part stands for; 0 where the model has none."""
    if stem in modules:
        weight = modules[stem]._parameters.get("weight")
    else:
        owner, _, key = stem.rpartition(".")
        weight = modules[owner]._parameters.get(key) if owner in modules else None
    return 0 if weight is None else weight.numel()
