"""Models whose weights accelerate keeps in CPU memory or on disk, lazy modules, and children compiled by torch.jit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from methods import FIXED, MERGEABLE, METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.modules.offloaded import loaded

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


@pytest.fixture
def ids():
    return torch.randint(0, 20, (3, 5))


@pytest.fixture
def net():
    return Net().eval()


def _cpu(model, folder):
    return accelerate.cpu_offload(model, CPU)


def _disk(model, folder):
    return accelerate.disk_offload(model, str(folder), CPU)


def _map(model, folder):
    places = {"embed": "cpu", "up": "disk", "down": "disk", "norm": "disk", "head": "cpu"}
    places |= {"fxgraft_shared": "cpu"} if hasattr(model, "fxgraft_shared") else {}
    return accelerate.dispatch_model(model, places, CPU, offload_dir=str(folder), force_hooks=True)


def _hook(model, folder):
    return accelerate.cpu_offload_with_hook(model, CPU)[0]


OFFLOADS = {"cpu": _cpu, "disk": _disk, "map": _map, "hook": _hook}
TARGETS = ["up", "down"]


def _same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offload", [_cpu, _map], ids=["cpu", "map"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_verb_on_an_offloaded_model(net, ids, offload, method, tmp_path):
    base = net(ids).detach()
    want = perturb(graft(net, fg.Spec(method, TARGETS))).eval()
    given = offload(copy.deepcopy(net), tmp_path / "weights")
    before = {n: id(p) for n, p in given.named_parameters()}
    adapted = perturb(graft(given, fg.Spec(method, TARGETS))).eval()
    fg.swap(adapted, fg.adapter_state(want))
    assert not any(p.is_meta for p in fg.adapter_state(adapted).values())
    out = want(ids).detach()
    assert not torch.allclose(out, base, atol=1e-4)
    _same(adapted(ids), out)
    assert torch.equal(given(ids), base) and list(before) == [n for n, _ in given.named_parameters()]
    with fg.disabled(adapted):
        assert torch.equal(adapted(ids), base)
    for twin in (copy.deepcopy(adapted), fg.load_adapter(given, fg.save_adapter(adapted, tmp_path / "saved"))):
        _same(twin.eval()(ids), out)
    _same(fg.load_adapter(net, tmp_path / "saved").eval()(ids), out)
    if method in MERGEABLE.values():
        merged = fg.merge(adapted)
        _same(merged(ids), out)
        _same(adapted(ids), out)
        assert torch.equal(given(ids), base)
    two = fg.rewrite(adapted, fg.Spec(fg.LoRA(2), "all-linear"), name="two")
    fg.set_active(two, ["default"])
    _same(two(ids), out)
    fg.remove(two, "default")
    fg.set_active(two, [])
    assert torch.equal(two(ids), base) and fg.explain(adapted).rows


@pytest.mark.parametrize("method", FIXED.values(), ids=FIXED)
def test_gradients_under_offload(net, ids, method, tmp_path):
    want = perturb(graft(net, fg.Spec(method, TARGETS)))
    adapted = graft(_cpu(copy.deepcopy(net), tmp_path), fg.Spec(method, TARGETS))
    fg.swap(adapted, fg.adapter_state(want))
    for model in (want, adapted):
        model(ids).square().mean().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    for name, gradient in trained.items():
        _same(gradient, want.get_parameter(name).grad)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_what_is_merged_and_exported_with_a_trained_module(net, ids, offload, tmp_path):
    spec = fg.Spec(fg.LoRA(2), TARGETS, train=["norm"])
    want = perturb(fg.rewrite(net, spec))
    adapted = fg.rewrite(offload(copy.deepcopy(net), tmp_path / "weights"), spec)
    fg.swap(adapted, fg.adapter_state(want))
    out = want(ids).detach()
    _same(adapted(ids), out)
    _same(fg.merge(adapted)(ids), out)
    _same(fg.to_lora(adapted)(ids), out)
    fg.export_onnx(adapted, tmp_path / "merged.onnx", (ids,))
    fg.export_onnx(adapted, tmp_path / "swappable.onnx", (ids,), adapters="swappable")
    _same(fg.capture(adapted, (ids,)).graph_module(ids), out)
    assert all(p.is_meta for p in adapted.up.parameters(recurse=False)) or offload is _hook


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_a_bank_over_an_offloaded_model(net, ids, offload, tmp_path):
    base = net(ids).detach()
    adapted = perturb(fg.rewrite(offload(net, tmp_path / "weights"), fg.Spec(fg.LoRA(2), TARGETS)))
    banked = fg.bank(adapted)
    rows = banked(ids, adapter_ids=fg.adapter_ids(banked, ["default", None, "default"]))
    _same(rows[[0, 2]], adapted(ids)[[0, 2]])
    _same(rows[1], base[1])


def test_compiled_and_packaged_under_offload(net, ids, tmp_path):
    adapted = perturb(fg.rewrite(_cpu(net, tmp_path), fg.Spec(fg.LoRA(2), TARGETS)))
    out = adapted(ids).detach()
    _same(fg.compile(adapted)(ids), out)
    fg.package(adapted, tmp_path / "model.pt2", (ids,))
    _same(fg.load_package(tmp_path / "model.pt2")(ids), out)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("method", [METHODS[n] for n in ("lora", "unilora", "glora")], ids=lambda m: m.key)
def test_a_model_dispatched_after_rewrite(net, ids, offload, method, tmp_path):
    """An adapter's tensors are read without a call: they stay where the layer computes, and can be trained."""
    adapted = perturb(graft(net, fg.Spec(method, TARGETS))).eval()
    out = adapted(ids).detach()
    offload(adapted, tmp_path)
    _same(adapted(ids), out)
    assert all(p.requires_grad and not p.is_meta for n, p in adapted.named_parameters() if "fxgraft" in n)
    accelerate.hooks.remove_hook_from_module(adapted, recurse=True)
    _same(adapted(ids), out)


def test_hooks_can_be_removed_from_a_rewritten_model(net, ids, tmp_path):
    base = net(ids).detach()
    given = _cpu(net, tmp_path)
    adapted = perturb(fg.rewrite(given, fg.Spec(fg.LoRA(2), TARGETS)))
    out = adapted(ids).detach()
    accelerate.hooks.remove_hook_from_module(adapted, recurse=True)
    _same(adapted(ids), out)
    assert all(p.is_meta for p in given.up.parameters()) and torch.equal(given(ids), base)


def test_a_block_that_is_loaded_as_a_whole_is_refused(net, tmp_path):
    given = accelerate.cpu_offload(nn.ModuleDict({"net": net}), CPU, preload_module_classes=["Net"])
    with pytest.raises(fg.AdapterError, match=r"'net.up' is offloaded by accelerate together with the whole of 'net'"):
        fg.rewrite(given, fg.Spec(fg.LoRA(2), TARGETS))


def test_a_forward_replaced_by_anything_else_is_refused(net):
    before = net.up.forward
    net.up.forward = lambda x: before(x)
    with pytest.raises(fg.TargetError, match=r"'up' cannot be adapted.*replaced on the instance"):
        fg.rewrite(net, fg.Spec(fg.LoRA(2), TARGETS))


LAZY = {
    "linear": lambda: nn.LazyLinear(5),
    "norm": lambda: nn.LazyBatchNorm1d(),
    "convolution": lambda: nn.LazyConv1d(3, 1),
}


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
def test_lazy_modules_run_first(lazy):
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (6, 1)), lazy(), nn.Flatten())
    if lazy is LAZY["linear"]:
        model = nn.Sequential(nn.Linear(4, 6), lazy())
    x = torch.randn(3, 4)
    with pytest.raises(fg.AdapterError, match=r"lazy modules whose weights have no shape yet.*run the model once"):
        fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0"]))
    model(x)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0", "1"] if lazy is LAZY["linear"] else ["0"])))
    model.eval(), adapted.eval()
    _same(fg.merge(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x), atol=1e-4)


class Parent(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.first, self.child, self.last = nn.Linear(4, 6), child, nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.child(self.first(x)))


SCRIPTED = {
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU())),
    "trace": lambda: torch.jit.trace(nn.Linear(6, 6), torch.randn(2, 6)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("child", SCRIPTED)
@pytest.mark.parametrize("method", FIXED.values(), ids=FIXED)
def test_around_children_compiled_by_torch_jit(child, method):
    model, x = Parent(SCRIPTED[child]()).eval(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=r"left out 1 layer.*torch\.jit compiled its module"):
        adapted = perturb(graft(model, fg.Spec(method, "all-linear"))).eval()
    out = adapted(x).detach()
    assert {r.site for r in fg.explain(adapted).rows if r.kind == "site"} == {"first", "last"}
    assert not torch.allclose(out, model(x), atol=1e-4)
    ours, theirs = dict(adapted.named_parameters()), dict(model.named_parameters())
    assert all(ours[name].data_ptr() == p.data_ptr() for name, p in theirs.items())
    if method in MERGEABLE.values():
        _same(fg.merge(adapted)(x), out)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_jit_compiled_is_refused_by_name():
    with pytest.raises(fg.TargetError, match=r"'child.0' cannot be adapted: torch.jit compiled its module.*before it"):
        fg.rewrite(Parent(SCRIPTED["script"]()), fg.Spec(fg.LoRA(2), ["child.0"]))
    with pytest.raises(fg.TargetError, match=r"found no linear layer.*the root \(torch.jit compiled"):
        fg.rewrite(torch.jit.script(nn.Linear(4, 4)), fg.Spec(fg.LoRA(2)))


def test_weights_read_one_after_the_other_are_not_taken_for_tied():
    class Read(dict):
        def __getitem__(self, name):
            return torch.zeros(64, 64)  # of a file: nobody else holds it

    model = nn.Sequential(*(nn.Linear(64, 64, bias=False, device="meta") for _ in range(8)))
    for layer in model:
        layer.__dict__["_hf_hook"] = SimpleNamespace(offload=True, weights_map=Read(), execution_device="meta")
    assert len({id(layer.weight) for layer in loaded(model)}) == 8
