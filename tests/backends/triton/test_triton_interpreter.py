"""The kernels in Triton's interpreter, on CPU tensors, against float64 oracles: forward and backward.

The interpreter is chosen when triton is imported, so the cases (`triton_cases.py`) run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import CASES, DTYPES, METHODS

#: of the oracle's largest entry. Half precision: two roundings of the result's and of z's 11 bits. The interpreter cuts
#: bfloat16's 8 bits off instead of rounding them, which doubles their error.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def outcome():
    script = Path(__file__).parents[2] / "helpers" / "triton_cases.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=500, env=environment, cwd=script.parent
    )
    if done.returncode and "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("this triton's interpreter (3.6) needs a NumPy before 2.4")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, dtype, outcome):
    errors = outcome["errors"][f"{case}, {dtype}"]
    assert len(errors) >= 3
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCES[dtype]}
    assert not wrong


def test_wrong_ids_give_nan(outcome):
    """Nothing outside the stack is read, and it shows."""
    assert outcome["wrong ids"] == [False, True, True, False]


def test_the_sum_by_index(outcome):
    found = outcome["segments"]
    assert found["error"] < 1e-7 and found["tiny"] < 1e-6
    assert found["same bits"] and found["zeros"] == 0 and found["nan"]


def test_every_method_through_the_compiler(outcome):
    done = outcome["compile"]
    assert done["forward"] < 1e-5 and done["backward"] < 1e-5
    assert len(done["notes"]) == 2  # one graph to serve, one to train
    for note in done["notes"]:
        assert "kernels triton: triton" in note and f"Lower made {len(METHODS)} nodes (asked for)" in note
