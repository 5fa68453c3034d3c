"""A layer too small for a method's rank or chunks takes less, and `explain` says so; exact names win over endings."""

import copy
import json
import warnings

import pytest
import torch
from methods import METHODS, graft
from safetensors.torch import load_file, save_file
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.create import graft_adapter
from fxgraft.rewriter.state import record_of

LARGE = {
    "lora": fg.LoRA(rank=6, alpha=12),
    "rslora": fg.LoRA(rank=8, rslora=True),
    "lora_xs": fg.LoRAXS(rank=6),
    "lora_sb": fg.LoRASB(rank=6),
    "prolora": fg.PRoLoRA(rank=6, unshared=4, a_chunks=9, b_chunks=5),
    "hydralora": fg.HydraLoRA(rank=6, experts=2),
    "glora": fg.GLoRA(rank=6, path=fg.GLoRAPath("lora", "vector", "lora", "vector", "vector")),
    "supernet": fg.GLoRA(rank=6),
}


class Narrow(nn.Module):
    """One layer that is large enough, one of 3 features out."""

    def __init__(self, out: int = 3):
        super().__init__()
        self.wide, self.narrow = nn.Linear(9, 16), nn.Linear(16, out)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Narrow().eval()


X = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", LARGE.values(), ids=LARGE)
def test_takes_less_and_says_so(model, method, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = perturb(graft(model, fg.Spec(method, ["wide", "narrow"]))).eval()
    wide, narrow = [row for row in fg.explain(adapted).rows if row.kind == "site"]
    assert wide.less == "" and f"rank 3 of {method.rank}" in narrow.less
    own, less = [group.method for group in record_of(adapted, "default").groups]
    assert own == method and less.rank == 3
    if hasattr(method, "scale"):
        assert less.scale == pytest.approx(method.scale)
    want = adapted(X)
    fg.save_adapter(adapted, tmp_path)
    opened = fg.load_adapter(model, tmp_path).eval()
    assert torch.equal(opened(X), want)
    if not (method.unmergeable or (isinstance(method, fg.GLoRA) and method.path is None)):
        torch.testing.assert_close(fg.merge(adapted)(X), want, rtol=1e-5, atol=1e-5)
    other = graft(model, fg.Spec(method, ["wide", "narrow"])).eval()
    fg.swap(other, fg.adapter_state(adapted))
    assert torch.equal(other(X), want)
    if method.not_low_rank is None:
        for tenant in (fg.adapter_state(adapted), dict(fg.adapter_state(adapted)), tmp_path):
            banked = fg.bank(model, {"a": tenant}, spec=fg.Spec(method, ["wide", "narrow"]))
            got = banked(X, adapter_ids=fg.adapter_ids(banked, ["a"] * 4))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_chunks_that_a_site_cannot_have(model):
    method = fg.PRoLoRA(rank=3, unshared=1, a_chunks=12, b_chunks=5)
    rows = fg.explain(fg.rewrite(model, fg.Spec(method, ["wide", "narrow"]))).rows
    assert [row.less for row in rows] == ["a_chunks 9 of 12", "b_chunks 3 of 5"]
    assert "(b_chunks 3 of 5)" in " ".join(str(fg.explain(fg.rewrite(model, fg.Spec(method, "narrow")))).split())


def test_what_fits_stays_one_group_and_its_files_as_they_were(tmp_path):
    model = Narrow(5)
    for name, method in METHODS.items():
        adapted = graft(model, fg.Spec(method, ["wide", "narrow"]))
        assert len(record_of(adapted, "default").groups) == 1, name
        fg.save_adapter(adapted, tmp_path)
        assert "fitted" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_adapters_with_more_than_a_layer_can_use_open_as_they_are(model, tmp_path):
    """Those that were saved before layers took less, and other programs'."""
    spec = fg.Spec(fg.LoRA(6), ["wide", "narrow"])
    with pytest.warns(UserWarning, match="smaller than the rank"):
        before = perturb(graft_adapter(model, spec, "default")).eval()
    assert fg.adapter_state(before)["narrow.A"].shape == (6, 16)
    fg.save_adapter(before, tmp_path)
    with pytest.warns(UserWarning, match="smaller than the rank"):
        opened = fg.load_adapter(model, tmp_path).eval()
    assert torch.equal(opened(X), before(X)) and fg.explain(opened).rows[1].less == ""


def test_peft_writes_and_reads_the_ranks(model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(6, alpha=12), ["wide", "narrow"]))).eval()
    fg.save_adapter(adapted, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(theirs.eval()(X), adapted(X), rtol=1e-5, atol=1e-5)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.inner, self.act = nn.Linear(4, 4), nn.Module(), nn.Module()
        self.inner.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner.fc(self.fc(x))


class Twice(Plain):
    """With a module of the name that is no linear."""

    def __init__(self):
        super().__init__()
        self.act.fc = nn.ReLU()

    def forward(self, x):
        return self.act.fc(super().forward(x))


def test_exact_names_win_over_endings(tmp_path):
    model = Twice()
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["fc"]))
    assert [row.site for row in fg.explain(adapted).rows] == ["fc"]
    both = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["fc", "inner.fc"]))
    assert [row.site for row in fg.explain(both).rows] == ["fc", "inner.fc"]
    # an adapter that was saved when an ending meant both has both sites, and keeps them
    fg.save_adapter(both, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["spec"]["targets"] = ["fc"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without the record of the config
    opened = fg.load_adapter(Plain(), tmp_path)
    assert [row.site for row in fg.explain(opened).rows] == ["fc", "inner.fc"]
