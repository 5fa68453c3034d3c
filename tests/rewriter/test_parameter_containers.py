"""Weights in a ParameterList or a ParameterDict: the module around the container computes with them."""

from __future__ import annotations

import copy
import pickle

import methods
import pytest
import torch
import torch.nn.functional as F
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg

TARGETS = ["stack.0", "stack.2", "named.out"]


class Stacked(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.stack = nn.ParameterList([nn.Parameter(torch.randn(6, 6) * 0.4) for _ in range(count)])
        self.named = nn.ParameterDict({"out": nn.Parameter(torch.randn(6, 4) * 0.4)})
        self.table = nn.ParameterList([nn.Parameter(torch.randn(6, 6))])  # added, never multiplied with

    def forward(self, x):
        for weight in self.stack:
            x = torch.tanh(F.linear(x, weight))
        return (x + self.table[0][0]) @ self.named["out"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), Stacked()

    def forward(self, x):
        return self.inner(self.first(x))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def base(count=3):
    torch.manual_seed(0)
    return Stacked(count)


def merged_twin(adapted):
    """The merged model in float64: what the adapted one has to compute."""
    return fg.merge(adapted).double()


@pytest.mark.parametrize("name", [name for name in methods.MERGEABLE if name in methods.BIAS_FREE])
def test_every_method_and_verb(name, tmp_path):
    model = base()
    adapted = perturb(methods.graft(model, fg.Spec(methods.MERGEABLE[name], TARGETS)))
    before, out = model(X), adapted(X)
    assert relative_error(out, merged_twin(adapted)(X.double())) < 1e-5 < relative_error(out, before)
    with fg.disabled(adapted):
        assert torch.equal(adapted(X), before)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    assert adapted.state_dict().keys() >= model.state_dict().keys() and len(adapted.stack) == 3
    assert adapted.stack[1].data_ptr() == model.stack[1].data_ptr() and list(adapted.named) == ["out"]
    fg.save_adapter(adapted, tmp_path)
    for twin in (fg.load_adapter(model, tmp_path), copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(X), out)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(X), before)


def test_all_linear_means_them_and_no_table():
    adapted = fg.rewrite(Outer(), fg.Spec(fg.LoRA(rank=2), ["all-linear"]))
    sites = {row.site for row in fg.explain(adapted).rows if row.kind == "site"}
    assert sites == {"first", "inner.stack.0", "inner.stack.1", "inner.stack.2", "inner.named.out"}
    with pytest.raises(fg.TargetError, match=r"'table\.0' cannot be adapted"):
        fg.rewrite(base(), fg.Spec(fg.LoRA(rank=2), ["table.0"]))


def test_lists_of_other_lengths_have_graphs_of_their_own():
    for count in (3, 4, 2):
        model = base(count)
        adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["stack.1"])))
        assert relative_error(adapted(X), merged_twin(adapted)(X.double())) < 1e-5


def test_one_graph_and_onnx(tmp_path):
    adapted = perturb(fg.rewrite(base().eval(), fg.Spec(fg.LoRA(rank=2), TARGETS)))
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(X), adapted(X))
    assert fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="swappable").parity
    other = perturb(fg.rewrite(base().eval(), fg.Spec(fg.LoRA(rank=2), TARGETS)), 3)
    banked = fg.bank(adapted, {"a": adapted, "b": other}, example_inputs=(X,))
    mixed = banked(X, adapter_ids=fg.adapter_ids(banked, ["a", "b", None, "a", "b"]))
    torch.testing.assert_close(mixed[[0, 3]], adapted(X)[[0, 3]])
    torch.testing.assert_close(mixed[[1, 4]], other(X)[[1, 4]])
