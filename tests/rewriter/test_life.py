"""The adapted model lives like the original: generate, Trainer, copies, pickles, casts, checkpoints, DDP."""

import copy
import io
import pickle

import pytest
import torch
from methods import MERGEABLE, METHODS, graft
from small_models import perturb
from torch import nn

import fxgraft as fg


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_generate_with_kv_cache(llama, ids, method):
    adapted = perturb(graft(llama, fg.Spec(method)), 5.0 if method.vectors else 0.3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = adapted.generate(ids, **options)
        assert torch.equal(cached, adapted.generate(ids, use_cache=False, **options))
        if method in MERGEABLE.values():
            assert torch.equal(cached, fg.merge(adapted).generate(ids, **options))
        with fg.disabled(adapted):
            assert torch.equal(adapted.generate(ids, **options), llama.generate(ids, **options))
        assert not torch.equal(cached, llama.generate(ids, **options))


def test_dropout_follows_the_mode(bert, ids):
    for module in bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(3, dropout=0.5), ["query", "value"])))
    assert torch.equal(adapted(ids).logits, adapted(ids).logits)
    adapted.train()
    assert not torch.equal(adapted(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama, ids, method, reentrant):
    adapted = perturb(graft(llama, fg.Spec(method))).train()
    torch.manual_seed(1)  # a supernet draws its paths
    adapted(ids, labels=ids).loss.backward()
    expected = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in expected)
    adapted.zero_grad()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        adapted.enable_input_require_grads()
    torch.manual_seed(1)
    adapted(ids, labels=ids).loss.backward()
    got = [p.grad for p in adapted.parameters() if p.requires_grad]
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_trainer(bert, ids, method, tmp_path):
    from transformers import Trainer, TrainingArguments

    adapted = graft(bert, fg.Spec(method, ["query", "value"], train=["classifier"]))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    data = [{"input_ids": ids[i % 3], "labels": i % 2} for i in range(12)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    Trainer(adapted, arguments, train_dataset=data).train()
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("fxgraft" in n for n in changed)
    restored = graft(bert, fg.Spec(method, ["query", "value"], train=["classifier"]))
    from safetensors.torch import load_file

    (last,) = list(tmp_path.glob("checkpoint-6/model.safetensors"))
    result = restored.load_state_dict(load_file(last), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(restored.eval()(ids).logits, adapted.eval()(ids).logits)


def test_deepcopy_keeps_shared_tensors_shared_inside_the_copy(bert, ids):
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.UniLoRA(3, 100), ["query", "value"], train=["classifier"])))
    before = adapted(ids).logits
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(ids).logits, before)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in adapted.named_parameters()]
    assert type(twin.bert.encoder.layer[0].attention.self.query) is type(
        adapted.bert.encoder.layer[0].attention.self.query
    )
    with torch.no_grad():
        twin.fxgraft_shared.default.theta.zero_()
    assert torch.equal(adapted(ids).logits, before), "the copy's vector is its own"
    layer = twin.bert.encoder.layer[1].attention.self.value
    assert layer.fxgraft_slot0.shared is twin.fxgraft_shared.default


def test_pickle_and_torch_save(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query", "value"], train=["classifier"])))
    twin = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(twin(ids).logits, adapted(ids).logits) and fg.active(twin) == ["default"]
    shared = twin.fxgraft_shared.default if hasattr(adapted, "fxgraft_shared") else None
    assert twin.bert.encoder.layer[1].attention.self.value.fxgraft_slot0.shared is shared
    with fg.disabled(twin):
        assert torch.equal(twin(ids).logits, bert(ids).logits)
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, adapted(ids).logits)


def test_state_dict_round_trip(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query"], train=["classifier"])))
    buffer = io.BytesIO()
    torch.save(adapted.state_dict(), buffer)
    buffer.seek(0)
    fresh = graft(bert, fg.Spec(method, ["query"], train=["classifier"]))
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(ids).logits, adapted(ids).logits)


def test_casts(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query"])))
    expected = adapted(ids).logits
    low = copy.deepcopy(adapted).to(torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    # bf16 keeps 8 bits of the mantissa; two layers and a head stay within 5 % of the largest logit
    assert (low(ids).logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    wide = copy.deepcopy(adapted).to(torch.float64)
    torch.testing.assert_close(wide(ids).logits.float(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(adapted).to("cpu")(ids).logits, expected)


def test_adapters_of_a_bf16_base_train_in_float32(llama, ids, method):
    adapted = graft(llama.to(torch.bfloat16), fg.Spec(method))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    out = adapted(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
    same = graft(llama, fg.Spec(method), dtype=torch.bfloat16)
    assert {p.dtype for p in same.parameters() if p.requires_grad} == {torch.bfloat16}


def test_autocast(bert, ids, method):
    adapted = perturb(graft(bert, fg.Spec(method, ["query", "value"])))
    expected = adapted(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = adapted(ids).logits
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_hooks_and_ties_survive(llama, ids):
    seen = []
    llama.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    adapted = fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"]))
    adapted(ids)
    assert seen == ["GraftedLinear"]
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight


def test_distributed_data_parallel(bert, ids, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        adapted = fg.rewrite(bert, fg.Spec(fg.UniLoRA(3, 100), ["query", "value"], train=["classifier"]))
        parallel = nn.parallel.DistributedDataParallel(adapted)
        parallel(ids, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert adapted.fxgraft_shared.default.theta.grad.abs().sum() > 0
        fg.set_active(parallel, [])
        assert fg.active(parallel) == [] and torch.equal(parallel(ids).logits, bert(ids).logits)
    finally:
        dist.destroy_process_group()
