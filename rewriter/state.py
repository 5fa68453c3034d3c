"""What a model knows of the adapters grafted into it: one record at the root, the tensors at their sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from .calls.disabled import Switch
from .calls.sample_rows import UNPROVEN, Rows
from .errors import AdapterError, listing
from .method import Method
from .modules import missing_values
from .sites import Site
from .spec import Spec

M = TypeVar("M", bound=nn.Module)

STATE = "_fxgraft"  # the record, in the root's __dict__
ADAPTERS = "fxgraft"  # child of every owner: its adapters by name
TIED = "fxgraft_tied"  # plain attribute: adapter -> parameter -> (module of a trained copy, its parameter instead)
SHARED = "fxgraft_shared"  # child of the root: tensors that sites share


@dataclass(frozen=True)
class Group:
    """Sites of one adapter that one method config serves; they share that method's shared tensors."""

    method: Method
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Tie:
    """A parameter that is tied to one of a trained module, and computes with the trained one.

    Args:
        path, attribute: the module and its parameter.
        trained, name: the trained module, and the parameter in it.
    """

    path: str
    attribute: str
    trained: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.path}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class AdapterRecord:
    """One named adapter: its spec as given, its resolved sites, the modules trained with it and what follows them."""

    spec: Spec
    groups: tuple[Group, ...]
    train: tuple[str, ...]
    created_by: str = "graft"
    ties: tuple[Tie, ...] = ()

    def __deepcopy__(self, memo: Any) -> AdapterRecord:
        return self

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)


@dataclass
class ModelState:
    """All adapters of a model.

    Args:
        active: the active adapters in the order they are added in; `weights` of those whose weight is not 1.
        trained: the base parameters that required grad before the first rewrite.
        frozen: of every inactive adapter, the tensors that the user froze while it was active.
        switch: the model's own, for `disabled`.
        proved: the adapters that a forward has reached at every place (`unreached_sites.py`).
    """

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    frozen: dict[str, frozenset[str]] = field(default_factory=dict)
    switch: Switch = field(default_factory=Switch)
    proved: set[str] = field(default_factory=set)


class Container(nn.Module):
    """A named place for adapter tensors; it computes nothing."""

    def forward(self, x: Any) -> Any:
        """The input: a root or a trained head that is an `nn.Sequential` calls every child it has."""
        return x


class AdapterTensors(Container):
    """The tensors of one adapter at one site, or the shared tensors of one group (then `site` is None).

    `shared` points at the module that owns the group's shared tensors. It is a plain attribute, not a submodule, so
    those tensors are registered once; they are looked up through it at every call, so whoever replaces a parameter on
    its owner (FSDP2, `functional_call`) is obeyed.
    """

    def __init__(self, method: Method, site: Site | None, shared: AdapterTensors | None) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.rows: Rows = UNPROVEN  # a site of a bank: how the samples of a batch lie in its input
        self.__dict__["shared"] = shared

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return missing_values.apply(self, fn, lambda: super(AdapterTensors, self)._apply(fn, recurse))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        missing_values.settle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        missing_values.restore(self)

    def tensors(self) -> dict[str, Any]:
        """Every tensor by name, derived ones included."""
        return {**self._parameters, **self._buffers}

    def shared_tensors(self) -> dict[str, Any]:
        """What this site sees of the tensors it shares with the others of its group; empty where there are none."""
        shared = self.__dict__["shared"]
        if shared is None:
            return {}
        tensors = shared.tensors()
        return dict(self.method.seen_by(self.site, tensors)) if self.site is not None else tensors

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(t.shape)}" for name, t in self.tensors().items())


#: (package, class) of a wrapper -> the child that it calls. By class: a model of one's own may call a child `module`.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("lightning", "_FabricModule"): "_forward_module",
    ("lightning_fabric", "_FabricModule"): "_forward_module",
}
_WRAPPED = frozenset(_WRAPPERS.values())


def unwrap(model: M) -> M:
    """The module inside wrappers, in any order: `torch.compile`, activation checkpointing, data parallel, FSDP."""
    while not _WRAPPED.isdisjoint(model._modules):
        kinds = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(model).__mro__)
        child = next((_WRAPPERS[kind] for kind in kinds if kind in _WRAPPERS), None)
        inner = model._modules.get(child) if child is not None else None
        if inner is None:
            break
        model = inner  # type: ignore[assignment]
    return model


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is `torch.compile`'s wrapper around another."""
    return _WRAPPERS.get((type(module).__module__.partition(".")[0], type(module).__name__)) == "_orig_mod"


def find_state(model: nn.Module) -> ModelState | None:
    return unwrap(model).__dict__.get(STATE)


def state_of(model: nn.Module) -> ModelState:
    """The record of an adapted model; `AdapterError` for any other."""
    state = find_state(model) if isinstance(model, nn.Module) else None
    if state is None:
        raise AdapterError(
            f"this {type(model).__name__} has no adapter: rewrite(model, spec) returns the adapted model and leaves "
            "the one it was given as it was"
        )
    return state


def record_of(model: nn.Module, name: str) -> AdapterRecord:
    state = state_of(model)
    if name not in state.adapters:
        raise AdapterError(f"no adapter {name!r} in this model; it has {listing(state.adapters)}")
    return state.adapters[name]


def base_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the model without the adapters grafted into it; wrappers give what is inside, and no name.

    Args:
        every_name: list a module that stands at several places under each of its names.
    """
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Container):
                yield from walk(f"{prefix}.{name}" if prefix else name, child)
        if every_name:
            seen.discard(id(module))

    return walk("", model)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every base parameter under each of its names, in names without wrappers."""
    for path, module in base_modules(model, every_name=True):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{path}.{name}" if path else name), parameter


def lookup(model: nn.Module, path: str) -> nn.Module:
    """The module of a name without wrappers. Raises `AdapterError` where there is none."""
    module = unwrap(model)
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise AdapterError(f"this {type(unwrap(model)).__name__} has no module {path!r}: {part!r} is not there")
        module = unwrap(child)
    return module


def strip_wrappers(model: M) -> M:
    """Take the wrappers of children out of a model, in place: what is merged or exported has none."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and (inner := unwrap(child)) is not child:
                module._modules[name] = inner
    return model


def forget_lost(model: nn.Module, name: str) -> AdapterRecord:
    """The record of an adapter, brought down to what is still where it was grafted."""
    state, record = state_of(model), record_of(model, name)
    lost = set(_lost(record, name, dict(base_modules(model))))
    if lost:
        groups = (Group(g.method, tuple(s for s in g.sites if s.name not in lost)) for g in record.groups)
        train = tuple(path for path in record.train if path not in lost)
        ties = tuple(tie for tie in record.ties if tie.path not in lost)
        kept = tuple(group for group in groups if group.sites)
        record = state.adapters[name] = replace(record, groups=kept, train=train, ties=ties)
    return record


def _lost(record: AdapterRecord, name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Sites and trained modules of an adapter that are no longer where they were grafted."""

    def grafted(path: str) -> bool:
        adapters = modules[path]._modules.get(ADAPTERS) if path in modules else None
        return adapters is not None and name in adapters._modules

    lost = [site.name for site in record.sites if not grafted(site.owner)]
    lost += [path for path in record.train if not grafted(path)]
    return lost + [t.path for t in record.ties if t.path not in modules or TIED not in modules[t.path].__dict__]


def grafted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`base_modules` of an adapted model, each owner of an adapter where it was grafted.

    Raises:
        AdapterError: one was replaced by another module, or moved, since.
    """
    modules = dict(base_modules(model))
    for name, record in state_of(model).adapters.items():
        if lost := _lost(record, name, modules):
            raise AdapterError(
                f"adapter {name!r} was grafted into {listing(lost)}, and the module there is another one now: it was "
                "replaced or moved after rewrite. Put it back, or rewrite the model as it is now; "
                f"fg.remove(model, {name!r}) takes the rest of the adapter out"
            )
    return modules
