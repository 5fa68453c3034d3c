"""The kernels on a GPU, against float64 oracles: `pytest -m gpu tests/backends/triton/test_triton_gpu.py`."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch._dynamo as dynamo
import triton_cases as cases
from torch import nn

import fxgraft as fg

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

#: of the oracle's largest entry; half precision: the roundings of z and of the result
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()


def poison() -> None:
    """Leave NaN in the memory the next results will get, so that an entry nobody writes shows."""
    for megabytes in (1, 8, 64):
        torch.full((megabytes << 18,), torch.nan, device="cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", [*cases.CASES, *cases.LARGE])
def test_against_float64(name, dtype):
    case = cases.make(name, cases.DTYPES[dtype], "cuda")
    poison()
    wrong = {key: error for key, error in cases.errors(case).items() if not error < TOLERANCES[dtype]}
    assert not wrong


@pytest.mark.parametrize("name", cases.LARGE)
def test_the_same_bits_every_run(name):
    case = cases.make(name, torch.bfloat16, "cuda")
    first, second = (case.call(**case.tensors) for _ in range(2))
    assert torch.equal(first, second)


def test_wrong_ids_give_nan():
    assert cases.wrong_ids("cuda") == [False, True, True, False]


def test_the_sum_by_index():
    found = cases.segment_sums("cuda")
    assert found["error"] < 1e-7 and found["tiny"] < 1e-6
    assert found["same bits"] and found["zeros"] == 0 and found["nan"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_method_through_the_compiler(mode):
    done = cases.through_compile("cuda", mode=mode)
    assert done["forward"] < 1e-5 and done["backward"] < 1e-4
    assert all(f"Lower made {len(cases.METHODS)} nodes (asked for)" in note for note in done["notes"])


def test_a_bank_in_cuda_graphs_uses_the_kernel_by_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(768, 3072)

        def forward(self, x):
            return self.up(x)

    model = fg.rewrite(Model().eval().cuda(), fg.Spec(fg.LoRA(8), targets=["up"]))
    states = {name: {key: torch.randn_like(value) for key, value in fg.adapter_state(model).items()} for name in "abcd"}
    banked = fg.bank(model, states)
    fast = fg.compile(banked, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(5, 1, 768, device="cuda")
    with torch.no_grad():
        for names in (["a", "b", None, "d", "a"], ["c", "c", "c", "a", None]):
            ids = fg.adapter_ids(banked, names)
            torch.testing.assert_close(fast(x, adapter_ids=ids), banked(x, adapter_ids=ids), rtol=1e-4, atol=1e-4)
    assert "Lower made 1 nodes" in str(fg.explain(fast))
