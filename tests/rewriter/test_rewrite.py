"""What rewrite promises: the input unchanged, memory shared, keys kept, all or nothing."""

import copy

import pytest
import torch
from methods import MERGEABLE, METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.switch import base_of


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def storages(model):
    return {n: t.untyped_storage().data_ptr() for n, t in model.state_dict().items() if "fxgraft" not in n}


def test_base_is_shared_and_unchanged(bert, method):
    before = copy.deepcopy(bert.state_dict())
    flags = {n: p.requires_grad for n, p in bert.named_parameters()}
    modules = [type(m) for m in bert.modules()]
    adapted = perturb(graft(bert, fg.Spec(method, ["query", "dense"], train=["classifier"])))
    assert type(adapted) is type(bert)
    assert storages(adapted) == storages(bert)
    assert list(bert.state_dict()) == list(before) and [type(m) for m in bert.modules()] == modules
    assert all(torch.equal(t, before[n]) for n, t in bert.state_dict().items())
    assert {n: p.requires_grad for n, p in bert.named_parameters()} == flags
    assert set(before) <= set(adapted.state_dict())


def test_only_adapters_and_trained_modules_require_grad(bert, method):
    adapted = graft(bert, fg.Spec(method, ["query"], train=["classifier"]))
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable and all("fxgraft" in n for n in trainable)
    assert {"classifier.fxgraft.default.weight", "classifier.fxgraft.default.bias"} <= set(trainable)


def test_training_the_result_leaves_the_input_alone(bert, ids, method):
    before = bert(ids).logits.detach()
    adapted = graft(bert, fg.Spec(method, ["query"], train=["classifier"])).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(ids, labels=torch.tensor([0, 1, 0])).loss.backward()
        optimizer.step()
    assert not torch.equal(adapted.eval()(ids).logits, before)
    assert torch.equal(bert(ids).logits, before)


def test_running_statistics_are_not_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), "0")).train()
    adapted(torch.randn(8, 4))
    assert adapted[1].num_batches_tracked == 1 and model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_failure_changes_nothing(bert):
    before = dict(bert.__dict__), [type(m) for m in bert.modules()]
    with pytest.raises(fg.SpecError, match="estimate_update"):
        fg.rewrite(bert, fg.Spec(fg.LoRASB(rank=3), ["query", "dense"]))
    assert (dict(bert.__dict__), [type(m) for m in bert.modules()]) == before
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"]))
    keys = list(adapted.state_dict())
    with pytest.raises(fg.TargetError):
        fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["query", "nothing"]), name="b")
    assert list(adapted.state_dict()) == keys and fg.active(adapted) == ["default"]


def test_equal_sites_share_one_class_and_one_graph(bert):
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(3), ["query", "value", "intermediate.dense"]))
    layers = adapted.bert.encoder.layer
    assert type(layers[0].attention.self.query) is type(layers[1].attention.self.value)
    assert type(layers[0].attention.self.query) is not type(layers[0].intermediate.dense)
    again = fg.rewrite(bert, fg.Spec(fg.LoRA(3), ["query"]))
    assert type(again.bert.encoder.layer[0].attention.self.query) is type(layers[0].attention.self.query)


def test_the_graph_says_who_made_its_nodes(bert):
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(3), ["query"]))
    graph = type(adapted.bert.encoder.layer[0].attention.self.query).fxgraft_graph
    made = [n for n in graph.nodes if "fxgraft" in n.meta]
    assert any(n.target is torch.ops.fxgraft.lora.default for n in made)
    assert {n.meta["fxgraft"].made_by for n in made} == {"graft"}


def test_several_adapters(bert, ids, method):
    base = bert(ids).logits
    a = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    only_a = a(ids).logits
    b = fg.rewrite(a, fg.Spec(fg.LoRA(2), ["query", "value"]), name="b")
    assert fg.active(b) == ["b"] and fg.active(a) == ["default"]
    perturb(b)
    only_b = b(ids).logits
    fg.set_active(b, ["default"])
    assert torch.equal(b(ids).logits, only_a)
    assert {n.split("fxgraft")[1].split(".")[1] for n, p in b.named_parameters() if p.requires_grad} == {"default"}
    fg.set_active(b, ["default", "b"])
    both = b(ids).logits
    assert not torch.equal(both, only_a) and not torch.equal(both, only_b)
    fg.set_active(b, [])
    assert torch.equal(b(ids).logits, base)
    fg.set_active(b, ["b"])
    assert torch.equal(b(ids).logits, only_b)
    assert torch.equal(a(ids).logits, only_a)


def test_a_second_rewrite_does_not_tie_the_first_model(bert, ids):
    a = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"])))
    before = a(ids).logits
    b = fg.rewrite(a, fg.Spec(fg.LoRA(2), ["query"]), name="b")
    fg.set_active(b, ["default"])
    perturb(b)
    assert torch.equal(a(ids).logits, before)


def test_disabled_is_bitwise_the_base(bert, ids, method):
    base = bert(ids).logits
    adapted = perturb(graft(bert, fg.Spec(method, ["query", "dense"], train=["classifier"])))
    with fg.disabled(adapted):
        assert torch.equal(adapted(ids).logits, base)
        assert not adapted(ids).logits.requires_grad
    assert not torch.equal(adapted(ids).logits, base)
    with pytest.raises(RuntimeError, match="inside"), fg.disabled(adapted):
        raise RuntimeError("inside")
    assert fg.active(adapted) == ["default"]


def test_remove_leaves_the_plain_base(bert, ids, method):
    bert.bert.embeddings.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in bert.named_parameters()}
    adapted = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    adapted = fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["value"]), name="b")
    fg.remove(adapted, "default")
    assert fg.active(adapted) == ["b"] and not any("default" in n for n in adapted.state_dict())
    fg.remove(adapted, "b")
    assert list(adapted.state_dict()) == list(bert.state_dict())
    assert [type(m) for m in adapted.modules()] == [type(m) for m in bert.modules()]
    assert {n: p.requires_grad for n, p in adapted.named_parameters()} == flags
    assert torch.equal(adapted(ids).logits, bert(ids).logits)
    with pytest.raises(fg.AdapterError, match="has no adapter"):
        fg.active(adapted)


def test_swap_writes_all_or_nothing(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    other = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    before = adapted(ids).logits
    state = fg.adapter_state(other)
    for broken, says in [
        (dict(list(state.items())[1:]), "lacks 1 tensor"),
        ({**state, "extra": torch.ones(1)}, "'extra'"),
        ({**state, "classifier.weight": torch.ones(1)}, r"\(1,\)"),
        ({**state, "classifier.weight": state["classifier.weight"].half()}, "torch.float16"),
    ]:
        with pytest.raises(fg.AdapterError, match=says):
            fg.swap(adapted, broken)
        assert torch.equal(adapted(ids).logits, before)
    fg.swap(adapted, state)
    assert torch.equal(adapted(ids).logits, other(ids).logits)


def test_base_of_is_plain(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"])))
    plain = base_of(adapted)
    assert list(plain.state_dict()) == list(bert.state_dict()) and torch.equal(plain(ids).logits, bert(ids).logits)
    assert storages(plain) == storages(bert) and fg.active(adapted) == ["default"]


def test_sequential_roots_and_heads(method):
    """`nn.Sequential` calls every child it has, the adapters' containers too."""
    head = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 12), head).eval()
    x = torch.randn(5, 20)
    adapted = perturb(graft(model, fg.Spec(method, ["0", "2"], exclude="3.*", train=["3"])))
    out = adapted(x)
    assert not torch.allclose(out, model(x))
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(adapted)(x), out, rtol=1e-5, atol=1e-6)
    with fg.disabled(adapted):
        assert torch.equal(adapted(x), model(x))
    torch.testing.assert_close(copy.deepcopy(adapted)(x), out)


def test_fused_layers_of_torch_nn_do_not_skip_adapters():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        base = model(x), model(x, src_key_padding_mask=padding)
        adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(2), ["linear1", "linear2"])))
        assert not torch.allclose(adapted(x), base[0]) and not torch.allclose(
            adapted(x, src_key_padding_mask=padding)[0, :3], base[1][0, :3]
        )
        merged = fg.merge(adapted)
        torch.testing.assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)
        with fg.disabled(adapted):
            assert torch.equal(adapted(x), base[0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: fg.rewrite(m, fg.LoRA(2)), "fg.Spec"),
        (lambda m: fg.rewrite("model", fg.Spec(fg.LoRA(2))), "nn.Module"),
        (lambda m: fg.rewrite(m, fg.Spec(fg.LoRA(2)), name="a.b"), "letters, digits"),
        (lambda m: fg.rewrite(m, fg.Spec(fg.LoRA(2)), name="train"), "taken by torch.nn.Module"),
        (lambda m: fg.rewrite(m, fg.Spec(fg.LoRA(2)), dtype=torch.int8), "floating"),
        (
            lambda m: fg.rewrite(fg.rewrite(m, fg.Spec(fg.LoRA(2))), fg.Spec(fg.LoRA(2))),
            "already has an adapter 'default'",
        ),
        (lambda m: fg.set_active(m, ["default"]), "has no adapter"),
        (lambda m: fg.set_active(fg.rewrite(m, fg.Spec(fg.LoRA(2))), "default"), "list of names"),
        (lambda m: fg.set_active(fg.rewrite(m, fg.Spec(fg.LoRA(2))), ["x"]), "it has 'default'"),
        (lambda m: fg.set_active(fg.rewrite(m, fg.Spec(fg.LoRA(2))), ["default"] * 2), "at most once"),
        (lambda m: fg.remove(fg.rewrite(m, fg.Spec(fg.LoRA(2))), "x"), "no adapter 'x'"),
        (lambda m: fg.merge(m), "has no adapter"),
        (lambda m: fg.explain(m), "has no adapter"),
    ],
)
def test_wrong_calls_are_clear_errors(mlp, call, says):
    with pytest.raises(fg.AdapterError, match=says):
        call(mlp)


def test_two_trained_copies_of_one_head_cannot_both_be_active(bert):
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"], train=["classifier"]))
    adapted = fg.rewrite(adapted, fg.Spec(fg.LoRA(2), ["query"], train=["classifier"]), name="b")
    with pytest.raises(fg.AdapterError, match="both bring their own trained 'classifier'"):
        fg.set_active(adapted, ["default", "b"])
    assert fg.active(adapted) == ["b"]


def test_explain(bert):
    adapted = fg.rewrite(bert, fg.Spec(fg.UniLoRA(rank=2, vector_length=50), ["query"], train=["classifier"]))
    told = fg.explain(adapted)
    assert told.trainable == 50 + 2 * 32 + 2
    assert told.base == sum(p.numel() for p in bert.parameters())
    text = str(told)
    assert "theta 50" in text and "layer.1.attention.self.query" in text and "graft" in text and "32 x 32" in text
    assert told.bytes == sum(row.bytes for row in told.rows) > 50 * 4
