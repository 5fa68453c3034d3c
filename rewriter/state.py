"""What a model knows of the adapters grafted into it: one record at the root, the tensors at their sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .adapter_tensors import TIED, adapter_child
from .base_names import base_modules
from .calls.disabled import Switch
from .errors import AdapterError, listing
from .method import Method
from .modules.wrappers import unwrap
from .sites import Site
from .spec import Spec

STATE = "_fxgraft"  # the record, in the root's __dict__


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
    """One named adapter: its spec as given, its resolved sites, the modules and the single parameters trained with it,
    and what follows them; `left` is what `all-linear` left out, and why."""

    spec: Spec
    groups: tuple[Group, ...]
    train: tuple[str, ...]
    created_by: str = "graft"
    ties: tuple[Tie, ...] = ()
    parameters: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __deepcopy__(self, memo: Any) -> AdapterRecord:
        return self

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    @property
    def fitted(self) -> bool:
        """Whether a site is too small for the spec and has less than it says."""
        asked = ((s, group.method, self.spec.method_at(s.answers)) for group in self.groups for s in group.sites)
        return any(m != to and m == to.fitted(s.out_features, s.in_features) for s, m, to in asked)

    @property
    def owners(self) -> tuple[str, ...]:
        """Paths of the modules whose class the adapter changes."""
        paths = [path for site in self.sites for path in (site.owner, site.computed)]
        return tuple(dict.fromkeys([*paths, *self.train, *(tied.path for tied in self.ties), *self.holders]))

    @property
    def holders(self) -> tuple[str, ...]:
        """Paths of the modules of which the adapter trains single parameters."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.parameters))


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


def forget_lost(model: nn.Module, name: str) -> AdapterRecord:
    """The record of an adapter, brought down to what is still where it was grafted."""
    state, record = state_of(model), record_of(model, name)
    lost = set(_lost(record, name, dict(base_modules(model))))
    if lost:
        groups = (Group(g.method, tuple(s for s in g.sites if s.name not in lost)) for g in record.groups)
        train = tuple(path for path in record.train if path not in lost)
        ties = tuple(tie for tie in record.ties if tie.path not in lost)
        parameters = tuple(name for name in record.parameters if name.rpartition(".")[0] not in lost)
        kept = tuple(group for group in groups if group.sites)
        record = state.adapters[name] = replace(record, groups=kept, train=train, ties=ties, parameters=parameters)
    return record


def _lost(record: AdapterRecord, name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Sites and trained modules of an adapter that are no longer where they were grafted."""

    def grafted(path: str) -> bool:
        return path in modules and adapter_child(modules[path], name) is not None

    lost = [site.name for site in record.sites if not grafted(site.owner)]
    lost += [path for path in (*record.train, *record.holders) if not grafted(path)]
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
