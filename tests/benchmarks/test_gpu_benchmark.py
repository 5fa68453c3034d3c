"""`benchmarks/gpu.py` on a machine without a GPU: its options, its refusal, and a run that only shows that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
pytest.importorskip("peft")
pytest.importorskip("transformers")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    done = run("--json", "never.json")
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.splitlines()[-1]  # behind what libraries say on being imported
    assert said == f"benchmarks/gpu.py needs an NVIDIA GPU, and this PyTorch ({torch.__version__}) sees none"


def test_figures_of_a_cpu_are_refused():
    done = run("--device", "cpu")
    assert done.returncode == 2 and "goes with --quick only" in done.stderr


@pytest.mark.slow
def test_it_runs_through(tmp_path):
    file = tmp_path / "gpu.json"
    done = run("--quick", "--device", "cpu", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {m["kernel"] for m in found["facts"]["kernels"]} == {
        *("LoRA bank", "LoRA", "Uni-LoRA", "HydraLoRA", "PRoLoRA"),
    }
    assert all(m["error"] < 1e-2 and m["gpu_us"] > 0 for m in found["facts"]["kernels"])
    assert [group["title"].split()[0] for group in found["groups"]] == ["Inference:", "Training:", "Bank"]
