"""`fg.compile(model, kernels=...)`: what is asked for is checked before anything runs, and said afterwards."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo as dynamo
from small_models import perturb

import fxgraft as fg
from fxgraft.backends.compile import kernel_preference as kernels
from fxgraft.backends.triton import optional_triton


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()


@pytest.fixture
def there(monkeypatch):
    """A machine with triton, whose kernels run on CPU tensors."""
    monkeypatch.setattr(optional_triton, "INSTALLED", True)
    monkeypatch.setattr(optional_triton, "DEVICES", ("cpu",))


def adapted(model, method=None, targets=("up", "down")):
    return perturb(fg.rewrite(model, fg.Spec(method or fg.LoRA(2), targets=list(targets))))


def test_an_unknown_preference_is_refused(mlp):
    with pytest.raises(fg.FxgraftError, match=r"kernels='cuda': allowed are 'auto', 'aten', 'triton'"):
        fg.compile(adapted(mlp), kernels="cuda")


def test_triton_that_is_not_installed(mlp, monkeypatch):
    monkeypatch.setattr(optional_triton, "INSTALLED", False)
    with pytest.raises(fg.FxgraftError, match=r"triton is not installed; pip install 'fxgraft\[triton\]', or choose"):
        fg.compile(adapted(mlp), kernels="triton")


def test_no_gpu(mlp, monkeypatch):
    monkeypatch.setattr(optional_triton, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fg.FxgraftError, match="sees no CUDA device; run on one, or choose kernels='auto'"):
        fg.compile(adapted(mlp), kernels=fg.KernelPreference.TRITON)


def test_a_model_elsewhere(mlp, monkeypatch):
    monkeypatch.setattr(optional_triton, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(fg.FxgraftError, match=r"up\.weight is on cpu, and kernels run on cuda; move the model"):
        fg.compile(adapted(mlp), kernels="triton")


def test_a_method_without_a_kernel(mlp, there):
    model = adapted(mlp, fg.GLoRA(2, fg.GLoRAPath(A="lora", B="none", C="none", D="none", E="none")))
    with pytest.raises(
        fg.FxgraftError, match=r"fxgraft::glora at 'up' has no kernel; those with one are .*fxgraft::lora"
    ):
        fg.compile(model, kernels="triton")


def test_a_dtype_without_a_kernel(mlp, there):
    with pytest.raises(fg.FxgraftError, match=r"'up' has torch\.float64 weights; kernels take torch\.float32"):
        fg.compile(adapted(mlp.double()), kernels="triton")


def test_the_request_that_can_be_is_accepted(mlp, there):
    kernels.check(adapted(mlp))


@pytest.mark.parametrize(
    ("wanted", "text"),
    [("aten", "kernels aten: no kernels of ours"), ("auto", "kernels auto: ATen only, as nothing is on cuda")],
)
def test_explain_says_it(mlp, wanted, text):
    fast = fg.compile(adapted(mlp), kernels=wanted)
    with torch.no_grad():
        fast(torch.ones(2, 7))
    assert text in str(fg.explain(fast))


def test_auto_without_triton_is_aten(mlp, monkeypatch):
    monkeypatch.setattr(optional_triton, "DEVICES", ("cpu",))
    monkeypatch.setattr(optional_triton, "INSTALLED", False)
    fast = fg.compile(adapted(mlp))
    with torch.no_grad():
        fast(torch.ones(2, 7))
    (note,) = fg.explain(fast).compiled
    assert note.pipeline == "inference" and note.kernels == "auto: ATen only, as triton is not installed"
