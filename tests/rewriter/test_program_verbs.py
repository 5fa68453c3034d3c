"""Every verb on an adapted ExportedProgram, and on graphs that Dynamo captured under names of its own."""

import copy

import pytest
import torch
from methods import BANKED, FIXED, LOW_RANK, MERGEABLE, graft
from small_models import perturb
from torch import fx, nn
from torch.export import Dim, ExportedProgram

import fxgraft as fg


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("shift", torch.ones(8) / 2, persistent=False)

    def forward(self, x):
        return self.norm(x + self.o(torch.tanh(self.k(self.q(x))))) * self.scale + self.shift


class Net(nn.Module):
    """Tied embedding and head, weights of the root's own, a lifted constant and buffers, a layer used out of order."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8, bias=False)
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.w, self.b = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.randn(8))

    def forward(self, ids):
        x = self.embed(ids) + torch.tensor([0.5])
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(nn.functional.linear(x, self.w, self.b)))


#: every method in the long runs, three of different kinds in the others
METHODS = [
    pytest.param(m, id=name, marks=() if name in ("lora", "unilora", "glora") else pytest.mark.slow)
    for name, m in FIXED.items()
]
TARGETS = ["q", "k", "o", "w"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def other():
    """Of other sizes than the example."""
    return torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def program(model, ids):
    return torch.export.export(model, (ids,), dynamic_shapes=({0: Dim("batch"), 1: Dim.AUTO},), strict=False)


def run(program, *args, **kwargs):
    return program.module(check_guards=False)(*args, **kwargs).detach()


def perturbed(program):
    with torch.no_grad():
        for key, tensor in program.state_dict.items():
            if "fxgraft" in key and tensor.requires_grad:
                tensor.add_(0.3 * torch.randn_like(tensor))
    return program


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_verb_on_a_program(model, program, ids, other, method, tmp_path):
    keys, base = list(program.state_dict), run(program, other)
    adapted = perturbed(graft(program, fg.Spec(method, TARGETS)))
    out = run(adapted, other)
    assert isinstance(adapted, ExportedProgram) and not torch.allclose(out, base, atol=1e-4)
    assert list(program.state_dict) == keys and torch.equal(run(program, other), base)
    assert {row.site for row in fg.explain(adapted).rows if row.kind == "site"} >= {"w", "blocks.1.o"}
    assert fg.active(adapted) == ["default"] and fg.parameter_groups(adapted, lr=1e-3)
    folder = fg.save_adapter(adapted, tmp_path / "saved")
    same(fg.load_adapter(model, folder)(other), out)
    again = fg.load_adapter(program, folder)
    assert isinstance(again, ExportedProgram)
    same(run(again, other), out)
    state = {key: tensor.clone() for key, tensor in fg.adapter_state(adapted).items()}
    fg.swap(adapted, {key: t * 2 if t.is_floating_point() else t for key, t in state.items()})
    assert not torch.allclose(run(adapted, other), out, atol=1e-5)
    fg.swap(adapted, again)
    same(run(adapted, other), out)
    same(run(copy.deepcopy(adapted), other), out)
    if method in MERGEABLE.values():
        merged = fg.merge(adapted)
        assert isinstance(merged, ExportedProgram) and sorted(merged.state_dict) == sorted(keys)
        assert not any("fxgraft" in str(node.target) for node in merged.graph.nodes)
        same(run(merged, other), out)
    if method in LOW_RANK.values():
        same(run(fg.to_lora(adapted), other), out)
    two = fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["q"]), name="two")
    perturbed(two)
    fg.set_active(two, ["default"])
    same(run(two, other), out)
    fg.set_active(two, {"two": 0.5})
    assert not torch.allclose(run(two, other), base, atol=1e-5)
    fg.remove(two, "default")
    fg.remove(two, "two")
    same(run(two, other), base)
    assert sorted(two.state_dict) == sorted(keys)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_trained_on_the_model_loads_onto_its_program(model, program, other, method, tmp_path):
    trained = perturb(graft(model, fg.Spec(method, TARGETS)))
    adapted = fg.load_adapter(program, fg.save_adapter(trained, tmp_path))
    same(run(adapted, other), trained(other))
    assert list(fg.adapter_state(adapted)) == list(fg.adapter_state(trained))


@pytest.mark.parametrize("method", METHODS)
def test_a_program_is_trained(model, program, other, method):
    adapted = graft(program, fg.Spec(method, TARGETS))
    expected = graft(model, fg.Spec(method, TARGETS))
    perturbed(adapted)
    fg.swap(expected, adapted)
    module = adapted.module(check_guards=False)
    for one in (module, expected):
        one(other).square().mean().backward()
    gradients = {n: p.grad for n, p in expected.named_parameters() if p.requires_grad}
    assert gradients
    for name, gradient in gradients.items():
        same(module.get_parameter(name).grad, gradient)


def test_an_adapter_with_dropout_is_opened_on_a_program_as_it_is_served(model, program, ids, tmp_path):
    spec = fg.Spec(fg.LoRA(rank=2, dropout=0.5), TARGETS)
    adapted = perturb(fg.rewrite(model, spec))
    fg.save_adapter(adapted, tmp_path)
    opened = fg.load_adapter(program, tmp_path)
    torch.testing.assert_close(opened.module()(ids), adapted.eval()(ids))
    trained = fg.load_adapter(fg.rewrite(program, spec, name="first"), tmp_path, name="default").module()
    assert not torch.equal(trained(ids), trained(ids))  # of one that is trained the mode stays


def test_a_linear_without_bias_takes_a_method_that_adds_one(model, program, other):
    method = FIXED["glora"]
    adapted = perturbed(graft(program, fg.Spec(method, ["last"])))
    same(run(fg.merge(adapted), other), run(adapted, other))


@pytest.mark.parametrize("method", [m for m in BANKED.values() if m.key in ("lora", "unilora")], ids=lambda m: m.key)
def test_a_bank_of_a_program(program, other, method):
    adapted = graft(program, fg.Spec(method, ["q", "k"]))
    second = graft(program, fg.Spec(method, ["q", "k"]))
    perturbed(adapted), perturbed(second)
    banked = fg.bank(adapted, {"a": adapted, "b": second})
    assert isinstance(banked, ExportedProgram) and set(fg.tenants(banked)) == {"a", "b"}
    out = run(banked, other, adapter_ids=fg.adapter_ids(banked, ["b", None, "a", "b"]))
    for row, source in enumerate((second, program, adapted, second)):
        same(out[row], run(source, other)[row])
    fg.remove_tenant(banked, "a")
    fg.add_tenant(banked, "c", adapted)
    out = run(banked, other, adapter_ids=fg.adapter_ids(banked, ["c"] * 4))
    same(out, run(adapted, other))


@pytest.mark.slow
def test_a_program_is_compiled_packaged_and_exported(program, ids, other, tmp_path):
    adapted = perturbed(fg.rewrite(program, fg.Spec(fg.LoRA(2), TARGETS)))
    out = run(adapted, other)
    same(fg.compile(adapted)(other), out)
    fg.package(adapted, tmp_path / "model.pt2", (ids,))
    same(fg.load_package(tmp_path / "model.pt2")(other), out)
    for mode in ("merged", "swappable", "bank"):
        fg.export_onnx(adapted, tmp_path / f"{mode}.onnx", (ids,), adapters=mode)
    session = fg.OrtSession(tmp_path / "swappable.onnx")
    session.load("a", fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
    same(torch.from_numpy(next(iter(session.run({"ids": other.numpy()}, adapter="a").values()))), out)


def test_a_program_read_from_a_file(program, other, tmp_path):
    torch.export.save(program, tmp_path / "model.pt2")
    read = torch.export.load(tmp_path / "model.pt2")
    adapted = perturbed(fg.rewrite(read, fg.Spec(fg.LoRA(2), TARGETS)))
    same(run(fg.merge(adapted), other), run(adapted, other))
    torch.export.save(adapted, tmp_path / "adapted.pt2")
    lost = torch.export.load(tmp_path / "adapted.pt2")
    same(run(lost, other), run(adapted, other))
    for verb in (fg.merge, fg.explain, lambda p: fg.rewrite(p, fg.Spec(fg.LoRA(2), ["q"]))):
        with pytest.raises(fg.AdapterError, match=r"no record of them any more.*fg\.load_adapter\(program, folder\)"):
            verb(lost)


def test_what_a_program_cannot_do(program):
    with pytest.raises(fg.AdapterError, match=r"no adapter: rewrite"):
        fg.merge(program)
    adapted = fg.rewrite(program, fg.Spec(fg.LoRA(2), ["q"]))
    fixed = pytest.raises(fg.AdapterError, match=r"graph of a program is fixed.*set_active\(program, \[\]\)")
    with fixed, fg.disabled(adapted):
        run(adapted, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(fg.AdapterError, match=r"already has an adapter 'default'"):
        fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["q"]))


def test_peft_folders_of_a_program(model, program, other, tmp_path):
    adapted = perturbed(fg.rewrite(program, fg.Spec(fg.LoRA(2), ["q", "k"])))
    folder = fg.save_adapter(adapted, tmp_path, format="peft")
    same(fg.load_adapter(model, folder)(other), run(adapted, other))
    same(run(fg.load_adapter(program, folder), other), run(adapted, other))


def _dynamo(model, ids):
    return torch._dynamo.export(model)(ids)[0]


def _aten(model, ids):
    return torch._dynamo.export(model, aten_graph=True)(ids)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("captured", [_dynamo, _aten])
def test_graphs_of_dynamo_have_the_names_of_the_model(model, ids, captured, method, tmp_path):
    gm = captured(model, ids)
    keys = list(gm.state_dict())
    targets = ["q", "k", "o", "w"] if captured is _dynamo else ["q", "k", "o"]
    trained = perturb(graft(model, fg.Spec(method, targets)))
    adapted = graft(gm, fg.Spec(method, targets))
    fg.swap(adapted, trained)
    out = trained(ids).detach()
    same(adapted(ids), out)
    same(fg.load_adapter(gm, fg.save_adapter(trained, tmp_path))(ids), out)
    same(fg.load_adapter(model, fg.save_adapter(adapted, tmp_path))(ids), out)
    assert list(gm.state_dict()) == keys and torch.equal(gm(ids), captured(model, ids)(ids))
    if captured is _dynamo:
        assert {n for n, _ in model.named_parameters()} <= {n for n, _ in adapted.named_parameters()}
    if method in MERGEABLE.values():
        same(fg.merge(adapted)(ids), out)
    with fg.disabled(adapted):
        same(adapted(ids), model(ids))


def test_a_merged_graph_is_plain_again(model, ids):
    gm = torch.export.export(model, (ids,), strict=False).module(check_guards=False)
    adapted = perturb(fg.rewrite(gm, fg.Spec(fg.LoRA(2), TARGETS)))
    merged = fg.merge(adapted)
    same(merged(ids), adapted(ids))
    assert list(merged.state_dict()) == list(gm.state_dict()) and isinstance(merged, fx.GraphModule)
    assert not [m for m in merged.modules() if type(m).__module__.startswith("fxgraft")]
    assert not type(merged).__mro__[1].__module__.startswith("fxgraft")
