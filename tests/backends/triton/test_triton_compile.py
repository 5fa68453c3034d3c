"""The kernels compiled ahead of time for sm_80 and sm_90: nothing spills, and RESOURCES.md tells what they take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
FILE = Path(__file__).resolve().parents[3] / "backends" / "triton" / "RESOURCES.md"
REDO = "run `python -m fxgraft.backends.triton.resources --write`"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fxgraft.backends.triton.resources"],
        capture_output=True, text=True, timeout=500, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


def test_nothing_spills(table):
    assert len(rows(table)) > 8
    assert [row for row in rows(table) if "SPILLED" in row] == []


def test_the_written_table_is_current(table):
    written = FILE.read_text(encoding="utf-8")
    version = importlib.metadata.version("triton")
    if f"Triton {version};" not in written:
        pytest.skip(f"RESOURCES.md is of another triton than {version}, which compiles to other registers")
    assert written == table, f"the kernels changed: {REDO}"


def test_a_spill_would_show():
    from fxgraft.backends.triton.resources import Resources

    assert "SPILLED" in str(Resources(255, 0, 36)) and "SPILLED" not in str(Resources(255, 0, 0))
