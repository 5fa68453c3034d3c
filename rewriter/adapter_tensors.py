"""Where an adapter's tensors live in a model: containers beside the base's own children."""

from __future__ import annotations

from typing import Any

from torch import nn

from .calls.sample_rows import UNPROVEN, Rows
from .method import Method
from .modules import missing_values
from .modules.offloaded import HOOK, stay
from .sites import Site

ADAPTERS = "fxgraft"  # child of every owner: its adapters by name
TIED = "fxgraft_tied"  # plain attribute: adapter -> parameter -> (module of a trained copy, its parameter instead)
PARAMETERS = "trained_parameters"  # child of an adapter at an owner: its copies of single parameters
SHARED = "fxgraft_shared"  # child of the root: tensors that sites share


def adapter_child(owner: nn.Module, name: str) -> nn.Module | None:
    """What an owner holds of an adapter: tensors, a container of several sites', or a trained copy of itself."""
    adapters = owner._modules.get(ADAPTERS)
    return None if adapters is None else adapters._modules.get(name)


def parameter_holder(owner: nn.Module, name: str) -> TrainedParameters | None:
    """The trained copies of single parameters that an owner has of an adapter."""
    child = adapter_child(owner, name)
    held = None if child is None else child._modules.get(PARAMETERS)
    return held if isinstance(held, TrainedParameters) else None


class Container(nn.Module):
    """A named place for adapter tensors; it computes nothing."""

    def forward(self, x: Any) -> Any:
        """The input: a root or a trained head that is an `nn.Sequential` calls every child it has."""
        return x


class TrainedParameters(Container):
    """An adapter's own copies of single parameters of one owner, under the owner's names for them."""


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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == HOOK:
            stay(self, value)

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
