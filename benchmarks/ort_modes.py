"""Exported graphs in ONNX Runtime on the CPU: what each mode costs, how fast adapters come and go, many tenants.

Every graph is timed through `OrtSession`, the base's as well, so checks and wrapping are in all of them alike.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
import numpy as np
import ort_tenants
import plot
import subjects
import torch
from ort_subjects import RANK, ids, minilm, stirred
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxgraft as fg

WHAT = ("modes", "load", "tenants")
DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BANKED = 8


def encoder(quick: bool) -> nn.Module:
    """A BERT of base width, 4 layers; token ids in, so that the graph is what a user would export."""
    return subjects.bert(2, 256) if quick else subjects.bert()


def decoder(quick: bool) -> nn.Module:
    """4 layers of SmolLM2-135M's shape, whole sequences (prefill)."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=1 if quick else 4,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Graphs:
    """The graphs of one base, exported once into a folder."""

    def __init__(self, base: nn.Module, targets: tuple[str, ...], length: int, folder: Path, threads: int | None):
        self.folder, self.threads = folder, threads
        example = {"input_ids": torch.from_numpy(ids(4, 8)["input_ids"])}
        self.sessions: dict[str, fg.OrtSession] = {}
        lora = stirred(base, fg.LoRA(rank=RANK, alpha=16), targets)
        self._add("base", base, example)
        self._add("merged", lora, example)
        self._add("swappable", lora, example, adapters="swappable")
        self.sessions["swappable"].load("lora", self._file(lora, "lora"))
        uni = stirred(base, fg.UniLoRA(rank=subjects.UNILORA_RANK, vector_length=length), targets, 1)
        self.sessions["swappable"].load("unilora", self._file(uni, "unilora"))
        self._add("vector", uni, example, adapters="swappable", expanded=False)
        self.sessions["vector"].load("unilora", self._file(uni, "vector", expanded=False))
        for index in range(1, BANKED):
            name = f"t{index}"
            lora = fg.rewrite(lora, fg.Spec(fg.LoRA(rank=RANK, alpha=16), targets=list(targets)), name=name)
            state = fg.adapter_state(lora, name)
            fg.swap(lora, {key: torch.randn_like(value) * 1e-2 for key, value in state.items()}, name=name)
        self._add("bank", lora, example, adapters="bank")
        self.tenants = list(self.sessions["bank"].slots)

    def _add(self, name: str, model: nn.Module, example: Mapping[str, torch.Tensor], **options: Any) -> None:
        path = self.folder / f"{name}.onnx"
        fg.export_onnx(model, path, dict(example), **options)
        self.sessions[name] = fg.OrtSession(path, providers=["CPUExecutionProvider"], threads=self.threads)

    def _file(self, model: nn.Module, name: str, **options: Any) -> Path:
        return fg.export_ort_adapter(model, self.folder / f"{name}.onnx_adapter", **options)

    def candidates(self, inputs: dict[str, np.ndarray]) -> list[harness.Candidate]:
        """One row per mode."""

        def run(session: str, **options: Any) -> Callable[[], object]:
            return lambda: self.sessions[session].run(inputs, **options)

        batch = len(inputs["input_ids"])
        return [
            harness.Candidate("base", run("base")),
            harness.Candidate("merged", run("merged")),
            harness.Candidate("swappable, no adapter", run("swappable")),
            harness.Candidate(f"swappable, LoRA r{RANK}", run("swappable", adapter="lora")),
            harness.Candidate("swappable, Uni-LoRA expanded at load", run("swappable", adapter="unilora")),
            harness.Candidate("Uni-LoRA's vector in the graph", run("vector", adapter="unilora")),
            harness.Candidate(
                f"bank of {BANKED}, mixed batch",
                run("bank", adapter_ids=[self.tenants[i % len(self.tenants)] for i in range(batch)]),
            ),
        ]


def modes(report: harness.Report, *, quick: bool, threads: int | None) -> None:
    """Every mode against the base's graph."""
    shapes = [(2, 8), (1, 1)] if quick else [(8, 64), (1, 1)]
    for title, base, everything, few in (
        ("encoder", encoder(quick), subjects.ALL_LINEAR, subjects.QUERY_VALUE),
        ("decoder", decoder(quick), DECODER_LINEARS, ("q_proj", "v_proj")),
    ):
        for where, targets in (("all linears", everything), ("query and value", few)):
            with tempfile.TemporaryDirectory() as folder:
                graphs = Graphs(base, targets, 2048 if quick else subjects.UNILORA_LENGTH, Path(folder), threads)
                for shape in shapes:
                    name = f"ONNX Runtime, {title}, adapters on {where}, {shape[0]}x{shape[1]}"
                    found = graphs.candidates(ids(*shape))
                    report.add(harness.measure(name, found, "base", rounds=report.options["rounds"]))


def load(report: harness.Report, *, quick: bool, threads: int | None) -> None:
    """From a file to the first run with it, and from one loaded adapter to another, on MiniLM's structure."""
    base, count = minilm(), 5 if quick else 30
    inputs = ids(1, 16)
    example = {"input_ids": torch.from_numpy(ids(4, 8)["input_ids"])}
    for where, targets in (("query and value", subjects.QUERY_VALUE), ("all linears", subjects.ALL_LINEAR)):
        methods = {
            "LoRA r8": fg.LoRA(rank=RANK, alpha=16),
            "Uni-LoRA r4": fg.UniLoRA(rank=subjects.UNILORA_RANK, vector_length=subjects.UNILORA_LENGTH),
            "PRoLoRA r8": fg.PRoLoRA(rank=8, unshared=1, a_chunks=6, b_chunks=6),
        }
        adapted = {name: stirred(base, method, targets) for name, method in methods.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            fg.export_onnx(adapted["LoRA r8"], path, example, adapters="swappable")
            lines = []
            for name, model in adapted.items():
                file = fg.export_ort_adapter(model, Path(folder) / "a.onnx_adapter")
                session = fg.OrtSession(path, providers=["CPUExecutionProvider"], threads=threads)
                session.run(inputs)
                began = time.perf_counter()
                session.load("first", file)
                first = (time.perf_counter() - began) * 1e3
                times = []
                for index in range(count):
                    began = time.perf_counter()
                    session.load(f"a{index}", file)
                    times.append((time.perf_counter() - began) * 1e3)
                same, other = _switching(session, inputs, count)
                found = {"first ms": first, "next ms": statistics.median(times), "switch ms": other - same}
                report.facts[f"load, {where}, {name}"] = found
                size = file.stat().st_size / 1e3
                lines.append(
                    f"  {name}: {size:.1f} kB; first of its kind {first:.1f} ms, the next ones "
                    f"{found['next ms']:.1f} ms; a run after another adapter's takes {other - same:+.3f} ms more"
                )
        text = f"Loading adapters, MiniLM's structure, {where} (file to ready; medians of {count}):\n"
        report.fact(f"load, {where}", None, text + "\n".join(lines) + "\n")


def _switching(session: fg.OrtSession, inputs: dict[str, np.ndarray], count: int) -> tuple[float, float]:
    """Milliseconds of a run with the adapter of the run before it, and with another one, interleaved."""
    times: dict[bool, list[float]] = {False: [], True: []}
    current = 0
    for turn in range(8 * count):
        changed = turn % 2 == 1
        current = (current + changed) % 2
        began = time.perf_counter()
        session.run(inputs, adapter=f"a{current}")
        times[changed].append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[False]), statistics.median(times[True])


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], rounds=60, quick_rounds=3)
    parser.add_argument("--what", choices=WHAT, nargs="+", default=WHAT, help="what is measured")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios of the JSON file, which it needs")
    options = parser.parse_args()
    if options.plot and not options.json:
        parser.error("--plot draws what --json wrote: give both")
    report = harness.start("ort", options)
    if "modes" in options.what:
        modes(report, quick=options.quick, threads=options.threads)
    if "load" in options.what:
        load(report, quick=options.quick, threads=options.threads)
    if "tenants" in options.what:
        ort_tenants.measure(report, quick=options.quick, threads=options.threads)
    if options.plot:
        plot.ratios(options.json, options.plot)


if __name__ == "__main__":
    main()
