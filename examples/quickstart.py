"""Fine-tune a real model with 2,304 numbers, then ship it: the whole life of an adapter in one run.

    python examples/quickstart.py

MiniLM (a BERT encoder with 22.7 M parameters) learns to tell sarcastic headlines from serious ones. Uni-LoRA on the
query and value projections trains one vector for the whole model; everything else but the classification head stays
frozen. The trained adapter is saved, loaded into the untouched base model, merged, exported to ONNX twice (merged, and
swappable with the adapter in a file beside it) and run in ONNX Runtime. The last table compares all of these on the
same held-out headlines, next to a logistic regression on the frozen model's features.

It is about eight minutes of CPU time after the first download. Every number printed is measured in the run.
The learning rates were chosen on validation headlines, the number of headlines and epochs by the time they take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from assets import AssetError, minilm_dir, sarcasm
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxgraft as fg

MAX_TOKENS = 32
SPLIT_SEED = 0  # which headlines are held out does not depend on --seed
WARMUP = 0.06
EVAL_BATCH = 64
LATENCY_BATCH = 32
LATENCY_ROUNDS = 15
EXPORT_BATCH = 4

console = Console(highlight=False)
Batch = dict[str, Tensor]
Predict = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Headlines:
    """Texts, their token ids and labels (1 is sarcastic)."""

    texts: list[str]
    tokens: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The model's inputs for some rows, padded to the longest of them."""
        width = max(len(self.tokens[row]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(self.tokens[row])] = torch.tensor(self.tokens[row])
            mask[i, : len(self.tokens[row])] = 1
        return {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Result:
    """One row of the closing table. `difference` is to the adapted PyTorch model, over all held-out logits."""

    name: str
    accuracy: float | None
    difference: float | None = None
    milliseconds: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Figures:
    """What the run measured."""

    results: list[Result]
    trainable: int
    vector: int
    base_parameters: int
    adapter_bytes: int
    base_bytes: int
    onnx_adapter_bytes: int
    held_out: int
    latency_batch: list[int]
    train_seconds: float
    total_seconds: float


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train, save, merge and export a Uni-LoRA adapter of MiniLM on sarcastic headlines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-size", type=positive, default=3200, help="headlines to train on")
    add("--validation-size", type=positive, default=500, help="headlines for choosing hyperparameters")
    add("--test-size", type=positive, default=1000, help="held-out headlines that every variant is scored on")
    add("--epochs", type=positive, default=2, help="passes over the training headlines")
    add("--batch-size", type=positive, default=32, help="headlines per training step")
    add("--rank", type=positive, default=4, help="rank of the adapter's factors")
    add("--vector-length", type=positive, default=2304, help="length of Uni-LoRA's vector, for the whole model")
    add("--vector-lr", type=float, default=4e-2, help="learning rate of the vector")
    add("--head-lr", type=float, default=4e-3, help="learning rate of the classification head")
    add("--seed", type=int, default=0, help="of the head, the vector, dropout and the order of the batches")
    add("--threads", type=positive, default=usable_cores(), help="CPU threads of PyTorch and of ONNX Runtime")
    add("--out", type=Path, default=Path("build/quickstart"), help="folder for the adapter and the ONNX files")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def usable_cores() -> int:
    """Cores this process may use: those it is bound to, fewer where the container has a quota, at most 8."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = bound if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        allowed = bound
    return min(bound, allowed, 8)  # steps of this size gain nothing beyond 8


def split(total: int, sizes: Sequence[int]) -> list[list[int]]:
    """Disjoint random parts of `range(total)`, the same in every run."""
    if sum(sizes) > total:
        raise SystemExit(f"{sum(sizes):,} headlines were asked for in all and there are {total:,}.")
    rows = list(range(total))
    random.Random(SPLIT_SEED).shuffle(rows)
    ends = np.cumsum(sizes).tolist()
    return [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def by_length(lengths: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """Batches of rows of similar length: padding would be half of the work otherwise."""
    ordered = sorted(rows, key=lambda row: lengths[row])
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def training_batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Every row once, in random batches of similar length: sorted within random pools of 16 batches, then shuffled."""
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    pools = [rows[i : i + 16 * size] for i in range(0, len(rows), 16 * size)]
    batches = [batch for pool in pools for batch in by_length(lengths, pool, size)]
    rng.shuffle(batches)
    return batches


def warmup_then_linear(step: int, total: int) -> float:
    """The learning rate's factor at a step: up to 1 over the first 6 %, then down to 0 in a straight line."""
    warmup = max(1, int(WARMUP * total))
    return (step + 1) / warmup if step < warmup else (total - step) / max(1, total - warmup)


def collect(predict: Predict, data: Headlines) -> Tensor:
    """The predictions for all headlines, in their order."""
    rows = by_length([len(t) for t in data.tokens], range(len(data)), EVAL_BATCH)
    parts = [predict(data.batch(part)) for part in rows]
    out = torch.cat(parts)
    back = torch.empty_like(out)
    back[torch.tensor([row for part in rows for row in part])] = out
    return back


def torch_predict(model: nn.Module) -> Predict:
    """Logits of a PyTorch model, in eval mode and without gradients."""

    def predict(batch: Batch) -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(**batch).logits

    return predict


def onnx_predict(session: fg.OrtSession, adapter: str | None = None) -> Predict:
    """Logits of an ONNX Runtime session, with one of its adapters or none."""
    return lambda batch: torch.from_numpy(session.run(batch, adapter=adapter)["logits"])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


def frozen_baseline(model: nn.Module, train: Headlines, validation: Headlines, test: Headlines) -> tuple[float, float]:
    """Test accuracy of a logistic regression on the frozen encoder's mean-pooled features, and its C.

    That is what the model can do without training any of it. C is chosen on the validation headlines.
    """

    def pooled(batch: Batch) -> Tensor:
        model.eval()
        with torch.inference_mode():
            hidden = model.base_model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    features = {name: collect(pooled, d).numpy() for name, d in (("t", train), ("v", validation), ("h", test))}
    fits = [LogisticRegression(C=c, max_iter=5000).fit(features["t"], train.labels.numpy()) for c in (0.1, 1.0, 10.0)]
    best = max(fits, key=lambda fit: fit.score(features["v"], validation.labels.numpy()))
    return float(best.score(features["h"], test.labels.numpy())), float(best.C)


def train_adapter(adapted: nn.Module, train: Headlines, validation: Headlines, args: argparse.Namespace) -> float:
    """Train what requires grad, with a progress bar, and return the seconds it took."""
    # One entry of the vector stands in many places of many factors: it wants a far larger step than the head, and no
    # decay, which would shrink every site of the model at once.
    groups = fg.parameter_groups(adapted, vector_lr=args.vector_lr, lr=args.head_lr, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    per_epoch = math.ceil(len(train) / args.batch_size)
    total = per_epoch * args.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_linear(step, total))
    lengths = [len(tokens) for tokens in train.tokens]
    rng = random.Random(args.seed)
    began = time.perf_counter()
    with progress_bar() as progress:
        bar = progress.add_task("training", total=total, note="")
        for epoch in range(1, args.epochs + 1):
            adapted.train()
            losses = []
            for rows in training_batches(lengths, args.batch_size, rng):
                loss = cross_entropy(adapted(**train.batch(rows)).logits, train.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                recent = statistics.fmean(losses[-20:])
                progress.update(bar, advance=1, description=f"epoch {epoch}/{args.epochs}", note=f"loss {recent:.3f}")
            score = accuracy(collect(torch_predict(adapted), validation), validation.labels)
            progress.console.print(
                f"  epoch {epoch}: training loss {statistics.fmean(losses):.3f}, validation accuracy {score:.3f}"
            )
    return time.perf_counter() - began


def progress_bar() -> Progress:
    """A bar with steps, loss and remaining time."""
    return Progress(
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def latencies(variants: dict[str, Predict], batch: Batch) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each variant on one batch, and the median ratio to the first variant.

    The variants take turns, so that whatever else the machine does in a round meets all of them alike.
    """
    for predict in variants.values():
        predict(batch)
    rounds: list[list[float]] = []
    for _ in range(LATENCY_ROUNDS):
        times = []
        for predict in variants.values():
            began = time.perf_counter()
            predict(batch)
            times.append(1e3 * (time.perf_counter() - began))
        rounds.append(times)
    return {
        name: (statistics.median(t[i] for t in rounds), statistics.median(t[i] / t[0] for t in rounds))
        for i, name in enumerate(variants)
    }


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def size(count: int) -> str:
    """A number of bytes, readable."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class Steps:
    """Prints numbered step titles, and under each step how long it took."""

    def __init__(self) -> None:
        self.number = 0
        self.began = time.perf_counter()

    def __call__(self, title: str) -> None:
        """Close the step before and open one."""
        self.close()
        self.number += 1
        console.print(f"\n[bold]{self.number}. {title}[/bold]")

    def close(self) -> None:
        """Print the running step's time."""
        if self.number:
            console.print(f"  [dim]{time.perf_counter() - self.began:.1f} s[/dim]")
        self.began = time.perf_counter()


def say(text: str, style: str | None = None) -> None:
    """One line under a step's title, as it is: a path may hold brackets."""
    console.print(f"  {text}", style=style, markup=False, soft_wrap=True)


def read_headlines(folder: Path, sizes: Sequence[int]) -> list[Headlines]:
    """Tokenised parts of the headlines: disjoint, and the same ones in every run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts, labels = sarcasm()
    parts = []
    for rows in split(len(texts), sizes):
        chosen = [texts[row] for row in rows]
        tokens = tokenizer(chosen, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        parts.append(Headlines(chosen, tokens, torch.tensor([labels[row] for row in rows])))
    return parts


def main(argv: Sequence[str] | None = None) -> Figures:
    """Run the example and return what it measured."""
    args = parse(argv)
    started = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    step = Steps()
    versions = f"fxgraft {fg.__version__}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    console.print(
        f"{versions}\n{args.threads} CPU thread{'s' * (args.threads > 1)} (this process may use {usable_cores()}; "
        "--threads sets another number; where other programs keep the cores busy, fewer are faster)",
        soft_wrap=True,
    )

    step("Model and data")
    folder = minilm_dir()
    test, validation, train = read_headlines(folder, [args.test_size, args.validation_size, args.train_size])
    torch.manual_seed(args.seed)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    base_parameters = sum(p.numel() for p in base.parameters())
    base_bytes = (folder / "model.safetensors").stat().st_size
    say(f"MiniLM-L6-v2: {base_parameters:,} parameters, {size(base_bytes)}, with a new head for 2 classes")
    say(f"headlines: {len(train):,} to train on, {len(validation):,} for validation, {len(test):,} held out")
    for label, word in ((1, "sarcastic"), (0, "serious")):
        example = test.texts[int((test.labels == label).nonzero()[0])]
        say(f"{word + ':':<10} {example}", style="dim")

    step("Baseline: logistic regression on the features of the frozen model")
    frozen, c = frozen_baseline(base, train, validation, test)
    say(f"held-out accuracy {frozen:.3f} (C = {c:g}, chosen on the validation headlines)")

    step("Graft Uni-LoRA onto query and value")
    method = fg.UniLoRA(rank=args.rank, vector_length=args.vector_length, seed=args.seed)
    spec = fg.Spec(method, targets=["query", "value"], train=["classifier"])
    adapted = fg.rewrite(base, spec)
    counts = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    trainable, vector = sum(counts.values()), sum(n for name, n in counts.items() if name.endswith(".theta"))
    say(f"{trainable:,} trainable parameters: one vector of {vector:,} and a head of {trainable - vector:,}")
    say(f"that is {trainable / base_parameters:.3%} of the model, which keeps its class ({type(adapted).__name__})")

    step(f"Train: {args.epochs} epochs of {len(train):,} headlines")
    train_seconds = train_adapter(adapted, train, validation, args)

    step("Save, and load into the untouched base model")
    saved = Path(fg.save_adapter(adapted, args.out / "adapter"))
    loaded = fg.load_adapter(base, saved).eval()
    adapter_bytes = folder_bytes(saved)
    batch = test.batch(range(min(LATENCY_BATCH, len(test))))
    same = torch.equal(torch_predict(loaded)(batch), torch_predict(adapted)(batch))
    say(f"{saved}: {size(adapter_bytes)}, 1/{base_bytes // adapter_bytes:,} of the base model's file")
    say(f"the loaded model's logits equal the trained model's bit for bit: {'yes' if same else 'NO'}")

    step("Merge into plain weights")
    merged = fg.merge(loaded).eval()
    extra = len(merged.state_dict().keys() ^ base.state_dict().keys())
    say(f"a plain {type(merged).__name__} again, {extra} state-dict keys differ from the base model's")

    step("Export to ONNX: merged, and swappable")
    inputs = test.batch(range(min(EXPORT_BATCH, len(test))))
    exports = {}
    for kind in ("merged", "swappable"):
        made = exports[kind] = fg.export_onnx(loaded, args.out / f"{kind}.onnx", inputs, adapters=kind)
        worst = max(check.relative for check in made.parity)
        say(
            f"{made.path}: {size(made.bytes)}, opset {made.opset}, any batch and length; {len(made.parity)} runs "
            f"checked against PyTorch, largest relative difference {worst:.1e}"
        )
    adapter_file = args.out / "sarcasm.onnx_adapter"
    fg.export_ort_adapter(loaded, adapter_file)
    onnx_adapter_bytes = adapter_file.stat().st_size
    say(f"{adapter_file}: {size(onnx_adapter_bytes)}, the adapter that the swappable file takes at run time")
    plain_session = fg.OrtSession(exports["merged"].path, threads=args.threads)
    swap_session = fg.OrtSession(exports["swappable"].path, threads=args.threads)
    swap_session.load("sarcasm", adapter_file)
    without = difference(onnx_predict(swap_session)(batch), torch_predict(base)(batch))
    say(f"without its adapter the swappable file is the base model: logits differ by {without:.1e} at most")

    step(f"Score every variant on the same {len(test):,} held-out headlines, then time one batch")
    variants: dict[str, Predict] = {
        "adapted, PyTorch": torch_predict(loaded),
        "merged, PyTorch": torch_predict(merged),
        "merged, ONNX Runtime": onnx_predict(plain_session),
        "swappable, ONNX Runtime": onnx_predict(swap_session, "sarcasm"),
    }
    logits = {}
    for name, predict in variants.items():
        logits[name] = collect(predict, test)
        say(f"{name:<24} {accuracy(logits[name], test.labels):.3f}")
    times = latencies({"base, PyTorch": torch_predict(base), **variants}, batch)
    reference = logits["adapted, PyTorch"]
    results = [
        Result("frozen, logistic regression", frozen),
        Result("base, PyTorch", None, None, *times["base, PyTorch"]),
        *(Result(n, accuracy(l, test.labels), difference(l, reference), *times[n]) for n, l in logits.items()),
    ]
    step.close()
    figures = Figures(
        results, trainable, vector, base_parameters, adapter_bytes, base_bytes, onnx_adapter_bytes, len(test),
        list(batch["input_ids"].shape), train_seconds, time.perf_counter() - started,
    )  # fmt: skip
    report(figures)
    (args.out / "figures.json").write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
    say(f"The files are in {args.out.resolve()}")
    return figures


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of two tensors."""
    return (one - other).abs().max().item()


def report(figures: Figures) -> None:
    """Print the closing table."""
    rows, width = figures.latency_batch
    table = Table(title=f"\n{figures.held_out:,} held-out headlines; latency of a batch of {rows} x {width} tokens")
    table.add_column("variant")
    for heading in ("accuracy", "largest logit\ndifference", "ms per\nbatch", "against\nthe base"):
        table.add_column(heading, justify="right")
    for r in figures.results:
        table.add_row(
            r.name,
            "-" if r.accuracy is None else f"{r.accuracy:.3f}",
            "-" if r.difference is None else f"{r.difference:.1e}",
            "-" if r.milliseconds is None else f"{r.milliseconds:.1f}",
            "-" if r.ratio is None else f"{r.ratio:.2f}x",
        )
    console.print(table)
    adapted = next(r for r in figures.results if r.name == "adapted, PyTorch")
    assert adapted.accuracy is not None
    error = math.sqrt(adapted.accuracy * (1 - adapted.accuracy) / figures.held_out)
    say(f"standard error of an accuracy: {error:.3f}; differences are to the adapted model in PyTorch")
    say(
        f"trainable: {figures.trainable:,} of {figures.base_parameters:,} parameters "
        f"({figures.vector:,} in the vector, the rest in the head)"
    )
    say(
        f"on disk: adapter {size(figures.adapter_bytes)}, base {size(figures.base_bytes)}, "
        f"ONNX Runtime adapter {size(figures.onnx_adapter_bytes)} (its factors written out)"
    )
    say(f"training {figures.train_seconds:.0f} s, the whole run {figures.total_seconds:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (AssetError, fg.FxgraftError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
