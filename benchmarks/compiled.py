"""Compiled inference, training, banks and decoding of adapted models, against the compiled base; memory, compile time.

A graph break or a recompilation of a model of ours is an error here, not a slow row: Dynamo falls back to eager
silently past its recompilation limit, and the figures would compare something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import costs
import decode
import harness
import plot
import subjects
import tenants
import torch
import torch._dynamo
from subjects import Subject
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg

# All candidates are instances of one class and share its code object, to which Dynamo's limit applies.
RECOMPILE_LIMIT = 64
WHAT = ("inference", "training", "bank", "decode", "memory", "compile-time")


class Broken(RuntimeError):
    """A model that must compile to one graph did not."""


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


Variant = tuple[Subject, nn.Module, bool]  # what it is, the compiled model, whether it must be one graph


def variants(
    base: nn.Module, targets: tuple[str, ...], length: int, inputs: torch.Tensor, training: bool, options: object
) -> list[Variant]:
    """Every method through `fg.compile`, PEFT through Inductor; asked for, ours through plain Inductor as well."""
    frozen = subjects.frozen(base)
    compiled: list[Variant] = [(Subject("compiled base", frozen), torch.compile(frozen), True)]
    ours = subjects.adapters(base, targets, length)
    ours += [Subject(n, subjects.rewritten(base, m, targets)) for n, m in subjects.SERVED.items()]
    if training:
        ours.append(Subject("fxgraft GLoRA supernet", subjects.rewritten(base, fg.GLoRA(4), targets)))
    for subject in ours:
        if subject.name.startswith("PEFT"):
            if not options.no_peft:
                compiled.append((subject, torch.compile(subject.model), False))
            continue
        beside = None if options.no_peft else subject.beside
        compiled.append((Subject(subject.name, subject.model, beside), fg.compile(subject.model), True))
        if options.plain:
            plain = Subject(f"{subject.name}, plain Inductor", subject.model, beside)
            compiled.append((plain, torch.compile(subject.model), True))
    if not training:
        glora = subjects.rewritten(base, fg.GLoRA(4, subjects.GLORA_PATH), targets)
        program = fg.capture(glora, {"inputs_embeds": inputs})
        folded = fg.passes.pipelines.frozen(program).program.graph_module
        compiled.append((Subject("fxgraft GLoRA, path folded", folded), torch.compile(folded), True))
        merged = fg.merge(subjects.rewritten(base, fg.LoRA(rank=subjects.LORA_RANK), targets))
        compiled.append((Subject("fxgraft LoRA, merged", merged), torch.compile(merged), True))
    return compiled


def group(report: harness.Report, title: str, models: list[Variant], inputs: torch.Tensor, training: bool) -> None:
    ready = []
    for subject, model, strict in models:
        if not isinstance(subject.model, torch.fx.GraphModule):  # an exported graph has its mode in it
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
    parser.add_argument("--targets", choices=("qv", "all"), default="all", help="which linears get an adapter")
    parser.add_argument("--what", choices=WHAT, nargs="+", default=WHAT, help="what is measured")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "1x16"], help="batch x tokens")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out: its compilation takes longest")
    parser.add_argument("--plain", action="store_true", help="our models through plain Inductor as well")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios of the JSON file, which it needs")
    options = parser.parse_args()
    if options.plot and not options.json:
        parser.error("--plot draws what --json wrote: give both")
    report = harness.start("compile", options)

    layers, width = (2, 256) if options.quick else (4, 768)
    shapes = ["2x16"] if options.quick else options.shapes
    length = 4096 if options.quick else subjects.UNILORA_LENGTH
    targets = subjects.QUERY_VALUE if options.targets == "qv" else subjects.ALL_LINEAR
    for what in [w for w in ("inference", "training") if w in options.what]:
        for shape in shapes:
            batch, tokens = map(int, shape.split("x"))
            training = what == "training"
            inputs = subjects.embeddings(batch, tokens, width, requires_grad=training)
            # Every group compiles afresh, for its own shape: no group runs code made general by an earlier one.
            torch._dynamo.reset()
            base = subjects.bert(layers, width)
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                models = variants(base, targets, length, inputs, training, options)
                title = (
                    f"{what.capitalize()}, compiled: BERT, {layers} layers, {width} wide, {shape}, {options.targets}"
                )
                group(report, title, models, inputs, training)
    if "bank" in options.what:
        tenants.measure(report, quick=options.quick)
    if "decode" in options.what:
        decode.measure(report, quick=options.quick)
    if "memory" in options.what:
        costs.memory(report, quick=options.quick)
    if "compile-time" in options.what:
        costs.compile_time(report, quick=options.quick)
    if options.plot:
        plot.ratios(options.json, options.plot)


if __name__ == "__main__":
    main()
