"""One graph, many tenants: mixed batches in ONNX Runtime, adapters that come and go while requests run.

    python examples/serve_tenants.py

MiniLM is exported once, with a bank of a few slots. Every tenant has an adapter file of its own: LoRA of several ranks
and Uni-LoRA, which all fit the one graph. Threads send batches in which every headline belongs to another tenant; the
session brings tenants into slots as they are asked for and drops those nobody has asked for longest. At the end every
answer that was given is held against PyTorch with that one tenant's adapter.

The adapters have random values that stand for trained ones: how to train and save one is shown in quickstart.py.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from assets import AssetError, minilm_dir
from quickstart import Headlines, positive, read_headlines, usable_cores
from rich.console import Console
from rich.table import Table
from torch import nn

import fxgraft as fg

TARGETS = ["query", "value"]
METHODS = (fg.LoRA(rank=8), fg.LoRA(rank=4), fg.LoRA(rank=2), fg.UniLoRA(rank=4, vector_length=2304))
TOLERANCE = 1e-4  # of the largest logit; float32 in two runtimes differs by some 1e-6

console = Console(highlight=False)


@dataclass(frozen=True)
class Answer:
    """One batch that was served: whose rows, which headlines, and the logits `(rows, 2)`."""

    tenants: list[str | None]
    rows: list[int]
    logits: np.ndarray


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Serve many adapters of MiniLM from one ONNX graph, and check every answer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tenants", type=positive, default=24, help="adapters, each in a file")
    add("--slots", type=positive, default=8, help="tenants that fit into the graph at once")
    add("--requests", type=positive, default=120, help="batches to serve")
    add("--batch", type=positive, default=4, help="headlines in a batch, each with a tenant of its own")
    add("--clients", type=positive, default=2, help="threads that send batches")
    add("--threads", type=positive, default=usable_cores(), help="CPU threads of PyTorch and of ONNX Runtime")
    add("--out", type=Path, default=Path("build/tenants"), help="folder for the graph and the adapters")
    return parser.parse_args()


def tenant(base: nn.Module, index: int) -> nn.Module:
    """An adapted model with values of its own."""
    torch.manual_seed(index)
    adapted = fg.rewrite(base, fg.Spec(METHODS[index % len(METHODS)], targets=TARGETS))
    state = fg.adapter_state(adapted)
    fg.swap(adapted, {key: torch.randn_like(value) * 0.05 for key, value in state.items()})
    return adapted.eval()


def export(base: nn.Module, options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The graph with room for `slots` tenants, and a file for every tenant."""
    options.out.mkdir(parents=True, exist_ok=True)
    example = {key: torch.ones(2, 8, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    first = tenant(base, 0)
    graph = options.out / "bank.onnx"
    report = fg.export_onnx(first, graph, example, adapters="bank", capacity=options.slots, rank=8)
    console.print(f"one graph of {report.bytes / 1e6:.0f} MB with {options.slots} slots")
    files = {}
    for index in range(options.tenants):
        name = f"tenant-{index:02d}"
        files[name] = fg.export_ort_adapter(tenant(base, index), options.out / f"{name}.onnx_adapter")
    size = sum(file.stat().st_size for file in files.values())
    console.print(f"{len(files)} adapters in {size / 1e6:.1f} MB of files; LoRA of rank 2, 4 and 8, and Uni-LoRA")
    return graph, files


def serve(session: fg.OrtSession, names: list[str], data: Headlines, options: argparse.Namespace) -> list[Answer]:
    """Batches from several threads, tenants drawn so that some are asked for often; a tenth of the rows has none."""
    rng = random.Random(0)
    weights = [1 / (rank + 1) for rank in range(len(names))]
    drawn: list[tuple[list[str | None], list[int]]] = []
    for _ in range(options.requests):
        who = [None if rng.random() < 0.1 else rng.choices(names, weights)[0] for _ in range(options.batch)]
        drawn.append((who, [rng.randrange(len(data)) for _ in who]))

    def one(request: tuple[list[str | None], list[int]]) -> Answer:
        who, rows = request
        return Answer(who, rows, session.run(data.batch(rows), adapter_ids=who)["logits"])

    began = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        answers = list(pool.map(one, drawn))
    seconds = time.perf_counter() - began
    rows = len(answers) * options.batch
    console.print(
        f"{rows} headlines in {len(answers)} mixed batches from {options.clients} threads: "
        f"{rows / seconds:.0f} headlines a second, {seconds / len(answers) * 1e3:.1f} ms a batch"
    )
    return answers


def check(base: nn.Module, names: list[str], answers: list[Answer], data: Headlines) -> float:
    """The largest difference to PyTorch with the row's own adapter, over the largest logit; raises beyond TOLERANCE."""
    worst = largest = 0.0
    for name in [None, *names]:
        model = base if name is None else tenant(base, names.index(name))
        for answer in answers:
            mine = [place for place, other in enumerate(answer.tenants) if other == name]
            if not mine:
                continue
            with torch.inference_mode():
                want = model(**data.batch(answer.rows)).logits[mine].numpy()
            worst = max(worst, float(np.abs(answer.logits[mine] - want).max()))
            largest = max(largest, float(np.abs(want).max()))
    if not worst <= TOLERANCE * largest:
        raise SystemExit(f"the session's answers differ from PyTorch's by {worst:.2e} (largest logit {largest:.2f})")
    return worst / largest


def main() -> None:
    """Export, serve, check."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = minilm_dir()
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    (data,) = read_headlines(folder, [200])
    graph, files = export(base, options)
    session = fg.OrtSession(graph, threads=options.threads)
    for baked in session.slots:  # the tenant the graph was made with has a file as well
        session.unload(baked)
    for name, file in files.items():
        session.register(name, file)  # read by the first batch that asks for it
    answers = serve(session, list(files), data, options)
    difference = check(base, list(files), answers, data)

    stats = session.stats
    table = Table(title="what the session did", title_justify="left", show_header=False)
    for label, value in (
        ("adapter files read", stats.loads),
        ("tenants brought into a slot", stats.slot_fills),
        ("tenants that had to leave one", stats.slot_evictions),
        ("in a slot now", ", ".join(session.slots)),
        ("difference from PyTorch, of the largest logit", f"{difference:.1e}"),
    ):
        table.add_row(label, str(value))
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except (AssetError, fg.FxgraftError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
