"""GLoRA's supernet: what it draws, what it computes again, compiles once and exports."""

from __future__ import annotations

import copy

import pytest
import torch
from glora_oracle import IN, MAXIMAL, OUT, REPRESENTATIVE, adapt, oracle, plain, site_tensors, wrapped
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg
from fxgraft.passes.methods.glora.glora import GLoRA
from fxgraft.passes.methods.glora.path import CHOICES, PATHS
from fxgraft.passes.methods.glora.supernet import fix_paths, get_paths, set_paths

torch.set_num_threads(1)


def test_supernet_gradients_on_and_off_the_path():
    adapted = adapt(wrapped("linear"), None).eval()
    x = torch.randn(4, IN, dtype=torch.float64)
    for path in REPRESENTATIVE:
        fixed = fix_paths(adapted, {"layer": path})
        set_paths(adapted, {"layer": path})
        grads = {}
        for model in (adapted, fixed):
            model.zero_grad()
            model(x).pow(2).sum().backward()
            grads[model] = {n.rpartition(".")[2]: p.grad for n, p in model.named_parameters() if p.requires_grad}
        for name, value in grads[adapted].items():
            expected = torch.zeros_like(value)
            if name in grads[fixed]:
                expected[tuple(slice(n) for n in grads[fixed][name].shape)] = grads[fixed][name]
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


# -- supernet ------------------------------------------------------------------------------------------------------
def drawn(adapted: nn.Module, count: int) -> list[int]:
    """Which paths training forwards took, recognised by their outputs."""
    x = torch.randn(5, IN, dtype=torch.float64)
    outputs = []
    adapted.eval()
    for path in PATHS:
        set_paths(adapted, {"layer": path})
        outputs.append(adapted(x).detach().flatten())
    table = torch.stack(outputs)
    adapted.train()
    with torch.no_grad():
        return [int((table - adapted(x).flatten()).abs().amax(1).argmin()) for _ in range(count)]


def test_training_draws_uniform_paths():
    adapted = adapt(wrapped("linear"), None)
    torch.manual_seed(3)
    found = drawn(adapted, 4000)
    for tensor, choices in CHOICES.items():
        counts = [sum(getattr(PATHS[i], tensor) == choice for i in found) for choice in choices]
        expected = 4000 / len(choices)
        assert sum((c - expected) ** 2 / expected for c in counts) < 16.3, (tensor, counts)  # p = 0.001 at 3 dof
    chi = sum((found.count(i) - 4000 / 432) ** 2 / (4000 / 432) for i in range(432))
    assert 300 < chi < 580  # 431 degrees of freedom: 431 ± 5 sigma
    assert len(set(found)) > 420


def test_draws_are_reproducible_and_fresh_per_site():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, OUT)}).double()
    model["b"].load_state_dict(model["a"].state_dict())

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model["a"], model["b"]

        def forward(self, x):
            return torch.stack([self.a(x), self.b(x)])

    supernet = adapt(Twins(), None, targets=["a", "b"]).train()
    state = fg.adapter_state(supernet)
    fg.swap(supernet, {key: state["a." + key.split(".")[1]].clone() for key in state})
    x = torch.randn(3, IN, dtype=torch.float64)

    def run():
        torch.manual_seed(7)
        return torch.stack([supernet(x) for _ in range(20)])

    first = run()
    assert torch.equal(first, run())
    assert sum(torch.equal(y[0], y[1]) for y in first) <= 2  # the sites draw on their own
    assert len({y[0].sum().item() for y in first}) > 15  # and anew at every forward


def test_gradient_checkpointing_recomputes_the_same_path():
    supernet = adapt(wrapped("linear"), None).train()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def grads(call):
        wanted = [x, *(p for p in supernet.parameters() if p.requires_grad)]
        result = []
        for seed in range(10):
            torch.manual_seed(seed)
            result += torch.autograd.grad(call(x).pow(2).sum(), wanted)
        return result

    checkpointed = grads(lambda x: torch.utils.checkpoint.checkpoint(supernet, x, use_reentrant=False))
    for one, other in zip(grads(supernet), checkpointed, strict=True):
        assert torch.equal(one, other)


def test_compiled_supernet_is_not_compiled_anew_for_another_path():
    torch._dynamo.reset()
    model = wrapped("linear")
    supernet = adapt(model, None)
    compiled = torch.compile(supernet, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    compiled.train()
    compiled(x).sum().backward()
    frames = counters["stats"]["unique_graphs"]
    outputs = {compiled(x).sum().item() for _ in range(20)}
    assert len(outputs) > 15 and counters["stats"]["unique_graphs"] == frames
    compiled.eval()
    compiled(x)
    frames = counters["stats"]["unique_graphs"]
    for path in PATHS[::40]:
        set_paths(supernet, {"layer": path})
        torch.testing.assert_close(compiled(x), supernet(x))
        weight, bias = oracle(*plain(model.layer), path, site_tensors(supernet))
        torch.testing.assert_close(compiled(x), x @ weight.t() + bias)
    assert counters["stats"]["unique_graphs"] == frames


def test_exports_and_decomposes():
    for path in (MAXIMAL, REPRESENTATIVE[3], REPRESENTATIVE[5], None):
        adapted = adapt(wrapped("linear"), path).eval()
        x = torch.randn(3, IN, dtype=torch.float64)
        program = torch.export.export(adapted, (x,), strict=False)
        ours = [n for n in program.graph.nodes if str(n.target).startswith("fxgraft.")]
        assert len(ours) == 1
        plain_program = program.run_decompositions()
        assert not [n for n in plain_program.graph.nodes if str(n.target).startswith("fxgraft.")]
        torch.testing.assert_close(plain_program.module()(x), adapted(x))


def test_autocast_and_narrow_bases_train():
    for path in (None, *REPRESENTATIVE[:6]):
        adapted = adapt(wrapped("linear", torch.float32), path).train()
        x = torch.randn(4, IN, requires_grad=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(x)
        y.float().sum().backward()
        torch.manual_seed(0)
        torch.testing.assert_close(y.float(), adapted(x), rtol=0.1, atol=0.2)
        assert x.grad is not None and all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        narrow = adapt(wrapped("linear", torch.bfloat16), path).train()
        y = narrow(x.detach().bfloat16())
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert {p.grad.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("rank, expected", [(2, 884_832), (4, 1_603_776), (8, 3_041_664)])
def test_vit_b_supernet_maximum(rank, expected):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(768, 2304), nn.Linear(768, 768)
            self.fc1, self.fc2 = nn.Linear(768, 3072), nn.Linear(3072, 768)

        def forward(self, x):
            return self.fc2(self.fc1(self.proj(self.qkv(x)[..., :768])))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with torch.device("meta"):
        model = Blocks()
    for path in (None, MAXIMAL):
        adapted = fg.rewrite(model, fg.Spec(GLoRA(rank=rank, path=path), targets=["qkv", "proj", "fc1", "fc2"]))
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected


def test_supernets_and_low_rank_conversion_are_refused():
    with pytest.raises(fg.MergeError, match="fix_paths"):
        fg.merge(adapt(wrapped("linear"), None))
    with pytest.raises(fg.MergeError, match="elementwise"):
        GLoRA(path=MAXIMAL).factors({}, {})


def test_copies_keep_their_own_paths():
    supernet = adapt(wrapped("linear"), None)
    twins = [fg.rewrite(supernet, fg.Spec(fg.LoRA(rank=1), targets=["layer"]), name="other"), copy.deepcopy(supernet)]
    set_paths(supernet, {"layer": PATHS[17]})
    assert get_paths(supernet) == {"layer": PATHS[17]}
    assert [get_paths(twin) for twin in twins] == [{"layer": MAXIMAL}] * 2


def test_a_supernet_is_saved_and_opened_on_whatever_path_it_is(tmp_path):
    """The path of the eval mode is chosen and not derived: it is no reason to take the file for another adapter's."""
    base, x = wrapped("linear"), torch.randn(4, IN, dtype=torch.float64)
    adapted = adapt(base, None).eval()
    path = {"layer": PATHS[-2]}
    set_paths(adapted, path)
    fg.save_adapter(adapted, tmp_path)
    opened = fg.load_adapter(base, tmp_path).eval()
    assert get_paths(opened) == {"layer": PATHS[0]}
    set_paths(opened, path)
    assert torch.equal(opened(x), adapted(x)) and not torch.equal(opened(x), base(x))
    fg.swap(adapted, tmp_path)
    assert get_paths(adapted) == path
