"""What a step costs beside time: the peak of its tensors, and how long compilation takes in a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness
import subjects
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxgraft as fg


def memory(report: harness.Report, *, quick: bool) -> None:
    """Peak of the tensors that a training step at 8x128 allocates, eager, in MB.

    From the profiler's record of every allocation: the resident set of a process also has what the allocator keeps,
    and differs by more than adapters do.
    """
    layers, width, length = (2, 256, 4096) if quick else (4, 768, subjects.UNILORA_LENGTH)
    base = subjects.bert(layers, width)
    models = {"base": subjects.frozen(base)}
    models |= {subject.name: subject.model for subject in subjects.adapters(base, subjects.ALL_LINEAR, length)}
    found = {name: _peak(model.train(), width) for name, model in models.items()}
    lines = [
        f"  {name}: {value:.1f} MB ({value / found['base']:.3f} of the frozen base)" for name, value in found.items()
    ]
    text = "Peak of the tensors a training step allocates, 8x128, all linears, eager:\n" + "\n".join(lines)
    report.fact("training step peak MB", found, text + "\n")


def _peak(model: nn.Module, width: int) -> float:
    call, clear = subjects.training_step(model, subjects.embeddings(8, 128, width, requires_grad=True))
    call()
    clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def compile_time(report: harness.Report, *, quick: bool) -> None:
    """First call of a fresh process without Inductor's caches, seconds; the median of three, taken in turn."""
    names = ("base", "fxgraft LoRA r8", "fxgraft Uni-LoRA")
    for mode in ("inference", "training"):
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(1 if quick else 3):
            for name in names:
                times[name].append(_child(mode, name, quick))
        found = {name: statistics.median(values) for name, values in times.items()}
        lines = [f"  {n}: {t:.1f} s ({t / found['base']:.2f} of the base)" for n, t in found.items()]
        report.fact(f"compile seconds, {mode}", found, f"Compile time, {mode}, 8x128:\n" + "\n".join(lines) + "\n")


def _child(mode: str, name: str, quick: bool) -> float:
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    command = [sys.executable, str(Path(__file__)), mode, name, "quick" if quick else "full"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{mode} of {name!r} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


# -- the child -----------------------------------------------------------------------------------------------------
def _main() -> None:
    mode, name, size = sys.argv[1:]
    torch.set_num_threads(1)
    layers, width = (2, 256) if size == "quick" else (4, 768)
    base = subjects.bert(layers, width)
    if name == "base":
        model = subjects.frozen(base)
    else:
        (model,) = [s.model for s in subjects.adapters(base, subjects.ALL_LINEAR, 4096) if s.name == name]
    del base
    training = mode == "training"
    model.train(training)
    compiled = torch.compile(model) if name == "base" else fg.compile(model)
    inputs = subjects.embeddings(8, 128, width, requires_grad=training)
    step = subjects.training_step(compiled, inputs)[0] if training else subjects.forward(compiled, inputs)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    start = time.perf_counter()
    step()
    print(json.dumps(first - (time.perf_counter() - start)))


if __name__ == "__main__":
    _main()
