"""What a model knows of the adapters grafted into it: one record at the root, the tensors at their sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .errors import AdapterError, listing
from .method import Method
from .sites import Site
from .spec import Spec

STATE = "_fxgraft"  # the record, in the root's __dict__
ADAPTERS = "fxgraft"  # child of every owner: its adapters by name
SHARED = "fxgraft_shared"  # child of the root: tensors that sites share

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Group:
    """Sites of one adapter that one method config serves; they share that method's shared tensors."""

    method: Method
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class AdapterRecord:
    """One named adapter: its spec as given, its resolved sites, the modules trained with it."""

    spec: Spec
    groups: tuple[Group, ...]
    train: tuple[str, ...]
    created_by: str = "graft"

    def __deepcopy__(self, memo: Any) -> AdapterRecord:
        return self

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)


@dataclass
class ModelState:
    """All adapters of a model. `trained` are the base parameters that required grad before the first rewrite."""

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()


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
        self.__dict__["shared"] = shared

    def tensors(self) -> dict[str, Any]:
        """Every tensor by name, derived ones included."""
        return {**self._parameters, **self._buffers}

    def shared_tensors(self) -> dict[str, Any]:
        """The tensors this site shares with the others of its group; empty where there are none."""
        shared = self.__dict__["shared"]
        return shared.tensors() if shared is not None else {}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(t.shape)}" for name, t in self.tensors().items())


def unwrap(model: M) -> M:
    """The model inside `torch.compile`'s and data-parallel wrappers."""
    while True:
        inner = model.__dict__.get("_orig_mod") or model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner  # type: ignore[assignment]


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


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the model without the adapters grafted into it."""
    seen: set[int] = set()

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield prefix, module
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, Container):
                yield from walk(f"{prefix}.{name}" if prefix else name, child)

    return walk("", model)
