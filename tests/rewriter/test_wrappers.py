"""Wrappers around a model or its parts, put on before grafting or after: names never show them."""

import copy
import pickle

import pytest
import torch
from small_models import perturb
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fxgraft as fg
from fxgraft.rewriter.base_names import base_modules, lookup
from fxgraft.rewriter.modules.wrappers import unwrap


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "compile of checkpoint": lambda m: compiled(checkpoint_wrapper(m)),
    "checkpoint of compile": lambda m: checkpoint_wrapper(compiled(m)),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.q(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SPEC = fg.Spec(fg.LoRA(rank=2), targets=["q"], train=["head"])


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(4, 8)


def wrapped(model, wrap):
    for index in range(2):
        model.layers[index] = wrap(model.layers[index])
    model.head = wrap(model.head)
    return model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_verb_on_wrapped_children(net, x, wrap, when, tmp_path):
    plain = perturb(fg.rewrite(net, SPEC))
    want, base, state = plain(x).detach(), net(x).detach(), fg.adapter_state(plain)
    if when == "before":
        adapted = fg.rewrite(wrapped(copy.deepcopy(net), wrap), SPEC)
        fg.swap(adapted, state)
    else:
        adapted = wrapped(copy.deepcopy(plain), wrap)
    torch.testing.assert_close(adapted(x), want)
    assert list(fg.adapter_state(adapted)) == list(state)
    for form in ("fxgraft", "peft"):
        loaded = fg.load_adapter(net, fg.save_adapter(adapted, tmp_path / form, format=form))
        torch.testing.assert_close(loaded(x), want)
        back = fg.load_adapter(wrapped(copy.deepcopy(net), wrap), tmp_path / form)
        torch.testing.assert_close(back(x), want)
    merged = fg.merge(adapted)
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in net.named_modules()]
    torch.testing.assert_close(merged(x), want)
    assert [row.site for row in fg.explain(adapted).rows] == [row.site for row in fg.explain(plain).rows]
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), base)
    fg.set_active(adapted, [])
    torch.testing.assert_close(adapted(x), base)
    fg.set_active(adapted, ["default"])
    torch.testing.assert_close(copy.deepcopy(adapted)(x), want)
    other = perturb(fg.rewrite(adapted, fg.Spec(fg.LoRA(rank=3), targets=["q"]), name="other"))
    assert not torch.allclose(other(x), want, atol=1e-3)
    fg.remove(adapted, "default")
    torch.testing.assert_close(adapted(x), base)
    assert all(p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_bank_and_its_graphs_of_wrapped_children(net, x, wrap):
    adapted = wrapped(perturb(fg.rewrite(net, fg.Spec(fg.LoRA(rank=2), targets=["q"]))), wrap)
    want, base = adapted(x).detach(), net(x).detach()
    bank = fg.bank(adapted, {"a": adapted})
    out = bank(x, adapter_ids=fg.adapter_ids(bank, ["a", None, "a", None]))
    torch.testing.assert_close(out[::2], want[::2])
    torch.testing.assert_close(out[1::2], base[1::2])


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_onnx_of_wrapped_children(net, x, mode, tmp_path):
    adapted = wrapped(perturb(fg.rewrite(net.eval(), fg.Spec(fg.LoRA(rank=2), targets=["q"]))), WRAPPERS["checkpoint"])
    types = [type(m) for m in adapted.modules()]
    fg.export_onnx(adapted, tmp_path / "model.onnx", (x,), adapters=mode)  # compares with torch itself
    assert [type(m) for m in adapted.modules()] == types


def test_training_through_wrappers_reaches_every_factor(net, x):
    adapted = wrapped(fg.rewrite(net, SPEC), WRAPPERS["checkpoint"]).train()
    adapted(x).sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 6 and all(p.grad is not None for p in trained)


def test_data_parallel_and_averaged_roots(net, x, tmp_path):
    adapted = perturb(fg.rewrite(net, SPEC))
    for root in (nn.DataParallel(adapted), torch.optim.swa_utils.AveragedModel(adapted), compiled(adapted)):
        assert fg.adapter_state(root).keys() == fg.adapter_state(adapted).keys()
        torch.testing.assert_close(fg.merge(root)(x), adapted(x))
        fg.save_adapter(root, tmp_path / "a")
        torch.testing.assert_close(fg.load_adapter(net, tmp_path / "a")(x), adapted(x))


def test_a_child_of_ones_own_called_module_keeps_its_name(x):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self._orig_mod = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self._orig_mod(self.module(x))

    model = nn.Sequential(Own())
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["module", "_orig_mod"])))
    assert {key.rpartition(".")[0] for key in fg.adapter_state(adapted)} == {"0.module", "0._orig_mod"}
    assert unwrap(model[0]) is model[0]
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))


def test_names_of_wrapped_modules(net):
    names = [name for name, _ in base_modules(net)]
    wrapped(net, WRAPPERS["compile of checkpoint"])
    assert [name for name, _ in base_modules(net)] == names
    assert lookup(net, "layers.1.q") is unwrap(net.layers[1]).q
    with pytest.raises(fg.AdapterError, match=r"layers\.2"):
        lookup(net, "layers.2")


def test_modules_compiled_in_place_copy_and_pickle(net, x):
    adapted = perturb(fg.rewrite(net, SPEC))
    adapted.layers[0].compile(backend="eager")
    adapted.layers[0].q.compile(backend="eager")
    want = adapted(x).detach()
    twins = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted)), fg.rewrite(adapted, SPEC, name="second")]
    fg.set_active(twins[2], ["default"])
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(1.0)  # the copies must not call the modules they were copied from
    for twin in twins[:2]:
        torch.testing.assert_close(twin(x), want)
    assert "_compiled_call_impl" not in twins[2].layers[0].q.__dict__


def test_a_replaced_layer_is_named_by_every_verb(net, x):
    adapted = fg.rewrite(net, SPEC)
    adapted.layers[1] = Block()
    verbs = [fg.adapter_state, fg.merge, fg.explain, lambda m: fg.set_active(m, []), lambda m: fg.save_adapter(m, "no")]
    for verb in verbs:
        with pytest.raises(fg.AdapterError, match=r"'layers.1.q'.*replaced"):
            verb(adapted)
    fg.remove(adapted, "default")
    assert not any("fxgraft" in name for name in adapted.state_dict())
    torch.testing.assert_close(adapted.layers[0](x), net.layers[0](x))


def test_a_forward_replaced_after_grafting_refuses_switches(net):
    adapted = fg.rewrite(net, SPEC)
    q = adapted.layers[0].q
    before = q.forward
    q.forward = lambda x: before(x)
    with pytest.raises(fg.AdapterError, match=r"layers.0.q.*replaced on the instance"):
        fg.set_active(adapted, [])
    assert fg.active(adapted) == ["default"]


def test_accelerate_hooks_follow_a_switch(net, x):
    hooks = pytest.importorskip("accelerate.hooks")
    adapted = perturb(fg.rewrite(net, SPEC))
    want, base = adapted(x).detach(), net(x).detach()
    for module in (adapted.layers[0].q, adapted.layers[1], adapted.head):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    torch.testing.assert_close(adapted(x), want)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), base)
    torch.testing.assert_close(adapted(x), want)
    torch.testing.assert_close(copy.deepcopy(adapted)(x), want)
    torch.testing.assert_close(fg.merge(adapted)(x), want)
    hooks.remove_hook_from_module(adapted, recurse=True)
    torch.testing.assert_close(adapted(x), want)
