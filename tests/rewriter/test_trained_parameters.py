"""Single parameters in `train=`: `"*.bias"` is BitFit. The adapter's copies stand for the base's, in every verb."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, graft
from one_layer import Net
from small_models import MLP, perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

BIASES = ("up.bias", "head.bias")


def adapted_mlp(method=METHODS["lora"], train="*.bias", name="default", **options):
    torch.manual_seed(0)
    model = MLP()
    return model, perturb(graft(model, fg.Spec(method, ["up", "down"], train=train, **options), name))


def oracle(model, adapted, x, name="default"):
    """The model in float64 with the trained values and the deltas written into it by hand."""
    twin, state = copy.deepcopy(model).double(), fg.adapter_state(adapted, name)
    with torch.no_grad():
        for key in BIASES:
            if key in state:
                twin.get_parameter(key).copy_(state[key])
        for site in ("up", "down"):
            if f"{site}.A" in state:
                twin.get_parameter(f"{site}.weight").add_(
                    state[f"{site}.B"].double() @ state[f"{site}.A"].double() * (16 / 2)
                )
    return twin(x.double())


def test_biases_train_and_nothing_else_beside_the_adapter():
    model, adapted = adapted_mlp()
    before = copy.deepcopy(model.state_dict())
    assert set(fg.adapter_state(adapted)) == {"up.A", "up.B", "down.A", "down.B", *BIASES}
    assert record_of(adapted, "default").parameters == BIASES
    x = torch.randn(6, 7)
    torch.testing.assert_close(adapted(x).double(), oracle(model, adapted, x), rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    start = {k: v.clone() for k, v in fg.adapter_state(adapted).items()}
    adapted(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(v, start[k]) for k, v in fg.adapter_state(adapted).items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: v for k, v in adapted.state_dict().items() if k in before}.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items() if k in before)
    with fg.disabled(adapted):
        assert torch.equal(adapted(x), model(x))
    explained = fg.explain(adapted)
    assert explained.trainable == sum(t.numel() for t in fg.adapter_state(adapted).values())
    assert {row.site for row in explained.rows if row.kind == "trained"} == {"up", "head"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_or_the_reason(method, tmp_path):
    try:
        model, adapted = adapted_mlp(METHODS[method])
    except fg.SpecError as error:
        assert "changes the bias there, and 'up.bias' is trained in full too" in str(error)
        assert METHODS[method].adds_bias(record_of(adapted_mlp()[1], "default").sites[0])
        return
    except fg.TargetError as error:
        assert "leave it out of train, or" in str(error) and method in ("glora", "supernet")
        return
    adapted.eval()
    x = torch.randn(6, 7)
    out = adapted(x)
    fg.save_adapter(adapted, tmp_path / "own")
    assert torch.equal(fg.load_adapter(model, tmp_path / "own").eval()(x), out)
    if METHODS[method].unmergeable is None:
        merged = fg.merge(adapted)
        assert type(merged) is MLP
        torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-5)
        assert not torch.equal(merged.head.bias, model.head.bias)
    if METHODS[method].not_low_rank is None:
        torch.testing.assert_close(fg.to_lora(adapted)(x), out, rtol=1e-4, atol=1e-5)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(x), out)
        perturb(twin)
        assert torch.equal(adapted(x), out)
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(x), out, rtol=1e-5, atol=1e-6)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(x), model(x)) and type(adapted) is MLP


def test_two_adapters_switch_and_never_share_a_trained_parameter():
    model, adapted = adapted_mlp(name="a")
    adapted = perturb(fg.rewrite(adapted, fg.Spec(fg.LoRA(rank=1), ["up"], train="head.bias"), name="b"))
    x = torch.randn(4, 7)
    fg.set_active(adapted, ["a"])
    torch.testing.assert_close(adapted(x).double(), oracle(model, adapted, x, "a"), rtol=1e-5, atol=1e-5)
    with pytest.raises(fg.AdapterError, match=r"both bring their own trained 'head\.bias'"):
        fg.set_active(adapted, ["a", "b"])
    with pytest.raises(fg.AdapterError, match="Give it the weight 1"):
        fg.set_active(adapted, {"a": 0.5})
    adapted = fg.rewrite(adapted, fg.Spec(METHODS["glora"], ["up"]), name="c")
    with pytest.raises(fg.AdapterError, match=r"trains 'up\.bias' in full, and adapter 'c' changes the base's"):
        fg.set_active(adapted, ["a", "c"])
    fg.set_active(adapted, ["b"])
    state = fg.adapter_state(adapted, "b")
    fg.swap(adapted, {k: v * 2 for k, v in state.items()}, "b")
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.head.bias.copy_(fg.adapter_state(adapted, "b")["head.bias"])
        expected.up.weight += fg.adapter_state(adapted, "b")["up.B"] @ fg.adapter_state(adapted, "b")["up.A"] * 16
    torch.testing.assert_close(adapted(x), expected(x), rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.fc(self.embed(ids))))


@pytest.mark.parametrize("keep_ties", [True, False])
def test_what_is_tied_to_a_trained_parameter(keep_ties):
    model, ids = Tied(), torch.randint(0, 9, (3, 4))
    spec = fg.Spec(fg.LoRA(rank=2), "fc", train=["head.weight", "norm.weight"], keep_ties=keep_ties)
    adapted = perturb(fg.rewrite(model, spec))
    state = fg.adapter_state(adapted)
    assert ("embed.weight" in state) is keep_ties
    merged, twin = fg.merge(adapted), copy.deepcopy(model)
    twin.head.weight = nn.Parameter(state["head.weight"].clone())
    if keep_ties:
        assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
        twin.embed.weight = twin.head.weight
    with torch.no_grad():
        twin.norm.weight.copy_(state["norm.weight"])
        twin.fc.weight += state["fc.B"] @ state["fc.A"] * 8
    torch.testing.assert_close(adapted(ids), twin(ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(ids), twin(ids), rtol=1e-4, atol=1e-5)
    assert (merged.embed.weight is merged.head.weight) is keep_ties


def test_what_cannot_be_trained_by_itself_is_refused():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))
            self.rnn = nn.GRU(4, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.rnn(x)[0]) * self.gain

    with pytest.raises(fg.TargetError, match="'gain' belongs to the model itself"):
        fg.rewrite(Rooted(), fg.Spec(fg.LoRA(rank=2), "fc", train="gain"))
    with pytest.raises(fg.TargetError, match="one of a GRU, which keeps all of its weights in a list"):
        fg.rewrite(Rooted(), fg.Spec(fg.LoRA(rank=2), "fc", train="rnn.bias_ih_l0"))
    with pytest.raises(fg.TargetError, match=r"'fc' is both a target and trained in full"):
        fg.rewrite(Rooted(), fg.Spec(fg.LoRA(rank=2), "fc", train="fc.weight"))
    with pytest.raises(fg.TargetError, match=r"train 'fc\.bias_' matches nothing"):
        fg.rewrite(Rooted(), fg.Spec(fg.LoRA(rank=2), "fc", train="fc.bias_"))


def test_a_parent_that_reads_the_parameter_gets_the_trained_one():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.fc.weight, self.fc.bias) + self.other(x)

    model, x = Parent(), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(Net(model), fg.Spec(fg.LoRA(rank=2), "other", train="fc.bias")))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x))


def test_exports_hold_them(tmp_path):
    pytest.importorskip("onnxruntime")
    model, adapted = adapted_mlp()
    adapted.eval()
    x = torch.randn(3, 7)
    batch = {"x": {0: torch.export.Dim.DYNAMIC}}
    fg.export_onnx(adapted, tmp_path / "merged.onnx", (x,), dynamic_shapes=batch)
    (out,) = fg.OrtSession(tmp_path / "merged.onnx").run({"x": x}).values()
    torch.testing.assert_close(torch.as_tensor(out), adapted(x).detach(), rtol=1e-4, atol=1e-5)
    fg.export_onnx(adapted, tmp_path / "swap.onnx", (x,), adapters="swappable", dynamic_shapes=batch)
    fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    session = fg.OrtSession(tmp_path / "swap.onnx")
    session.load("a", tmp_path / "a.onnx_adapter")
    (out,) = session.run({"x": x}, adapter="a").values()
    torch.testing.assert_close(torch.as_tensor(out), adapted(x).detach(), rtol=1e-4, atol=1e-5)
    (out,) = session.run({"x": x}).values()
    torch.testing.assert_close(torch.as_tensor(out), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(fg.AdapterError, match=r"trains single parameters of the base, 'up\.bias'"):
        fg.bank(model, {"a": adapted})


@pytest.mark.parametrize("bias", ["all", "lora_only", "vera_only"])
def test_peft_folders_with_trained_biases_both_ways(bias, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = MLP(), torch.randn(4, 7)
    config = peft.VeraConfig if bias == "vera_only" else peft.LoraConfig
    theirs = peft.get_peft_model(copy.deepcopy(model), config(r=2, target_modules=["up"], bias=bias))
    perturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fg.load_adapter(model, tmp_path / "theirs")
    assert record_of(ours, "default").parameters == (BIASES if bias == "all" else BIASES[:1])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    perturb(ours)
    fg.save_adapter(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours")
    assert again.peft_config["default"].bias == bias
    torch.testing.assert_close(again(x), ours(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fg.load_adapter(model, tmp_path / "ours")(x), ours(x))


def test_parameters_that_peft_does_not_train_by_themselves(tmp_path):
    _, adapted = adapted_mlp(train=["head.bias"])
    with pytest.raises(fg.CheckpointError, match=r"PEFT trains all biases .* the difference is 'up\.bias'"):
        fg.save_adapter(adapted, tmp_path / "peft", format="peft")
