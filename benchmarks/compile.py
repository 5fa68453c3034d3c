"""Compiled forward and training step of adapted models, against the compiled base.

`fg.compile` of both methods, the same adapted models through plain Inductor (what the passes bring), and HF PEFT
through plain Inductor. A graph break or a recompilation of a model of ours is an error here, not a slow row: Dynamo
falls back to eager silently past its recompilation limit, and the figures would compare something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import harness
import subjects
import torch
import torch._dynamo
from subjects import Subject
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg

# All candidates are instances of one class and share its code object, to which Dynamo's limit applies.
RECOMPILE_LIMIT = 64


class Broken(RuntimeError):
    """A model that must compile to one graph did not."""


@dataclass(frozen=True)
class Compiled:
    """A compiled candidate and what Dynamo did when it was first called."""

    candidate: harness.Candidate
    graphs: int
    breaks: int


def first_calls(name: str, call: Callable[[], object], strict: bool) -> tuple[int, int]:
    """Compile by calling three times, and count the graphs and graph breaks."""
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's advice on float32 precision and the like
        for _ in range(3):
            call()
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    if strict and (graphs != 1 or breaks):
        reasons = "; ".join(counters["graph_break"]) or "none"
        raise Broken(f"{name}: {graphs} graphs, {breaks} graph breaks ({reasons}), expected one graph and no break")
    return graphs, breaks


def variants(base: nn.Module, adapted: list[Subject], peft_too: bool) -> list[tuple[Subject, nn.Module, bool]]:
    """(subject, compiled model, whether it must be one graph)."""
    compiled = [(Subject("compiled base", base), torch.compile(base), True)]
    for subject in adapted:
        if subject.beside is None:
            if peft_too:
                compiled.append((subject, torch.compile(subject.model), False))
            continue
        beside = subject.beside if peft_too else None
        plain = Subject(f"{subject.name}, plain Inductor", subject.model, beside)
        compiled.append((plain, torch.compile(subject.model), True))
        compiled.append((Subject(subject.name, subject.model, beside), fg.compile(subject.model), True))
    return compiled


def group(
    report: harness.Report,
    title: str,
    models: list[tuple[Subject, nn.Module, bool]],
    shape: tuple[int, int],
    width: int,
    training: bool,
) -> None:
    inputs = subjects.embeddings(*shape, width, requires_grad=training)
    ready = []
    for subject, model, strict in models:
        subject.model.train(training)
        if training:
            call, clear = subjects.training_step(model, inputs)
        else:
            call, clear = subjects.forward(model, inputs), None
        graphs, breaks = first_calls(subject.name, call, strict)
        note = "" if (graphs, breaks) == (1, 0) else f"{graphs} graphs, {breaks} breaks"
        ready.append(harness.Candidate(subject.name, call, prepare=clear, beside=subject.beside, note=note))
    # From here on a recompilation raises: it would be timed as if it were work.
    with torch.compiler.set_stance("fail_on_recompile"):
        report.add(harness.measure(title, ready, "compiled base", rounds=report.options["rounds"]))


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], rounds=60, quick_rounds=3)
    parser.add_argument("--targets", choices=("qv", "all", "both"), default="both", help="which linears get an adapter")
    parser.add_argument("--what", choices=("forward", "training", "both"), default="both", help="what is timed")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out: its compilation takes longest")
    options = parser.parse_args()
    report = harness.start("compile", options)

    layers, width = (2, 256) if options.quick else (4, 768)
    shapes = ((2, 16),) if options.quick else subjects.SHAPES
    length = 4096 if options.quick else subjects.UNILORA_LENGTH
    base = subjects.bert(layers, width)
    for name, targets in (("query, value", subjects.QUERY_VALUE), ("all linears", subjects.ALL_LINEAR)):
        if options.targets not in ("both", "qv" if targets is subjects.QUERY_VALUE else "all"):
            continue
        adapted = subjects.adapters(base, targets, length)
        for shape in shapes:
            for training in (False, True):
                if options.what == ("forward" if training else "training"):
                    continue
                # Every group compiles afresh, for its own shape: no group runs code made general by an earlier one.
                torch._dynamo.reset()
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    group(
                        report,
                        f"{'Training step' if training else 'Forward'}, compiled: BERT, {layers} layers, {width} wide, "
                        f"{shape[0]} x {shape[1]}, adapters on {name}",
                        variants(subjects.frozen(base), adapted, not options.no_peft),
                        shape,
                        width,
                        training,
                    )


if __name__ == "__main__":
    main()
