"""Put dialect nodes into the graph of an owner and switch between adapters.

An owner is the module that owns a target weight. Grafting gives it a child with the adapter's tensors and a class
whose forward is the owner's traced graph with the dialect nodes in it. Owners of equal structure with equal adapters
share ONE class, so `torch.compile` compiles them once; switching adapters of equal structure changes a pointer only.
"""

from __future__ import annotations

import inspect
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

from .calls.call_values import current
from .calls.disabled import Switch, base_forward, nothing
from .capture.observe import Read, is_bookkeeping
from .capture.trace import trace
from .capture.watched import captured
from .dialect import eager_form
from .errors import AdapterError, CaptureError, FxgraftError
from .method import Method
from .modules.pending import keeps_values
from .modules.standin import followed, only_off, plain, retrained
from .sites import NoMatch, Site, find_linears
from .state import ADAPTERS, TIED, AdapterTensors, Container, lookup

SLOT = "fxgraft_slot"  # plain attribute of an owner: the active adapter's tensors
HOOKED = "_old_forward"  # plain attribute where accelerate keeps the forward that its hook on a module calls
HOSTED = "fxgraft_hosted"  # plain attribute of a host: adapter -> the owners below whose products it computes
FOLLOWS = "fxgraft_follows"  # plain attribute: what of TIED is active
WEIGHT = "fxgraft_weight"  # plain attribute of an owner: what the delta of a slot is multiplied with, if not 1
BASE = "fxgraft_base"  # plain attribute of an owner: its class before grafting
FUSED = f"{BASE}_fused"  # plain attribute: an attribute that allows a fused path, and the value that forbids it
SWITCH = "fxgraft_switch"  # plain attribute of an owner: the model's switch
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
    fxgraft_reads: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set; where the graph depends on the attribute, take the class of the new value. All or nothing."""
        if name == "__class__":
            return super().__setattr__(name, value)
        slots = {**self.__dict__.get("_parameters", {}), **self.__dict__.get("_buffers", {})}
        before = slots.get(name, self.__dict__.get(name, self))
        super().__setattr__(name, value)
        method = name != "forward" and callable(getattr(base_class(self), name, None)) and not is_bookkeeping(name)
        if name not in self.fxgraft_reads and not method and (name not in slots or (before is None) == (value is None)):
            return
        try:
            renew_class(self)
        except FxgraftError:
            if before is self:
                super().__delattr__(name)
            else:
                super().__setattr__(name, before)
            raise

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As for any module; a copy that an adapter trains shows NaN where `to_empty` has taken its values."""
        result = super()._apply(fn, recurse)
        adapters = self._modules.get(ADAPTERS)
        copies = [m for m in adapters._modules.values() if not isinstance(m, Container)] if adapters is not None else []
        if copies and not keeps_values(fn):
            with torch.no_grad():
                for tensor in (t for m in copies for t in (*m.parameters(), *m.buffers())):  # type: ignore[union-attr]
                    if tensor.is_floating_point() and not tensor.is_meta:
                        tensor.fill_(float("nan"))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class cannot be imported; it is a function of the base class and the slots.
        base = base_class(self)
        if base.__reduce__ is not object.__reduce__:
            return base.__reduce__(self)
        own = getattr(base, "__getstate__", None)
        state = attributes(self) if own is None or own is object.__getstate__ else own(self)
        return (_bare, (base,), state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        base = base_class(self)
        self.__class__ = base  # type: ignore[assignment]
        base.__setstate__(self, state)
        renew_class(self)


def _bare(base: type[nn.Module]) -> nn.Module:
    """An empty module of the class that grafting gives `base`, to be filled."""
    cls = _class((base, "bare"), base, {})
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
    if BASE not in module.__dict__ and ADAPTERS not in module._modules:
        return module
    base = base_class(module)
    view = object.__new__(base)  # the class' own may ask for arguments, and that of a GraphModule makes another class
    hidden: tuple[str, ...] = (SLOT, WEIGHT, BASE, SWITCH, TIED, FOLLOWS, HOSTED)
    hidden += ("forward", HOOKED) if _hooked(module) else ()
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
    for attribute in (TIED, HOSTED):
        if (held := owner.__dict__.get(attribute)) is not None:
            held.pop(name, None)
            if not held:
                del owner.__dict__[attribute]


def tie(module: nn.Module, adapter: str, attribute: str, trained: nn.Module, name: str) -> None:
    """Let a parameter of a module be that of a trained copy while the adapter is active."""
    path, _, leaf = name.rpartition(".")
    module.__dict__.setdefault(TIED, {}).setdefault(adapter, {})[attribute] = (lookup(trained, path), leaf)


@dataclass(frozen=True)
class Change:
    """A switch of one owner, ready to be made: nothing of it can fail any more."""

    owner: nn.Module
    slots: tuple[nn.Module, ...]
    weights: Mapping[int, torch.Tensor]
    follows: Mapping[str, tuple[nn.Module, str]]
    cls: type[nn.Module]
    switch: Switch

    def make(self) -> None:
        """Slots first, then the class, then what the old class needed: a call going on elsewhere finds its tensors."""
        attributes = self.owner.__dict__
        attributes.setdefault(BASE, type(self.owner))
        attributes[SWITCH] = self.switch
        new: dict[str, Any] = {f"{SLOT}{index}": tensors for index, tensors in enumerate(self.slots)}
        new |= {f"{WEIGHT}{index}": weight for index, weight in self.weights.items()}
        if self.follows:
            new[FOLLOWS] = dict(self.follows)
        attributes.update(new)
        self.owner.__class__ = self.cls
        _follow_class(self.owner)
        for attribute in [a for a in attributes if a.startswith((SLOT, WEIGHT, FOLLOWS)) and a not in new]:
            del attributes[attribute]


def planned(owner: nn.Module, names: Mapping[str, float], switch: Switch) -> Change:
    """The switch of an owner to these adapters (those it has), in order, with their weights. Changes nothing.

    Raises:
        CaptureError: the class that computes them cannot be built.
    """
    adapters = owner._modules.get(ADAPTERS)
    slots: list[Any] = []
    weights: dict[int, torch.Tensor] = {}
    for name, weight in names.items():
        child = adapters._modules.get(name) if adapters is not None else None
        added: list[Any] = _own_sites(owner, name) if isinstance(child, Container) else [] if child is None else [child]
        for within in owner.__dict__.get(HOSTED, {}).get(name, ()):
            below = site_tensors(lookup(owner, within), name)
            added += [t for t in below if t.site is not None and t.site.host is not None]
        if weight != 1:
            for index, module in enumerate(added, len(slots)):
                weights[index] = _weight_tensor(weight, module)
        slots += added
    follows: dict[str, Any] = {}
    for name in names:
        follows |= owner.__dict__.get(TIED, {}).get(name, {})
    return Change(owner, tuple(slots), weights, follows, _class_for(owner, slots, weights, follows), switch)


def _own_sites(owner: nn.Module, name: str) -> list[AdapterTensors]:
    """The tensors at the sites whose products the owner computes itself."""
    return [t for t in site_tensors(owner, name) if t.site is not None and t.site.host is None]


def host(module: nn.Module, name: str, within: str) -> None:
    """Let a module compute, for an adapter, products with the weights of an owner below it."""
    held = module.__dict__.setdefault(HOSTED, {})
    held[name] = tuple(dict.fromkeys((*held.get(name, ()), within)))


def _weight_tensor(weight: float, module: nn.Module) -> torch.Tensor:
    """A tensor, so that a compiled model takes another value as it is; on the device of what it weights."""
    like = next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(weight, dtype=dtype, device="cpu" if like.is_meta else like.device)


def restore_class(owner: nn.Module) -> None:
    """Give an owner without adapters its original class back."""
    owner.__class__ = owner.__dict__.pop(BASE)
    for attribute in [a for a in owner.__dict__ if a.startswith((SLOT, WEIGHT, FOLLOWS, FUSED, SWITCH, TIED, HOSTED))]:
        del owner.__dict__[attribute]
    _follow_class(owner)


def forbid_fused(module: nn.Module, attribute: str, value: object, switch: Switch) -> None:
    """Let an attribute that allows a fused path over adapted children read as `value`, except inside `disabled`."""
    module.__dict__.setdefault(BASE, type(module))
    module.__dict__.update({FUSED: (attribute, value), SWITCH: switch})
    renew_class(module)


def allow_fused(module: nn.Module) -> None:
    """Undo `forbid_fused`."""
    if module.__dict__.pop(FUSED, None) is None:
        return
    if ADAPTERS in module._modules or TIED in module.__dict__:
        renew_class(module)
    else:
        restore_class(module)


# -- classes -----------------------------------------------------------------------------------------------------
_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()
_sources = itertools.count()


def _slots(owner: nn.Module) -> list[nn.Module]:
    return [value for key, value in owner.__dict__.items() if key.startswith(SLOT)]


def _hooked(owner: nn.Module) -> bool:
    """Whether accelerate put a hook on a module after it was grafted."""
    return BASE in owner.__dict__ and getattr(owner.__dict__.get(HOOKED), "__self__", None) is owner


def check_forward(owner: nn.Module, path: str) -> None:
    """Raise `AdapterError` where a switch would have no effect: the forward was replaced on a grafted module."""
    if BASE in owner.__dict__ and "forward" in owner.__dict__ and not _hooked(owner):
        raise AdapterError(
            f"the forward of {path!r} was replaced on the instance after rewrite, so switching adapters would not "
            "reach it: put the replacement on the base model's module before rewrite, or use a forward hook"
        )


def _follow_class(owner: nn.Module) -> None:
    """accelerate's hook on a module calls the forward that it found there: make it that of the class now."""
    if "forward" in owner.__dict__ and getattr(owner.__dict__.get(HOOKED), "__self__", None) is owner:
        owner.__dict__[HOOKED] = types.MethodType(type(owner).forward, owner)


def _weights(owner: nn.Module) -> dict[int, torch.Tensor]:
    return {int(k.removeprefix(WEIGHT)): v for k, v in owner.__dict__.items() if k.startswith(WEIGHT)}


def renew_class(owner: nn.Module) -> None:
    """Give an owner the class that its slots and attributes ask for now."""
    owner.__class__ = _class_for(owner, _slots(owner), _weights(owner), owner.__dict__.get(FOLLOWS, {}))
    _follow_class(owner)


def _class_for(
    owner: nn.Module, slots: Sequence[nn.Module], weights: Mapping[int, Any], follows: Mapping[str, Any]
) -> type[nn.Module]:
    """The class that computes an owner with these slots; `weights` says which of them are weighted."""
    base, fused = base_class(owner), owner.__dict__.get(FUSED)
    unfused = {} if fused is None else {fused[0]: only_off(*fused)}
    if slots and not isinstance(slots[0], AdapterTensors):
        names, namespace = retrained(base, owner, 0 in weights)
        return _class((base, "retrained", names, 0 in weights, fused), base, {**namespace, **unfused})
    if not slots:
        held = tuple((name, leaf) for name, (_, leaf) in follows.items())
        tied = {name: followed(name) for name, _ in held}
        return _class((base, held, fused), base, {**plain(base), **tied, **unfused})
    view = plain_view(owner)
    traced = trace(view)
    given: list[Site] = [s.site for s in slots]  # type: ignore[misc]
    sites = [site.at_host() for site in given]
    described = tuple(
        (site.weight, site.bias, site.offset, site.parts, slots[index].method, index in weights)
        for index, site in enumerate(sites)
    )
    key = (traced.signature, described)
    known = _classes.get(key)
    if known is None:
        parameters = {n: p for n, p in view._parameters.items() if p is not None}
        for within in dict.fromkeys(site.within for site in given if site.within):
            below = lookup(owner, within)._parameters
            parameters.update({f"{within}.{n}": p for n, p in below.items() if p is not None})
        adapters = [(site, slots[i].method, i in weights) for i, site in enumerate(sites)]
        graph = graft_graph(traced.graph, parameters, adapters)  # type: ignore[arg-type]
        forward = _compile(graph, base, traced.reads)
        reads = frozenset(read.path[0] for read in traced.reads if read.root is None)
        known = _class(key, base, {"forward": forward, "fxgraft_graph": graph, "fxgraft_reads": reads})
        weakref.finalize(known, linecache.cache.pop, forward.__code__.co_filename, None)
    return known


def _class(key: tuple[Any, ...], base: type[nn.Module], namespace: Mapping[str, Any]) -> type[nn.Module]:
    known = _classes.get(key)
    if known is None:
        known = type(f"Grafted{base.__name__}", (Grafted, base), {"__module__": base.__module__, **namespace})
        _classes[key] = known
    return known


_UNLESS_OFF = """\
    fxgraft_off = fxgraft_nothing.keys
    if fxgraft_off is not fxgraft_nothing and self.fxgraft_switch.key in fxgraft_off:
        return fxgraft_base_forward(self, {given})"""


def _compile(graph: fx.Graph, base: type[nn.Module], reads: Sequence[Read]) -> Any:
    """The graph as a Python function with its source where tracebacks find it; inside `disabled` the base's forward."""
    code = eager_form(graph).python_code("self")
    namespace = {**code.globals, "fxgraft_nothing": nothing, "fxgraft_base_forward": base_forward(base)}
    exec(code.src, namespace)
    given = ", ".join(_passed(p) for p in list(inspect.signature(namespace["forward"]).parameters.values())[1:])
    first = [_UNLESS_OFF.format(given=given)]
    if conditions := _conditions(reads, namespace):
        namespace["fxgraft_renewed"] = _renewed
        first.append(f"    if {' or '.join(conditions)}:\n        return fxgraft_renewed(self)({given})")
    lines = code.src.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    source = "\n".join([*lines[: start + 1], *first, *lines[start + 1 :]])
    file = f"<fxgraft Grafted{base.__name__}.{next(_sources)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace["forward"]


def _passed(parameter: inspect.Parameter) -> str:
    """A parameter of a function as the argument that hands it on."""
    kinds = {parameter.VAR_POSITIONAL: "*{0}", parameter.VAR_KEYWORD: "**{0}", parameter.KEYWORD_ONLY: "{0}={0}"}
    return kinds.get(parameter.kind, "{0}").format(parameter.name)  # type: ignore[call-overload]


def _conditions(reads: Sequence[Read], namespace: dict[str, Any]) -> list[str]:
    """Python expressions that say whether something a graph holds as a constant has changed since.

    What the owner itself holds is not among them: `Grafted.__setattr__` sees it.
    """
    found = []
    for index, read in enumerate(read for read in reads if read.watchable):
        place, path = "self", read.path
        if read.root is not None:
            place = f"_root{index}"
            namespace[place] = read.root
            if isinstance(read.root, types.CellType):
                place, path = f"{place}.cell_contents", path[1:]
        for part in path:
            place = f"{place}.{part}" if part.isidentifier() else f"getattr({place}, {part!r})"
        namespace[f"_value{index}"] = read.value
        differs = f"{place} {'is not' if read.value is None or isinstance(read.value, bool) else '!='} _value{index}"
        in_cell = isinstance(read.root, types.CellType)
        found.append(f"(not fxgraft_captured() and {differs})" if in_cell else differs)
        namespace["fxgraft_captured"] = captured
    return found


@torch._disable_dynamo  # torch.compiler.disable would load Dynamo at import
def _renewed(owner: nn.Module) -> Any:
    """The forward of an owner after something its graph depends on has changed outside of it."""
    before = type(owner)
    renew_class(owner)
    if type(owner) is before:
        raise CaptureError(
            f"{base_class(owner).__name__} depends on a value that is never what it was: adapt other layers"
        )
    return types.MethodType(type(owner).forward, owner)


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
        weighted: the delta is multiplied by a weight in `add`; such an adapter cannot take the product's place.
    """

    def __init__(
        self, graph: fx.Graph, site: Site, x: fx.Node, y: fx.Node, slot: int, method: Method, weighted: bool = False
    ) -> None:
        self.graph, self.site, self.x, self.weighted = graph, site, x, weighted
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
        """`y + delta`, or `y + weight * delta`."""
        if self.weighted:
            delta = self.call(torch.mul, delta, self._mark(self.graph.get_attr(f"{WEIGHT}{self._slot}")))
        if self.site.whole:
            return self.call(add_delta, self._output, delta)
        # The sum is read through the whole output only: an operator whose schema says that it writes survives cleanup.
        self.call(torch.ops.aten.add_.Tensor, self.y, delta)
        return self._output


def graft_graph(
    graph: fx.Graph, parameters: Mapping[str, torch.Tensor], adapters: Sequence[tuple[Site, Method, bool]]
) -> fx.Graph:
    """`y = linear(x, W, b)` -> `y = linear(x, W, b); y += fxgraft::<method>(x, ...)`, for each adapter in order.

    Where an adapter's third entry is true its delta is weighted. The graph it is given is not changed.
    """
    result = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copied)
    result.output(output)
    result.set_codegen(graph._codegen)
    found = find_linears(result, parameters)
    replaced: dict[fx.Node, fx.Node] = {}

    def current(node: fx.Node) -> fx.Node:
        """What stands for a node of the base graph now: a product's sum with its adapters."""
        while node in replaced:
            node = replaced[node]
        return node

    for slot, (site, method, weighted) in enumerate(adapters):
        linears = found.get(site.weight, NoMatch(f"no parameter {site.weight!r}"))
        if isinstance(linears, NoMatch):
            raise CaptureError(f"{site.name!r} cannot be adapted: {linears.reason}")
        for linear in linears:
            y = current(linear.node)
            before = set(result.nodes)
            with result.inserting_before(y.next):
                new = method.emit(Emitter(result, site, current(linear.x), y, slot, method, weighted))
            made = set(result.nodes) - before
            if new is not y:
                y.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)  # noqa: B023 (called at once)
                replaced[y] = new
    result.lint()
    return result
