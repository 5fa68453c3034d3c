"""Put dialect nodes into the graph of an owner and switch between adapters.

An owner is the module that owns a target weight. Grafting gives it a child with the adapter's tensors and a class
whose forward is the owner's traced graph with the dialect nodes in it. Owners of equal structure with equal adapters
share ONE class, so `torch.compile` compiles them once; switching adapters of equal structure changes a pointer only.
"""

from __future__ import annotations

import itertools
import linecache
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .capture import trace
from .dialect import eager_form
from .errors import AdapterError, CaptureError
from .method import Method
from .percall import current
from .sites import NoMatch, Site, find_linears
from .state import ADAPTERS, TIED, AdapterTensors, Container, lookup

SLOT = "fxgraft_slot"  # plain attribute of an owner: the active adapter's tensors
_HOOKED = "_old_forward"  # plain attribute where accelerate keeps the forward that its hook on a module calls
FOLLOWS = "fxgraft_follows"  # plain attribute: what of TIED is active
BASE = "fxgraft_base"  # plain attribute of an owner: its class before grafting
PROVENANCE = "fxgraft"  # key in node.meta


@dataclass(frozen=True)
class Provenance:
    """Which pass made a node, for which site and method, and why it chose so."""

    made_by: str
    site: str
    method: str
    reason: str = ""


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a copy of a module takes over: not what `module.compile()` left on it, which calls the module itself."""
    return {key: value for key, value in module.__dict__.items() if key != "_compiled_call_impl"}


# -- owners ------------------------------------------------------------------------------------------------------
class Grafted(nn.Module):
    """Mixin of all generated classes: copying keeps the class, pickling rebuilds it.

    There is no `__deepcopy__`: a wrapper that hands unknown attributes to the module inside would find it there, and be
    copied as that module.
    """

    fxgraft_graph: fx.Graph | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class cannot be imported; it is a function of the base class and the slots.
        base = base_class(self)
        own = getattr(base, "__getstate__", None)
        state = attributes(self) if own is None or own is object.__getstate__ else own(self)
        return (_bare, (base,), state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = base_class(self)
        self.__class__ = base  # type: ignore[assignment]
        base.__setstate__(self, state)
        _set_class(self)


def _bare(base: type[nn.Module]) -> nn.Module:
    """An empty module of the class that grafting gives `base`, to be filled."""
    cls = _class((base, None), base, {})
    bare = cls.__new__(cls)
    bare.__dict__[BASE] = base
    return bare


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before grafting."""
    return module.__dict__.get(BASE) or type(module)


def plain_view(module: nn.Module) -> nn.Module:
    """The module as it was before grafting: original class, same tensors and children, no adapters.

    A module that was never grafted is returned as it is. The view shares every attribute with the module.
    """
    if BASE not in module.__dict__:
        return module
    base = base_class(module)
    view = base.__new__(base)
    hidden: tuple[str, ...] = (SLOT, BASE, TIED, FOLLOWS)
    hidden += ("forward", _HOOKED) if _hooked(module) else ()
    view.__dict__ = {k: v for k, v in attributes(module).items() if not k.startswith(hidden)}
    view.__dict__["_modules"] = {k: v for k, v in module._modules.items() if not isinstance(v, Container)}
    return view


def site_tensors(owner: nn.Module, adapter: str) -> list[AdapterTensors]:
    """The tensors of one adapter in one owner, a module per site."""
    container = owner._modules[ADAPTERS]._modules[adapter]  # type: ignore[index, union-attr]
    inner: list[AdapterTensors] = list(container._modules.values())  # type: ignore[union-attr, arg-type]
    return [container, *inner] if isinstance(container, AdapterTensors) else inner


def add_adapter(owner: nn.Module, name: str, child: nn.Module, key: str = "") -> None:
    """Register an adapter's tensors (or a retrained copy) under `fxgraft.<name>[.<key>]` of the owner.

    Tensors without a key hold those with one: an owner may have sites on `weight` and on other parameters.
    """
    if owner._modules.get(ADAPTERS) is None:
        owner._modules[ADAPTERS] = Container()
    adapters = owner._modules[ADAPTERS]
    assert adapters is not None
    holder = adapters._modules.get(name)
    if not key:
        if holder is not None:
            child._modules.update(holder._modules)
        adapters._modules[name] = child
        return
    if holder is None:
        holder = adapters._modules[name] = Container()
    if key in holder._modules or key in holder._parameters or key in holder._buffers:
        raise AdapterError(f"{type(owner).__name__} has two sites that would both be called {key!r}: adapt one of them")
    holder._modules[key] = child


def drop_adapter(owner: nn.Module, name: str) -> None:
    """Undo `add_adapter` and `tie`; the last adapter takes the container with it. No slot may point at it any more."""
    if (adapters := owner._modules.get(ADAPTERS)) is not None:
        adapters._modules.pop(name, None)
        if not adapters._modules:
            del owner._modules[ADAPTERS]
    if (ties := owner.__dict__.get(TIED)) is not None:
        ties.pop(name, None)
        if not ties:
            del owner.__dict__[TIED]


def tie(module: nn.Module, adapter: str, attribute: str, trained: nn.Module, name: str) -> None:
    """Let a parameter of a module be that of a trained copy while the adapter is active."""
    path, _, leaf = name.rpartition(".")
    module.__dict__.setdefault(TIED, {}).setdefault(adapter, {})[attribute] = (lookup(trained, path), leaf)


def activate(owner: nn.Module, names: Sequence[str]) -> None:
    """Point the owner's slots at these adapters (those it has) and give it the class that computes them, in order."""
    for attribute in [a for a in owner.__dict__ if a.startswith(SLOT)]:
        del owner.__dict__[attribute]
    adapters = owner._modules.get(ADAPTERS)
    slots: list[nn.Module] = []
    for name in names:
        if adapters is None or name not in adapters._modules:
            continue
        child = adapters._modules[name]
        slots += site_tensors(owner, name) if isinstance(child, Container) else [child]  # type: ignore[list-item]
    owner.__dict__.setdefault(BASE, type(owner))
    owner.__dict__.pop(FOLLOWS, None)
    for name in names:
        if ties := owner.__dict__.get(TIED, {}).get(name):
            owner.__dict__.setdefault(FOLLOWS, {}).update(ties)
    for index, tensors in enumerate(slots):
        owner.__dict__[f"{SLOT}{index}"] = tensors
    _set_class(owner)


def restore_class(owner: nn.Module) -> None:
    """Give an owner without adapters its original class back."""
    for attribute in [a for a in owner.__dict__ if a.startswith(SLOT)]:
        del owner.__dict__[attribute]
    owner.__dict__.pop(FOLLOWS, None)
    owner.__class__ = owner.__dict__.pop(BASE)
    _follow_class(owner)


# -- classes -----------------------------------------------------------------------------------------------------
_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()
_sources = itertools.count()


def _slots(owner: nn.Module) -> list[nn.Module]:
    return [value for key, value in owner.__dict__.items() if key.startswith(SLOT)]


def _set_class(owner: nn.Module) -> None:
    _choose_class(owner)
    _follow_class(owner)


def _hooked(owner: nn.Module) -> bool:
    """Whether accelerate put a hook on a module after it was grafted."""
    return BASE in owner.__dict__ and getattr(owner.__dict__.get(_HOOKED), "__self__", None) is owner


def check_forward(owner: nn.Module, path: str) -> None:
    """Raise `AdapterError` where a switch would have no effect: the forward was replaced on a grafted module."""
    if BASE in owner.__dict__ and "forward" in owner.__dict__ and not _hooked(owner):
        raise AdapterError(
            f"the forward of {path!r} was replaced on the instance after rewrite, so switching adapters would not "
            "reach it: put the replacement on the base model's module before rewrite, or use a forward hook"
        )


def _follow_class(owner: nn.Module) -> None:
    """accelerate's hook on a module calls the forward that it found there: make it that of the class now."""
    if "forward" in owner.__dict__ and getattr(owner.__dict__.get(_HOOKED), "__self__", None) is owner:
        owner.__dict__[_HOOKED] = types.MethodType(type(owner).forward, owner)


def _choose_class(owner: nn.Module) -> None:
    slots = _slots(owner)
    base = base_class(owner)
    if slots and not isinstance(slots[0], AdapterTensors):
        owner.__class__ = _retrained_class(base, owner)
        return
    if not slots:
        follows = tuple((name, held) for name, (_, held) in owner.__dict__.get(FOLLOWS, {}).items())
        owner.__class__ = _class((base, follows), base, {name: _followed(name) for name, _ in follows})
        return
    view = plain_view(owner)
    traced = trace(view)
    described = tuple((s.site.weight, s.site.bias, s.site.offset, s.site.parts, s.method) for s in slots)  # type: ignore[union-attr]
    key = (traced.signature, described)
    known = _classes.get(key)
    if known is None:
        parameters = {n: p for n, p in view._parameters.items() if p is not None}
        graph = graft_graph(traced.graph, parameters, [(s.site, s.method) for s in slots])  # type: ignore[misc, arg-type]
        known = _class(key, base, {"forward": _compile(graph, base.__name__), "fxgraft_graph": graph})
    owner.__class__ = known


def _class(key: tuple[Any, ...], base: type[nn.Module], namespace: Mapping[str, Any]) -> type[nn.Module]:
    known = _classes.get(key)
    if known is None:
        known = type(f"Grafted{base.__name__}", (Grafted, base), {"__module__": base.__module__, **namespace})
        _classes[key] = known
    return known


def _followed(name: str) -> property:
    """A parameter of a module, read from the trained copy that it is tied to."""
    return property(lambda self: getattr(*self.fxgraft_follows[name]))


#: how a parent reads lists and dictionaries of modules and parameters, and an `nn.Sequential`
_CONTAINER_READS = ("__getitem__", "__iter__", "__len__", "__contains__", "__reversed__", "keys", "values", "items")


def _retrained_class(base: type[nn.Module], owner: nn.Module) -> type[nn.Module]:
    """A class that stands for the trained copy in slot 0 in calls and reads; its own tensors stay the base's.

    A parent that reads `child.weight`, indexes a list of modules or calls another method than forward gets the trained
    values too.
    """
    children = (name for name, child in owner._modules.items() if not isinstance(child, Container))
    names = (*owner._parameters, *owner._buffers, *children)

    def handed_on(method: str) -> Any:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.fxgraft_slot0, method)(*args, **kwargs)

        return call

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fxgraft_slot0(*args, **kwargs)  # type: ignore[operator]

    def read(name: str) -> property:
        return property(lambda self: getattr(self.fxgraft_slot0, name))

    namespace = {name: read(name) for name in names}
    namespace |= {method: handed_on(method) for method in _CONTAINER_READS if hasattr(base, method)}
    return _class((base, "retrained", names), base, {**namespace, "forward": forward})


def _compile(graph: fx.Graph, name: str) -> Any:
    """The graph as a Python function, with its source where tracebacks find it."""
    code = eager_form(graph).python_code("self")
    file = f"<fxgraft Grafted{name}.{next(_sources)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    namespace = dict(code.globals)
    exec(compile(code.src, file, "exec"), namespace)
    return namespace["forward"]


def add_delta(y: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`y + delta` for a product's fresh result that nobody else reads: in place where no gradient flows.

    In training the sum is a new tensor: a linear's result is a view of a 2-d product, and autograd pays for a write
    into a view with a copy of the gradient.
    """
    if y.requires_grad or delta.requires_grad:
        return y + delta
    y += delta
    return y


# -- graphs ------------------------------------------------------------------------------------------------------
class Emitter:
    """What a method sees of one site while it inserts its operator.

    Attributes:
        graph: the graph being edited; the insertion point is right behind the site's product.
        site: the site.
        x: the input `(..., in)`; y: the output so far `(..., out)` of this site's part.
    """

    def __init__(self, graph: fx.Graph, site: Site, x: fx.Node, y: fx.Node, slot: int, method: Method) -> None:
        self.graph, self.site, self.x = graph, site, x
        self._output, self._slot = y, slot
        self._provenance = Provenance("graft", site.name, method.key)

    def _mark(self, node: fx.Node) -> fx.Node:
        node.meta[PROVENANCE] = self._provenance
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator or a function."""
        return self._mark(self.graph.call_function(target, args, kwargs))

    def tensor(self, name: str) -> fx.Node:
        """A tensor of this site."""
        return self._mark(self.graph.get_attr(f"{SLOT}{self._slot}.{name}"))

    def shared(self, name: str) -> fx.Node:
        """A tensor the sites of the adapter share."""
        return self._mark(self.graph.get_attr(f"{SLOT}{self._slot}.shared.{name}"))

    def given(self, name: str) -> fx.Node:
        """What the call brings for the method, one of `Method.inputs`."""
        return self.call(current, name)

    @property
    def y(self) -> fx.Node:
        if self.site.whole:
            return self._output
        return self.call(torch.narrow, self._output, -1, self.site.offset, self.site.out_features)

    def weight(self) -> fx.Node:
        """The base weight of this site in linear layout `(out, in)`."""
        node = self._mark(self.graph.get_attr(self.site.weight))
        if self.site.contracted == 0:
            node = self.call(torch.t, node)
        if not self.site.whole:
            node = self.call(torch.narrow, node, 0, self.site.offset, self.site.out_features)
        return node

    def bias(self) -> fx.Node | None:
        """The base bias `(out,)` of this site, or None."""
        if self.site.bias is None:
            return None
        node = self._mark(self.graph.get_attr(self.site.bias))
        return node if self.site.whole else self.call(torch.narrow, node, 0, self.site.offset, self.site.out_features)

    def training(self) -> fx.Node:
        """The owner's mode, as a value: True in training."""
        return self._mark(self.graph.get_attr("training"))

    def dropped(self, p: float) -> fx.Node:
        """The input with dropout `p` in training; the input itself for `p = 0`."""
        if p == 0:
            return self.x
        return self.call(F.dropout, self.x, p, self.training())

    def add(self, delta: fx.Node) -> fx.Node:
        """`y + delta`."""
        if self.site.whole:
            return self.call(add_delta, self._output, delta)
        # The sum is read through the whole output only: an operator whose schema says that it writes survives cleanup.
        self.call(torch.ops.aten.add_.Tensor, self.y, delta)
        return self._output


def graft_graph(
    graph: fx.Graph, parameters: Mapping[str, torch.Tensor], adapters: Sequence[tuple[Site, Method]]
) -> fx.Graph:
    """`y = linear(x, W, b)` -> `y = linear(x, W, b); y += fxgraft::<method>(x, ...)`, for each adapter in order.

    The graph it is given is not changed.
    """
    result = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copied)
    result.output(output)
    found = find_linears(result, parameters)
    replaced: dict[fx.Node, fx.Node] = {}

    def current(node: fx.Node) -> fx.Node:
        """What stands for a node of the base graph now: a product's sum with its adapters."""
        while node in replaced:
            node = replaced[node]
        return node

    for slot, (site, method) in enumerate(adapters):
        linears = found.get(site.weight, NoMatch(f"no parameter {site.weight!r}"))
        if isinstance(linears, NoMatch):
            raise CaptureError(f"{site.name!r} cannot be adapted: {linears.reason}")
        for linear in linears:
            y = current(linear.node)
            before = set(result.nodes)
            with result.inserting_before(y.next):
                new = method.emit(Emitter(result, site, current(linear.x), y, slot, method))
            made = set(result.nodes) - before
            if new is not y:
                y.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)  # noqa: B023 (called at once)
                replaced[y] = new
    result.lint()
    return result
