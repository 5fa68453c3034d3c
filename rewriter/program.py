"""Passes: pure graph-to-graph steps with a checked contract, in pipelines that can be printed and replayed."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from .emitter import PROVENANCE, Provenance
from .errors import FxgraftError
from .sites import NoMatch


@dataclass
class Program:
    """A whole captured graph.

    Args:
        graph_module: the graph and its tensors.
        example_inputs: what it was captured with; may be empty.
        training: whether gradients will flow through it.
        exported: the `ExportedProgram` it came from, if any.
    """

    graph_module: fx.GraphModule
    example_inputs: tuple[Any, ...] = ()
    training: bool = False
    exported: torch.export.ExportedProgram | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def __str__(self) -> str:
        return str(self.graph)


@dataclass(frozen=True)
class PassResult:
    """What a pass returns, always.

    Args:
        program: the program after the pass.
        modified: whether anything changed.
        count: how many rewrites were made.
        no_matches: candidates that were looked at and left, with the reason.
    """

    program: Program
    modified: bool
    count: int = 0
    no_matches: tuple[NoMatch, ...] = ()


@dataclass(frozen=True)
class Pass(abc.ABC):
    """One step. Subclasses are frozen dataclasses whose fields are their options; they implement `run`.

    `in_place` says whether `run` edits the program it is given; other passes get a copy of the graph (tensors shared).
    `not_in_training` is why the pass leaves programs that train, which it is then not run on.
    """

    in_place: ClassVar[bool] = True
    not_in_training: ClassVar[str | None] = None

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """Look at the program, rewrite it, and say what was done."""

    def __call__(self, program: Program) -> PassResult:
        if program.training and self.not_in_training:
            return PassResult(program, False, 0, (NoMatch(f"training: {self.not_in_training}"),))
        given = (
            program if self.in_place else dataclasses.replace(program, graph_module=copy_graph(program.graph_module))
        )
        before, looked = set(given.graph.nodes), _appearance(given.graph)
        result = self.run(given)
        if not isinstance(result, PassResult):
            raise FxgraftError(f"pass {self} returned {type(result).__name__}, not a PassResult")
        if result.modified != (result.count > 0):
            raise FxgraftError(f"pass {self} says modified={result.modified} with {result.count} rewrites")
        if self.in_place and result.program.graph_module is not given.graph_module:
            raise FxgraftError(f"pass {self} says that it works in place and returned another graph")
        if not result.modified and _appearance(result.program.graph) != looked:
            raise FxgraftError(f"pass {self} says modified=False and changed the graph")
        if result.modified:
            for node in set(result.program.graph.nodes) - before:
                node.meta.setdefault(PROVENANCE, Provenance(type(self).__name__, "", ""))
            result.program.graph.lint()
            result.program.graph_module.recompile()
        return result


def _appearance(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph computes, to see whether it was changed."""
    return [(node, node.op, node.target, node.args, node.kwargs) for node in graph.nodes]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; calling it runs them all."""

    name: str
    passes: tuple[Pass, ...] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __call__(self, program: Program) -> PassResult:
        count = 0
        no_matches: list[NoMatch] = []
        for step in self.passes:
            result = step(program)
            program = result.program
            count += result.count
            no_matches += result.no_matches
        return PassResult(program, count > 0, count, tuple(no_matches))

    def __str__(self) -> str:
        return "\n".join([f"pipeline {self.name}:", *(f"  {i + 1}. {step}" for i, step in enumerate(self.passes))])


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own over the same tensors and submodules."""
    memo = {id(t): t for t in [*gm.parameters(), *gm.buffers()]}
    return copy.deepcopy(gm, memo)


def replace_meta(new: fx.Node, old: fx.Node, made_by: str, reason: str = "") -> None:
    """Give a node that stands for another one its metadata and say which pass made it, and why."""
    new.meta.update({k: v for k, v in old.meta.items() if k not in new.meta})
    new.meta[PROVENANCE] = Provenance(made_by, "", "", reason)


def put(new: fx.Node, old: fx.Node, made_by: str, reason: str = "") -> None:
    """A node in the place of another one, which goes: readers and metadata, and which pass made it, and why."""
    replace_meta(new, old, made_by, reason)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
