"""What a step costs beside time: its peak memory, and how long compilation takes. Each figure from a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness

CANDIDATES = ("base", "fxgraft LoRA r8", "PEFT LoRA r8", "fxgraft Uni-LoRA", "PEFT Uni-LoRA")


def memory(report: harness.Report, *, quick: bool) -> None:
    """Peak of a training step at 8x128 over what the process held before it, eager, in MB."""
    found = {name: _child("memory", name, quick) for name in CANDIDATES}
    lines = [
        f"  {name}: {value:.0f} MB ({value / found['base']:.3f} of the frozen base)" for name, value in found.items()
    ]
    text = "Peak memory of a training step, 8x128, all linears, eager, beside the model:\n" + "\n".join(lines)
    report.fact("training step peak MB", found, text + "\n")


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
def _status(field: str) -> float:
    """A line of this process's memory status, in MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in the process status: this measurement needs Linux")


def _main() -> None:
    import subjects
    import torch

    import fxgraft as fg

    mode, name, size = sys.argv[1:]
    torch.set_num_threads(1)
    layers, width = (2, 256) if size == "quick" else (4, 768)
    base = subjects.bert(layers, width)
    if name == "base":
        model = subjects.frozen(base)
    else:
        (model,) = [s.model for s in subjects.adapters(base, subjects.ALL_LINEAR, 4096) if s.name == name]
    del base
    if mode == "memory":
        model.train()
        call, clear = subjects.training_step(model, subjects.embeddings(2, 8, width, requires_grad=True))
        call()
        clear()
        call, _ = subjects.training_step(model, subjects.embeddings(8, 128, width, requires_grad=True))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        before = _status("VmRSS")
        call()
        print(json.dumps(_status("VmHWM") - before))
        return
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
