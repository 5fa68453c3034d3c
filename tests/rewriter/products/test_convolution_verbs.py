"""A model of convolutions through every verb: weights, copies, folders, compiling, banks, ONNX."""

import copy
import pickle

import pytest
import torch
from methods import LOW_RANK, METHODS, graft
from torch import nn

import fxgraft as fg
from fxgraft.exporters.ort.session import OrtSession, export_ort_adapter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.point(self.depth(torch.relu(self.stem(x))))
        return self.out(self.up(x).mean((-1, -2)))


TARGETS = ["stem", "depth", "point", "up", "out"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(5))


def adapter(model, method, seed=1, name="default"):
    adapted = graft(model, fg.Spec(method, TARGETS), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapted.named_parameters():
        if f"fxgraft.{name}" in key or f"fxgraft_shared.{name}" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.eval()


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_copies_folders_and_weights(model, x, tmp_path, name):
    adapted = adapter(model, METHODS[name])
    y, before = adapted(x), model(x)
    assert not torch.allclose(y, before, atol=1e-5)
    assert torch.equal(copy.deepcopy(adapted)(x), y) and torch.equal(pickle.loads(pickle.dumps(adapted))(x), y)
    fg.save_adapter(adapted, tmp_path)
    assert torch.equal(fg.load_adapter(model, tmp_path).eval()(x), y)
    if name in LOW_RANK:
        close(fg.to_lora(adapted).eval()(x), y)
    both = adapter(adapted, METHODS[name], 2, "two")
    fg.set_active(both, {"default": 0.5, "two": 1.0})
    assert not torch.allclose(both(x), y, atol=1e-6)
    if name in LOW_RANK:
        close(fg.merge(both)(x), both(x))
    fg.set_active(both, ["default"])
    assert torch.equal(both(x), y)
    fg.remove(both, "two")
    fg.remove(both, "default")
    assert torch.equal(both(x), before)


@pytest.mark.parametrize("name", ["lora", "glora"])
def test_compiling_is_one_graph(model, x, name):
    torch._dynamo.reset()
    adapted = adapter(model, METHODS[name])
    y = adapted(x)
    compiled = fg.compile(adapted, fullgraph=True)
    close(compiled(x), y)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["lora", "hydralora"])
def test_a_bank_gives_every_sample_its_own(model, x, tmp_path, name):
    outputs = {}
    for index, tenant in enumerate("ab"):
        adapted = adapter(model, METHODS[name], index)
        outputs[tenant] = adapted(x)
        fg.save_adapter(adapted, tmp_path / tenant)
    bank = fg.bank(model, {tenant: tmp_path / tenant for tenant in "ab"}, example_inputs=(x,)).eval()
    y = bank(x, adapter_ids=torch.tensor([2, 1]))
    close(y, torch.stack([outputs["b"][0], outputs["a"][1]]))
    close(bank(x, adapter_ids=torch.tensor([0, 1]))[0], model(x)[0])


def test_an_onnx_graph_takes_an_adapter_of_another_rank(model, x, tmp_path):
    pytest.importorskip("onnxruntime")
    first, other = adapter(model, fg.LoRA(rank=2)), adapter(model, fg.LoRA(rank=4), 3)
    path = tmp_path / "model.onnx"
    fg.export_onnx(first, path, (x,), adapters="swappable")
    export_ort_adapter(other, tmp_path / "other.onnx_adapter")
    session = OrtSession(path, threads=1)
    session.load("other", tmp_path / "other.onnx_adapter")
    (y,) = session.run({"x": x.numpy()}, adapter="other").values()
    close(torch.from_numpy(y), other(x))
