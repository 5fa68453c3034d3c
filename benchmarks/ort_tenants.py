"""Two hundred tenants of one base: mixed batches from a bank, one run each, merged graphs reloaded, and PEFT.

The same requests for all: batches of 8 from 200 tenants, drawn by a Zipf law, so that some tenants are asked for often
and most rarely. Each way runs in a process of its own, which says how many samples a second it served and how much its
memory grew from before the first tenant was there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import peft
import subjects
import torch
from ort_subjects import RANK, ids, minilm, stirred

import fxgraft as fg

TENANTS, BATCH, TOKENS = 200, 8, 16
SLOTS = 32  # of the bank: tenants come and go over them
WAYS = {
    "bank": f"bank of {SLOTS} slots, mixed batches",
    "swappable": "swappable graph, one run per tenant of the batch",
    "merged": "a merged graph per tenant, opened when asked for",
    "peft": "PEFT adapter_names in torch, mixed batches",
}


def requests(count: int, tenants: int) -> list[list[str]]:
    """Which tenant every sample of every batch belongs to."""
    weights = 1 / np.arange(1, tenants + 1)
    drawn = np.random.default_rng(0).choice(tenants, (count, BATCH), p=weights / weights.sum())
    return [[f"t{tenant}" for tenant in row] for row in drawn]


def measure(report: harness.Report, *, quick: bool, threads: int | None) -> None:
    """Throughput and memory of every way."""
    tenants, count = (6, 4) if quick else (TENANTS, 60)
    with tempfile.TemporaryDirectory() as folder:
        _child("prepare", folder, tenants, count, threads)
        found = {way: _child(way, folder, tenants, count, threads) for way in WAYS}
    lines = [
        f"  {title}: {found[way]['samples_per_s']:.1f} samples/s, {found[way]['grown_mb']:.0f} MB more than before, "
        f"{found[way]['ready_s']:.1f} s until all tenants were known" for way, title in WAYS.items()
    ]  # fmt: skip
    text = f"{tenants} tenants, LoRA r{RANK} on query and value of MiniLM's structure, batches of {BATCH}x{TOKENS}:\n"
    report.fact("tenants", found, text + "\n".join(lines) + "\n")


def _child(way: str, folder: str, tenants: int, count: int, threads: int | None) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), way, folder, str(tenants), str(count), str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# -- the child -----------------------------------------------------------------------------------------------------
def _resident() -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in the process status: this measurement needs Linux")


def _tenant(base: Any, index: int) -> Any:
    return stirred(base, fg.LoRA(rank=RANK, alpha=16), subjects.QUERY_VALUE, index)


def prepare(folder: Path, tenants: int) -> None:
    """The graphs, and a file for every tenant; of merged graphs one, which stands for all: they are equally large."""
    base = minilm()
    example = {"input_ids": torch.from_numpy(ids(4, 8)["input_ids"])}
    for index in range(tenants):
        adapted = _tenant(base, index)
        fg.export_ort_adapter(adapted, folder / f"t{index}.onnx_adapter")
        if index == 0:
            fg.export_onnx(adapted, folder / "merged.onnx", example)
            fg.export_onnx(adapted, folder / "swappable.onnx", example, adapters="swappable")
            fg.export_onnx(adapted, folder / "bank.onnx", example, adapters="bank", capacity=SLOTS)


def bank(folder: Path, tenants: int, threads: int | None) -> Callable[[], Callable[[list[str]], object]]:
    session = fg.OrtSession(folder / "bank.onnx", providers=["CPUExecutionProvider"], threads=threads)
    inputs = ids(BATCH, TOKENS)

    def ready() -> Callable[[list[str]], object]:
        for index in range(tenants):
            session.register(f"t{index}", folder / f"t{index}.onnx_adapter")
        return lambda names: session.run(inputs, adapter_ids=names)

    for baked in session.slots:  # the tenant the graph was made with
        session.unload(baked)
    return ready


def swappable(folder: Path, tenants: int, threads: int | None) -> Callable[[], Callable[[list[str]], object]]:
    session = fg.OrtSession(folder / "swappable.onnx", providers=["CPUExecutionProvider"], threads=threads)
    inputs = ids(BATCH, TOKENS)["input_ids"]

    def serve(names: list[str]) -> None:
        for name in set(names):
            rows = [i for i, other in enumerate(names) if other == name]
            session.run({"input_ids": inputs[rows]}, adapter=name)

    def ready() -> Callable[[list[str]], object]:
        for index in range(tenants):
            session.register(f"t{index}", folder / f"t{index}.onnx_adapter")
        return serve

    return ready


def merged(folder: Path, tenants: int, threads: int | None) -> Callable[[], Callable[[list[str]], object]]:
    inputs = ids(BATCH, TOKENS)["input_ids"]

    def serve(names: list[str]) -> None:
        for name in set(names):
            rows = [i for i, other in enumerate(names) if other == name]
            session = fg.OrtSession(folder / "merged.onnx", providers=["CPUExecutionProvider"], threads=threads)
            session.run({"input_ids": inputs[rows]})

    return lambda: serve


def peft_(folder: Path, tenants: int, threads: int | None) -> Callable[[], Callable[[list[str]], object]]:
    if threads:
        torch.set_num_threads(threads)
    base = minilm()
    inputs = torch.from_numpy(ids(BATCH, TOKENS)["input_ids"])
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["query", "value"])

    def ready() -> Callable[[list[str]], object]:
        model = peft.get_peft_model(base, config, adapter_name="t0")
        for index in range(1, tenants):
            model.add_adapter(f"t{index}", config)
        model.eval()

        def serve(names: list[str]) -> object:
            with torch.no_grad():
                return model(input_ids=inputs, adapter_names=names)

        return serve

    return ready


def _main() -> None:
    way, folder, tenants, count, threads = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
    if way == "prepare":
        prepare(folder, tenants)
        print(json.dumps({}))
        return
    ready = {"bank": bank, "swappable": swappable, "merged": merged, "peft": peft_}[way](
        folder, tenants, threads or None
    )
    asked = requests(count, tenants)
    before, began = _resident(), time.perf_counter()
    serve = ready()
    took = time.perf_counter() - began
    serve(asked[0])
    began = time.perf_counter()
    for names in asked:
        serve(names)
    seconds = time.perf_counter() - began
    print(json.dumps({
        "samples_per_s": count * BATCH / seconds, "grown_mb": _resident() - before, "ready_s": took,
    }))  # fmt: skip


if __name__ == "__main__":
    _main()
