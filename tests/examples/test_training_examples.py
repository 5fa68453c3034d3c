"""The training loops of examples/training: each trains, saves and opens what it saved."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "training"
START = math.log(64)  # of guessing among 64 tokens
NEEDS = {
    "hf_trainer": "transformers",
    "accelerate_loop": "accelerate",
    "lightning_module": "lightning",
    "trl_sft": "trl",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", NEEDS)
def test_in_one_process(example, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS[example])
    monkeypatch.syspath_prepend(str(FOLDER))
    trained, loaded = importlib.import_module(example).main(tmp_path)
    assert loaded == pytest.approx(trained, abs=1e-5) and trained < START - 0.05
    size = sum(file.stat().st_size for file in (tmp_path / "final").rglob("adapter_model.safetensors"))
    assert 0 < size < 30_000, "a vector of 2048 and a head of 64 x 64"


@pytest.mark.slow
@pytest.mark.parametrize("example", ["ddp", "fsdp2"])
def test_in_two_processes(example, tmp_path):
    command = [sys.executable, str(FOLDER / f"{example}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    trained, loaded = (float(part.split()[1]) for part in done.stdout.strip().splitlines()[-1].split(", "))
    assert loaded == pytest.approx(trained, abs=1e-4) and trained < START - 0.05
