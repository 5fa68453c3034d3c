"""A grafted graph as Python: the base's forward inside `disabled`, a new one where what the graph read has changed."""

from __future__ import annotations

import inspect
import itertools
import linecache
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from .calls.disabled import base_forward, nothing
from .capture.absent_arguments import Absent, condition
from .capture.reads import Read, attribute_of
from .dialect import eager_form
from .errors import CaptureError, listing

_sources = itertools.count()


_UNLESS_OFF = """\
    fxgraft_off = fxgraft_nothing.keys
    if fxgraft_off is not fxgraft_nothing and self.fxgraft_switch.key in fxgraft_off:
        return fxgraft_base_forward(self, {given})"""


def compile_forward(
    graph: fx.Graph,
    base: type[nn.Module],
    reads: Sequence[Read],
    renewed: Callable[[nn.Module], Any],
    product: Callable[..., Any] | None = None,
    ways: Sequence[tuple[Absent, fx.Graph | None]] = (),
) -> Any:
    """The graph as a Python function with its source where tracebacks find it.

    `ways` are the graphs of calls that leave arguments out. Inside `disabled` it runs the base's forward; where
    something of `reads` has changed, what `renewed(self)` gives.
    """
    code = eager_form(graph).python_code("self")
    namespace = {**code.globals, "fxgraft_nothing": nothing, "fxgraft_base_forward": base_forward(base, product)}
    exec(code.src, namespace)
    parameters = list(inspect.signature(namespace["forward"]).parameters.values())[1:]
    given = ", ".join(map(_passed, parameters))
    first = [_UNLESS_OFF.format(given=", ".join(_to_base(p, base) for p in parameters))]
    if conditions := _conditions(reads, namespace):
        namespace["fxgraft_renewed"] = renewed
        first.append(f"    if {' or '.join(conditions)}:\n        return fxgraft_renewed(self)({given})")
    for index, (absent, other) in enumerate(ways):
        namespace[f"fxgraft_way{index}"] = _way(base, absent, other)
        asked = condition(absent, [way for way, _ in ways])
        first.append(f"    if {asked}:\n        return fxgraft_way{index}(self, {given})")
    lines = code.src.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    source = "\n".join([*lines[: start + 1], *first, *lines[start + 1 :]])
    file = f"<fxgraft Grafted{base.__name__}.{next(_sources)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace["forward"]


def _way(base: type[nn.Module], absent: Absent, graph: fx.Graph | None) -> Any:
    """The forward of a call that leaves these arguments out."""
    names = listing(sorted(absent))

    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"{base.__name__} was called without {names}, and where it is left out its forward takes another way, into "
            "which the adapter cannot be put: give it, or adapt other layers"
        )

    if graph is None:
        return refused
    code = eager_form(graph).python_code("self")
    namespace = dict(code.globals)
    file = f"<fxgraft Grafted{base.__name__}.{next(_sources)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    exec(compile(code.src, file, "exec"), namespace)
    way = namespace["forward"]
    weakref.finalize(way, linecache.cache.pop, file, None)
    return way


def _passed(parameter: inspect.Parameter) -> str:
    """A parameter of a function as the argument that hands it on."""
    kinds = {parameter.VAR_POSITIONAL: "*{0}", parameter.VAR_KEYWORD: "**{0}", parameter.KEYWORD_ONLY: "{0}={0}"}
    return kinds.get(parameter.kind, "{0}").format(parameter.name)  # type: ignore[call-overload]


def _to_base(parameter: inspect.Parameter, base: type[nn.Module]) -> str:
    """The same for the base's own forward, which may take it by name alone."""
    own = inspect.signature(base.forward).parameters.get(parameter.name)
    by_name = own is not None and own.kind is inspect.Parameter.KEYWORD_ONLY
    return f"{parameter.name}={parameter.name}" if by_name else _passed(parameter)


def _conditions(reads: Sequence[Read], namespace: dict[str, Any]) -> list[str]:
    """Python expressions that say whether something a graph holds as a constant has changed since.

    What the owner itself holds is not among them: `Grafted.__setattr__` sees it.
    """
    found = []
    for index, read in enumerate(read for read in reads if read.watchable):
        holder, value = "self" if read.root is None else f"_root{index}", f"_value{index}"
        namespace |= {value: read.value} if read.root is None else {holder: read.root, value: read.value}
        for depth, name in enumerate(read.path[:-1]):
            in_cell = depth == 0 and isinstance(read.root, types.CellType)
            holder = f"{holder}.cell_contents" if in_cell else attribute_of(holder, name)
        found.append(read.differs(holder, value))
    return found
