"""The form of an adapter: in what tensors it stands where adapters come and go.

    a slot of a bank             y[i] += fxgraft::bank_<...>(x[i], ids, stacks)       `slots` adapters, one per sample
    inputs of an exported graph  y += products of x and the tensors                   one adapter, or such stacks

A form says which tensors these are, what their dimensions mean, and how an adapter of a method is read into them; what
a bank, a graph, a file or a session need to know follows from that. Adapters of any low-rank method have a form
without saying anything; a method of another kind declares one beside it, `class X(Form, key=..., of=Method)`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .calls.sample_rows import in_place, samples_first
from .dialect import halves_of
from .emitter import Emitter
from .errors import AdapterError
from .method import ADAPTER_IDS, Decl, Declaration, InitContext, Method, Tensors
from .sites import Site

Axes = Mapping[str, tuple[str, ...]]
SLOTS = "slots"  # the first dimension of a stack
RANK = "rank"  # the size that callers may ask for
_SITE = ("in", "out")  # sizes that are the site's, not the adapter's

_forms: dict[type[Method], list[type[Form]]] = {}
F_ = TypeVar("F_", bound="Form")


@dataclass(frozen=True)
class Form(Method, key=""):
    """One adapter, or a stack of them: the same tensors with a first dimension of slots, of which 0 stays zero and is
    the base model.

    A subclass names the dimensions of its tensors in `axes`: `in`, `out`, and its own, each of which is a field. The
    last tensor is the right factor of the last product: the delta is linear in it.

    Args:
        slots: how many adapters there is room for; 0 is one adapter and no dimension of slots.
        graph: lie as an exported graph takes a stack, `(..., in, q)` in the place of `(..., q, in)`, which needs no
            transpose. One adapter always does.
    """

    unmergeable: ClassVar[str | None] = (
        "it holds several adapters and every sample chooses one; merge the adapted model of one of them"
    )
    not_low_rank: ClassVar[str | None] = unmergeable

    #: the dimensions of every tensor of a site, as they lie in a bank
    axes: ClassVar[Axes] = {}
    #: those of tensors that all sites share
    shared_axes: ClassVar[Axes] = {}
    #: what it holds means something under a projection only that all adapters derive alike, on the same sites; such a
    #: form is a bank's only: graphs take tensors that say all there is
    derives: ClassVar[bool] = False
    #: own axes along which zeros would not be nothing: every slot of a stack has the same size there
    whole: ClassVar[tuple[str, ...]] = ()
    #: what adapters do whose sum is none of this form; None: stacked along their rank they are the sum
    no_sum: ClassVar[str | None] = None
    #: the operator of a bank, `(x, ids, *tensors) -> delta`
    operator: ClassVar[Callable[..., Tensor]]
    #: the same in plain products, `(x, *tensors) -> delta`, tensors as a graph takes them; their leading dimensions are
    #: those of the samples
    products: ClassVar[Callable[..., Tensor]]

    slots: int = 0
    graph: bool = False

    def __init_subclass__(cls, key: str, of: type[Method] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(key, **kwargs)
        if of is not None:
            _forms.setdefault(of, []).append(cls)

    # -- reading an adapter ------------------------------------------------------------------------------------------
    @classmethod
    def holds(cls, method: Method) -> bool:
        """Whether an adapter of this method, of the kind the form is of, can be read into it."""
        return True

    @classmethod
    @abc.abstractmethod
    def read(cls, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        """The tensors of one adapter at one site, shared ones too, as they lie in a bank; scales folded in."""

    @classmethod
    def stack_of(cls, methods: Sequence[Method], slots: int) -> Form | None:
        """The stack for adapters with these configs, where they alone decide its sizes; None: they do not."""
        first = methods[0]
        alike = cls.derives and all(other.meaning() == first.meaning() for other in methods)
        return cls(**vars(first), slots=slots) if alike else None

    def entry(self, method: Method, shared: Tensors, local: Tensors) -> dict[str, Tensor]:
        """What an adapter puts into its slot, which may be larger: the rest stays zero."""
        if self.derives and not method.meaning().items() <= self.meaning().items():
            raise AdapterError(
                f"{method} has another projection than the bank's {self}; make the bank with expand=True"
            )
        return self.read(method, shared, local)

    @classmethod
    def opened(cls: type[F_], tensors: Tensors, slots: int = 0) -> tuple[F_, dict[str, Tensor]]:
        """The form in which a graph takes these tensors, and them in it. They are one adapter's, or stacks."""
        sizes: dict[str, Any] = {
            axis: size
            for name, axes in cls.axes.items()
            for axis, size in zip(axes, tensors[name].shape[-len(axes) :], strict=True)
            if axis not in _SITE
        }
        form = cls(slots=slots, graph=True, **sizes)
        turned = {name: t.transpose(-1, -2) if form._turns(name) else t for name, t in tensors.items()}
        return form, turned

    # -- sizes -------------------------------------------------------------------------------------------------------
    def _turns(self, name: str) -> bool:
        return (self.graph or not self.slots) and self.axes[name][-1] == "in"

    def layout(self, name: str) -> tuple[str, ...]:
        """The axes of a tensor as it lies here."""
        axes = self.axes[name]
        if self._turns(name):
            axes = (*axes[:-2], axes[-1], axes[-2])
        return (SLOTS, *axes) if self.slots else axes

    @property
    def sizes(self) -> dict[str, int]:
        """The axes that are not the site's."""
        own = {axis: getattr(self, axis) for axes in self.axes.values() for axis in axes if axis not in _SITE}
        return {SLOTS: self.slots, **own} if self.slots else own

    @property
    def open_axes(self) -> tuple[str, ...]:
        """The axes whose size may be another one: for another adapter, or in a larger stack."""
        return tuple(axis for axis in self.sizes if not (self.slots and axis in self.whole))

    def grown(self, tensors: Tensors, step: int) -> dict[str, Tensor]:
        """The same function in tensors that are larger by `step` along the axes on which zeros add nothing."""
        more = dict.fromkeys(set(self.sizes) - set(self.whole), step)
        return {
            name: F.pad(tensor, [pad for axis in reversed(self.layout(name)) for pad in (0, more.get(axis, 0))])
            for name, tensor in tensors.items()
        }

    @classmethod
    def right(cls) -> str:
        """The tensor that the delta is linear in: the right factor of the last product."""
        return [*cls.axes][-1]

    @classmethod
    def weighted(cls, parts: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
        """The sum of adapters under weights, as one adapter; tensors as a graph takes one adapter's."""
        made = {}
        for name in cls.axes:
            terms = [tensors[name] for tensors, _ in parts]
            if name == cls.right():
                wide = torch.promote_types(terms[0].dtype, torch.float32)
                terms = [(t.to(wide) * w).to(t.dtype) for t, (_, w) in zip(terms, parts, strict=True)]
            layout = cls().layout(name)  # counted from the end: experts have a dimension before it
            made[name] = torch.cat(terms, layout.index(RANK) - len(layout)) if len(terms) > 1 else terms[0]
        return made

    # -- as a method -------------------------------------------------------------------------------------------------
    @property
    def inputs(self) -> tuple[str, ...]:
        return (ADAPTER_IDS,) if self.slots else ()

    def names_at(self, site: Site) -> Collection[str]:
        """The tensors that a site has."""
        return self.axes

    def declare(self, sites: Sequence[Site]) -> Declaration:
        local = []
        for site in sites:
            size = {**self.sizes, "in": site.in_features, "out": site.out_features}
            shapes = {name: tuple(size[axis] for axis in self.layout(name)) for name in self.names_at(site)}
            local.append({name: Decl(shape, "frozen") for name, shape in shapes.items()})
        return Declaration(local)

    def initialise(
        self, sites: Sequence[Site], shared: Tensors, local: Sequence[Tensors], context: InitContext
    ) -> None:
        for tensors, axes in ((shared, self.shared_axes), *((one, self.axes) for one in local)):
            for name in tensors.keys() & axes.keys():
                tensors[name].zero_()

    def arguments(self, e: Emitter) -> Sequence[fx.Node | None]:
        """What the operator takes behind x and the ids."""
        return [e.tensor(name) for name in self.axes]

    def emit(self, e: Emitter) -> fx.Node:
        if not self.slots:
            if halves_of(self.products) is not None and e.site.product.free_factors:
                return e.add(e.call(self.products, e.x, *self.arguments(e)))
            return e.add(e.unrolled(e.function(self.products, e.rows(e.x), *self.arguments(e))))
        ids, rows = e.given(ADAPTER_IDS), e.tensor("rows")
        x = e.call(samples_first, e.x, ids, rows)
        if self.graph:
            chosen = [e.call(torch.index_select, tensor, 0, ids) for tensor in self.arguments(e)]
            x = e.rows(x)
            products = e.function(self.products, e.call(_by_sample, x, ids), *chosen)
            delta = e.unrolled(e.call(_joined, products, x, ids))
        else:
            delta = e.call(self.operator, x, ids, *self.arguments(e))
        return e.add(e.call(in_place, delta, ids, rows))

    def to_dict(self) -> dict[str, Any]:
        told = super().to_dict()
        del told["graph"]  # of twins for an export only, which are never saved
        return told


def _aligned(x: Tensor, ids: Tensor) -> bool:
    """Whether x is `(batch, in)` or `(batch, tokens, in)`: the usual shapes cost no reshape in a graph."""
    return x.dim() in (2, 3) and statically_known_true(x.shape[0] == ids.shape[0])


def _by_sample(x: Tensor, ids: Tensor) -> Tensor:
    """`(batch, tokens, in)` of x `(batch, ..., in)`, or `(batch * tokens, in)`."""
    if _aligned(x, ids):
        return x if x.dim() == 3 else x.unsqueeze(1)
    return x.reshape(ids.shape[0], -1, x.shape[-1])


def _joined(y: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """y `(batch, tokens, out)` in the shape of x, with `out` last."""
    if _aligned(x, ids):
        return y if x.dim() == 3 else y.squeeze(1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# -- which form --------------------------------------------------------------------------------------------------------
def forms_of(method: Method) -> list[type[Form]]:
    """The forms that adapters of this method can be read into, the most special first; none for a form itself."""
    if isinstance(method, Form):
        return []
    found = [form for kind in type(method).__mro__ for form in _forms.get(kind, ())]
    return [form for form in found if form.holds(method)]


def form_of(method: Method) -> type[Form] | None:
    """The form in which a graph takes one adapter of this method at a site; None where only its whole weight will
    do."""
    return next((form for form in forms_of(method) if not form.derives), None)


def form_with(names: Collection[str]) -> type[Form] | None:
    """The form with tensors of these names, which is what a graph tells of a site."""
    known = [form for forms in _forms.values() for form in forms]
    return next((form for form in known if not form.derives and form.axes.keys() == set(names)), None)


def put_entry(place: Tensor, entry: Tensor) -> None:
    """Write an entry into its slot, or a stack into a larger one: the rest is zero."""
    place.zero_()[tuple(map(slice, entry.shape))].copy_(entry)
