"""Eager forward and training step of adapted models, against the base and against HF PEFT.

The reference of the training step is "the limit": a frozen base whose backward still goes down to the embeddings.
An adapter cannot be cheaper, since the gradient must pass through the base to reach it. All candidates get the same
embeddings that require a gradient, so every backward pass goes equally deep.
"""

from __future__ import annotations

import harness
import subjects
from subjects import Subject

Shape = tuple[int, int]


def forward_group(report: harness.Report, title: str, models: list[Subject], shape: Shape, width: int) -> None:
    inputs = subjects.embeddings(*shape, width)
    candidates = []
    for subject in models:
        call = subjects.forward(subject.model.eval(), inputs)
        candidates.append(harness.Candidate(subject.name, call, beside=subject.beside, note=_trainable(subject)))
    report.add(harness.measure(title, candidates, "base", rounds=report.options["rounds"]))


def training_group(report: harness.Report, title: str, models: list[Subject], shape: Shape, width: int) -> None:
    inputs = subjects.embeddings(*shape, width, requires_grad=True)
    candidates = []
    for subject in models:
        call, clear = subjects.training_step(subject.model.train(), inputs)
        candidates.append(
            harness.Candidate(subject.name, call, prepare=clear, beside=subject.beside, note=_trainable(subject))
        )
    report.add(harness.measure(title, candidates, "the limit", rounds=report.options["rounds"]))


def _trainable(subject: Subject) -> str:
    return f"{subject.trainable:,} trainable"


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], rounds=60, quick_rounds=3)
    parser.add_argument("--targets", choices=("qv", "all", "both"), default="both", help="which linears get an adapter")
    parser.add_argument("--what", choices=("forward", "training", "both"), default="both", help="what is timed")
    parser.add_argument(
        "--methods",
        choices=("lora", "structured"),
        default="lora",
        help="LoRA and Uni-LoRA, or the other methods with PEFT's GLoRA",
    )
    options = parser.parse_args()
    report = harness.start("eager", options)

    layers, width = (2, 256) if options.quick else (4, 768)
    shapes = ((2, 16),) if options.quick else subjects.SHAPES
    base = subjects.bert(layers, width)
    for name, targets in (("query, value", subjects.QUERY_VALUE), ("all linears", subjects.ALL_LINEAR)):
        if options.targets not in ("both", "qv" if targets is subjects.QUERY_VALUE else "all"):
            continue
        if options.methods == "structured":
            adapted = subjects.structured(base, targets)
        else:
            adapted = subjects.adapters(base, targets, 4096 if options.quick else subjects.UNILORA_LENGTH)
        for shape in shapes:
            where = f"BERT, {layers} layers, {width} wide, {shape[0]} x {shape[1]}, adapters on {name}"
            if options.what != "training":
                models = [Subject("base", subjects.frozen(base)), *adapted]
                forward_group(report, f"Forward: {where}", models, shape, width)
            if options.what != "forward":
                models = [
                    Subject("the limit", subjects.frozen(base)),
                    Subject("base, all trained", subjects.frozen(base).requires_grad_(True)),
                    *adapted,
                ]
                training_group(report, f"Training step: {where}", models, shape, width)


if __name__ == "__main__":
    main()
