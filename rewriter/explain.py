"""What was grafted where: a table of every site, its method, shapes, counts and bytes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor, nn

from .adapter_tensors import AdapterTensors
from .analysis.dataflow import tied_names
from .emitter import PROVENANCE
from .errors import listing
from .method import Method
from .modules.wrappers import unwrap
from .program import PassResult
from .program_verbs import over_programs
from .sites import Site
from .state import AdapterRecord, grafted_modules, state_of
from .tensors import adapter_modules, trained_modules


@dataclass(frozen=True)
class Row:
    """One site, one group of shared tensors, or one trained module of one adapter.

    Args:
        adapter, site, method: names; `kind` is `site`, `shared` or `trained`.
        shape: `out x in` of the site and how many experts have such a matrix, empty for the others.
        tensors: name -> shape of what it holds.
        trainable: number of trained parameters; bytes: resident bytes, derived tensors included.
        made_by: the pass that made it.
        tied: what it is tied to, and whether that follows.
        rows: of a part of a fused weight, which rows it is; `alias` the name that a layer of its own would have.
        less: what a site that is too small for the config has less of, such as `rank 4 of 8`.
    """

    adapter: str
    kind: str
    site: str
    method: str
    shape: str
    tensors: dict[str, tuple[int, ...]]
    trainable: int
    bytes: int
    made_by: str
    tied: str = ""
    rows: str = ""
    alias: str = ""
    less: str = ""

    @property
    def about(self) -> str:
        """What is to be said of the site beside its name."""
        return "; ".join(said for said in (self.alias, self.rows, self.less, self.tied) if said)


COMPILED = "_fxgraft_compiled"  # attribute of a compiled model's root: a note for each graph


@dataclass(frozen=True)
class CompileNote:
    """What a pipeline made of one graph.

    Args:
        pipeline: its name.
        made: `(pass, reason) -> nodes` it made; the reason is empty where there was no choice.
        left: `reason -> nodes` that were looked at and left.
        kernels: which kernels were allowed, and why.
    """

    pipeline: str
    made: dict[tuple[str, str], int]
    left: dict[str, int]
    kernels: str = ""

    def __str__(self) -> str:
        lines = [f"compiled with the pipeline {self.pipeline}:"]
        lines += [f"  kernels {self.kernels}"] if self.kernels else []
        for (made_by, reason), count in self.made.items():
            lines.append(f"  {made_by} made {count} nodes" + (f" ({reason})" if reason else ""))
        lines += [f"  left {count} as they were: {reason}" for reason, count in self.left.items()]
        return "\n".join(lines)


def note_of(pipeline: str, result: PassResult, kernels: str = "") -> CompileNote:
    """The note for a pipeline's result."""
    marks = [node.meta[PROVENANCE] for node in result.program.graph.nodes if PROVENANCE in node.meta]
    made = Counter((mark.made_by, mark.reason) for mark in marks if mark.made_by != "graft")
    left = Counter(no_match.reason for no_match in result.no_matches)
    return CompileNote(pipeline, dict(made), dict(left), kernels)


@dataclass(frozen=True)
class Explanation:
    """Every adapter of a model. `print` it for the table.

    Attributes:
        compiled: a note for each graph that `fg.compile` has compiled.
        rows: one `Row` per site, group of shared tensors and trained module, of all adapters.
        active: names of the active adapters; `weights` of those whose weight is not 1.
        base: number of base parameters.
        left: adapter -> name -> why `all-linear` left it out.
    """

    rows: tuple[Row, ...]
    active: tuple[str, ...]
    base: int
    compiled: tuple[CompileNote, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def trainable(self) -> int:
        """Trained parameters of the active adapters, modules trained in full included."""
        return sum(row.trainable for row in self.rows if row.adapter in self.active)

    @property
    def bytes(self) -> int:
        """Resident bytes of all adapters, beside the base."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        on = ", ".join(f"{n} x {self.weights[n]:g}" if n in self.weights else n for n in self.active)
        table = Table(title=f"active: {on or 'none'}", title_justify="left")
        for column in ("adapter", "site", "method", "out x in", "tensors"):
            table.add_column(column, overflow="fold")
        for column in ("trainable", "bytes"):
            table.add_column(column, justify="right")
        table.add_column("made by")
        for row in self.rows:
            tensors = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in row.tensors.items())
            counts = (f"{row.trainable:,}", f"{row.bytes:,}")
            site = f"{row.site} ({row.about})" if row.about else row.site
            table.add_row(row.adapter, site, row.method, row.shape, tensors, *counts, row.made_by)
        out = io.StringIO()
        Console(file=out, width=140).print(table)
        share = self.trainable / self.base if self.base else 0.0
        return (
            f"{out.getvalue()}{self.trainable:,} trainable parameters ({share:.4%} of {self.base:,}), "
            f"{self.bytes:,} bytes beside the base"
        ) + "".join(f"\n{note}" for note in (*self._left_out(), *self.compiled))

    def _left_out(self) -> Iterator[str]:
        """A line for each reason for which an adapter leaves something out."""
        for adapter, left in self.left.items():
            for reason in dict.fromkeys(left.values()):
                names = [name for name, why in left.items() if why == reason]
                yield f"{adapter!r} leaves out {listing(names, 4)}: {reason}"


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _shape(site: Site | None) -> str:
    """`out x in` of a site's matrix, and how many of them it stacks."""
    if site is None:
        return ""
    one = f"{site.out_features} x {site.in_features}"
    return f"{site.experts} experts, {one}" if site.experts else one


def _row(adapter: str, kind: str, site: str, module: AdapterTensors, made_by: str) -> Row:
    held = module.tensors()
    return Row(
        adapter=adapter,
        kind=kind,
        site=site,
        method=module.method.key,
        shape=_shape(module.site),
        tensors={n: tuple(t.shape) for n, t in held.items()},
        trainable=sum(p.numel() for p in module._parameters.values() if p is not None),
        bytes=_bytes(held),
        made_by=made_by,
        rows="" if module.site is None or module.site.rows is None else str(module.site.rows),
        alias=(module.site.alias if module.site else None) or "",
    )


def _less(method: Method, asked: Method) -> str:
    """What a method has less of than was asked for."""
    if type(method) is not type(asked):
        return ""
    pairs = ((f.name, getattr(method, f.name), getattr(asked, f.name)) for f in fields(method))
    return ", ".join(f"{n} {now} of {was}" for n, now, was in pairs if type(now) is int and now < was)


def _told_ties(own: set[str], ties: Mapping[str, frozenset[str]], record: AdapterRecord) -> str:
    """What these base parameters are tied to."""
    others = {other for name in own for other in ties.get(name, ())} - own
    follow = {tie.full for tie in record.ties}
    said = (("which follow", others & follow), ("which keep the base's values", others - follow))
    return "; ".join(f"tied to {listing(sorted(names), 4)}, {what}" for what, names in said if names)


@over_programs
def explain(model: nn.Module) -> Explanation:
    """Describe every adapter of an adapted model. Raises `AdapterError` for a model without any."""
    root, state = unwrap(model), state_of(model)
    modules = grafted_modules(root)
    ties = tied_names(root)
    rows = []
    for name, record in state.adapters.items():
        for prefix, tensors in adapter_modules(root, name, record, modules):
            if tensors.site is None:
                rows.append(_row(name, "shared", f"(shared by {len(record.sites)} sites)", tensors, record.created_by))
            else:
                row = _row(name, "site", prefix[:-1] or "(root)", tensors, record.created_by)
                weight = f"{tensors.site.owner}.{tensors.site.weight}".lstrip(".")
                less = _less(tensors.method, record.spec.method_at(tensors.site.answers))
                rows.append(replace(row, tied=_told_ties({weight}, ties, record), less=less))
        for path, module in trained_modules(root, name, record, modules).items():
            held = dict(module.state_dict())
            shapes, count = {n: tuple(t.shape) for n, t in held.items()}, sum(p.numel() for p in module.parameters())
            told = _told_ties({f"{path}.{n}" for n in held}, ties, record)
            rows.append(Row(name, "trained", path, "full", "", shapes, count, _bytes(held), record.created_by, told))
    unique = {id(p): p for m in modules.values() for p in m._parameters.values() if p is not None}
    base = sum(p.numel() for p in unique.values())
    left = {name: dict(record.left) for name, record in state.adapters.items() if record.left}
    notes = tuple(root.__dict__.get(COMPILED, ()))
    return Explanation(tuple(rows), state.active, base, notes, dict(state.weights), left)
