"""What an adapter method is: a frozen config that declares its tensors and emits its operator.

A method is one file or one folder under `passes/methods/` with one subclass of `Method`. Nothing outside knows its
arithmetic: capture, graft, merge, checkpoints and exporters go through this interface.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from .emitter import Emitter
from .errors import MergeError, SpecError, listing
from .keywords import Config
from .sites import Site

Role = Literal["trainable", "frozen", "derived"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Decl:
    """One adapter tensor before it exists.

    Args:
        shape: its dimensions.
        role: `trainable` (a parameter, saved), `frozen` (a buffer, saved) or `derived` (a buffer recomputed from the
            config, never saved).
        dtype: None for the adapter's dtype, or a fixed one (indices).
    """

    shape: tuple[int, ...]
    role: Role = "trainable"
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Declaration:
    """All tensors of one method on a group of sites: `shared` live once at the root, `local[i]` at site i."""

    local: Sequence[Mapping[str, Decl]]
    shared: Mapping[str, Decl] = field(default_factory=dict)


@dataclass(frozen=True)
class InitContext:
    """What an initialisation may look at.

    Args:
        weights: for each site a callable-free view of the base weight in linear layout `(out, in)`, in the base dtype.
        update: the result of `estimate_update`, or None.
    """

    weights: Sequence[Tensor]
    update: Any = None


METHODS: dict[str, type[Method]] = {}
ADAPTER_IDS = "adapter_ids"


@dataclass(frozen=True)
class Method(Config, abc.ABC):
    """Base of the method configs. Subclasses are frozen dataclasses declared with `class X(Method, key="x")`.

    A method must say what tensors it has (`declare`), what they start from (`initialise`) and what stands in the graph
    (`emit`), and give its `factors`, or a `fold` of its own, or reasons why it has neither. The rest has a default.
    """

    key: ClassVar[str] = ""

    def __init_subclass__(cls, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = key
        if key:
            METHODS[key] = cls

    def __deepcopy__(self, memo: Any) -> Method:
        return self

    # -- what a method must say ------------------------------------------------------------------------------------
    @abc.abstractmethod
    def declare(self, sites: Sequence[Site]) -> Declaration:
        """The tensors for these sites; raises `SpecError` where the config does not fit them."""

    @abc.abstractmethod
    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        """Fill the trainable and frozen tensors in place. Not called on the meta device or before a load."""

    @abc.abstractmethod
    def emit(self, e: Emitter) -> fx.Node:
        """Insert the dialect node for one site and return the node that replaces the site's output."""

    def factors(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor]:
        """`A (r, in)` and `B (out, r)` of one site with `delta W = B A`, every scale folded into B."""
        raise MergeError(f"{type(self).__name__} is not a low-rank product: {self.not_low_rank}")

    #: why the method is not a low-rank product; None where it is
    not_low_rank: ClassVar[str | None] = None
    #: why the method cannot be folded into the base weight; None where it can
    unmergeable: ClassVar[str | None] = None

    # -- what it may say -------------------------------------------------------------------------------------------
    #: trained vectors over frozen projections: they take a learning rate of their own and no weight decay
    vectors: ClassVar[tuple[str, ...]] = ()
    #: fields that count in training or at the start only: given tensors compute the same whatever they say
    free: ClassVar[tuple[str, ...]] = ("dropout",)
    #: whether its operator multiplies with the base weight itself
    weighs: ClassVar[bool] = False
    #: whether a site's numbers depend on the sites before it (one projection handed out in order)
    by_order: ClassVar[bool] = False
    #: whether what it derives is drawn, and so compared with the saved adapter's where one is opened
    drawn: ClassVar[bool] = True
    #: whether what it derives has the size of the largest site under one config
    by_size: ClassVar[bool] = False

    def fitted(self, out_features: int, in_features: int) -> Method:
        """What `rewrite` takes at a site of this size: this config, or one with less where the site is too small."""
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a call brings for it: keyword arguments of the model's forward, which `Emitter.given` reads by name."""
        return ()

    def derive(self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors]) -> None:
        """Fill the derived tensors in place from the config alone; few methods have any. Not called on meta."""

    def seen_by(self, site: Site, shared: Tensors) -> Tensors:
        """The shared tensors as one site has them: views cut to its size, where they serve sites of several."""
        return shared

    def unscaled(self, shared: Tensors, local: Tensors) -> tuple[Tensor, Tensor, float]:
        """`A`, `B` and a scale with `delta W = scale * B A`, as the method trains them where it has a scale."""
        return (*self.factors(shared, local), 1.0)

    def fold(
        self, weight: Tensor, bias: Tensor | None, shared: Tensors, local: Tensors
    ) -> tuple[Tensor, Tensor | None]:
        """The merged weight `(out, in)` and bias `(out,)`, from float32 (or wider) inputs and in their dtype."""
        if self.unmergeable:
            raise MergeError(f"{type(self).__name__} cannot be merged: {self.unmergeable}")
        A, B = self.factors(shared, local)
        return weight + B.to(weight.dtype) @ A.to(weight.dtype), bias

    def adds_bias(self, site: Site) -> str | None:
        """Where the adapter changes the bias too, and a bias-free site needs one when it is merged: what to choose for
        a site that can have none. None where the bias stays as it is."""
        return None

    def meaning(self) -> dict[str, Any]:
        """What decides, beside the tensors, what an adapter computes; equal for configs that read tensors alike."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.free}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `method_from_dict` reads it back."""
        return {"method": self.key, **dataclasses.asdict(self)}


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """The inverse of `Method.to_dict`. Raises `SpecError` on an unknown method or field."""
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise SpecError(f"a method is given as a dict of its fields, given was {data!r}")
    values = dict(data)
    key = values.pop("method", None)
    cls = METHODS.get(key) if isinstance(key, str) else None
    if cls is None:
        raise SpecError(f"unknown method {key!r}; known are {listing(METHODS)}")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise SpecError(
            f"{cls.__name__} has no field {listing(sorted(unknown))}; its fields are {listing(sorted(known), 20)}. "
            "Was this written by a newer version of fxgraft?"
        )
    return cls(**values)
