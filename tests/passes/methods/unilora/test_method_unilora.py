"""Uni-LoRA: operator, projection, HF PEFT's indices, memory, and what is on disk."""

import numpy as np
import pytest
import torch
from small_models import perturb, relative_error

import fxgraft as fg
from fxgraft.passes.methods.unilora.unilora import balanced_indices

SPEC = fg.Spec(fg.UniLoRA(rank=4, vector_length=120, init_bound=0.5), ["query", "value"])


def oracle(x, theta, counts, index_a, index_b):
    """The virtual A and the transposed B entry by entry, in float64."""
    x, theta = x.double(), theta.double()
    A = torch.empty(index_a.shape, dtype=torch.float64)
    B = torch.empty(index_b.shape, dtype=torch.float64)
    for matrix, index in ((A, index_a), (B, index_b)):
        for i in range(index.shape[0]):
            for j in range(index.shape[1]):
                k = int(index[i, j])
                matrix[i, j] = theta[k] / float(counts[k]) ** 0.5
    return x @ A.T @ B


def operands(dtype=torch.float32, d=11, r=3, i=7, o=5):
    index_a = torch.randint(0, d, (r, i), dtype=torch.int32)
    index_b = torch.randint(0, d, (r, o), dtype=torch.int32)
    counts = torch.bincount(torch.cat([index_a.flatten(), index_b.flatten()]), minlength=d).clamp(min=1)
    return torch.randn(2, 4, i, dtype=dtype), torch.randn(d, dtype=dtype), counts.to(torch.uint8), index_a, index_b


def test_operator():
    values = operands()
    assert relative_error(torch.ops.fxgraft.unilora(*values), oracle(*values)) < 1e-5


def test_operator_in_bfloat16():
    """The vector stays float32; A and B are rounded to bf16's 8 bits before the products."""
    x, *rest = operands()
    y = torch.ops.fxgraft.unilora(x.to(torch.bfloat16), *rest)
    assert y.dtype == torch.bfloat16 and relative_error(y, oracle(x.to(torch.bfloat16), *rest)) < 3e-2


def test_gradients():
    x, theta, *rest = operands(torch.float64)
    check = [x.requires_grad_(), theta.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, t: torch.ops.fxgraft.unilora(x, t, *rest), check)


def test_the_projection_is_an_isometry(bert):
    adapted = fg.rewrite(bert, SPEC)
    theta = fg.adapter_state(adapted)["theta"]
    squares = sum(
        (t.double() ** 2).sum()
        for A, B in fg.passes.models.factors.linear_factors(adapted, "default").values()
        for t in (A, B)
    )
    assert squares.item() == pytest.approx((theta.double() ** 2).sum().item(), rel=1e-6)


@pytest.mark.parametrize(("total", "length"), [(1000, 100), (1003, 100), (5, 5), (7, 3)])
def test_balanced_indices_are_balanced(total, length):
    counts = np.bincount(balanced_indices(total, length, 0), minlength=length)
    assert counts.sum() == total and set(counts) <= {total // length, -(-total // length)}


@pytest.mark.parametrize(
    ("rank", "length", "seed", "targets"), [(4, 120, 42, ["query", "value"]), (3, 97, 7, ["dense"])]
)
def test_a_vector_trained_in_peft_gives_the_same_output(rank, length, seed, targets, bert, ids):
    from peft import UniLoraConfig, get_peft_model

    ours = fg.rewrite(bert, fg.Spec(fg.UniLoRA(rank, length, seed=seed), targets))
    config = UniLoraConfig(r=rank, theta_d_length=length, proj_seed=seed, target_modules=targets)
    peft = get_peft_model(bert, config).eval()
    vector = torch.randn(length)
    with torch.no_grad():
        peft.base_model.unilora_theta_d["default"].copy_(vector)
    fg.swap(ours, {"theta": vector})
    expected = peft(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-6)
    for name, tensors in fg.rewriter.tensors.adapter_modules(
        ours, "default", fg.rewriter.state.record_of(ours, "default")
    ):
        if tensors.site is not None:
            layer = peft.base_model.model.get_submodule(name[:-1])
            assert torch.equal(layer.unilora_indices_A["default"], tensors.index_a.long())
            assert torch.equal(layer.unilora_indices_B["default"], tensors.index_b.t().long())


def test_uniform_sampler_counts_what_is_really_used(bert):
    method = fg.UniLoRA(rank=4, vector_length=900, sampler="uniform")
    adapted = fg.rewrite(bert, fg.Spec(method, ["query", "value"]))
    used = torch.zeros(900, dtype=torch.long)
    for layer in adapted.bert.encoder.layer:
        for site in (layer.attention.self.query, layer.attention.self.value):
            for index in (site.fxgraft.default.index_a, site.fxgraft.default.index_b):
                used += torch.bincount(index.flatten(), minlength=900)
    assert (used == 0).any() and used.sum() == method.virtual(fg.rewriter.state.record_of(adapted, "default").sites)
    assert torch.equal(adapted.fxgraft_shared.default.counts.long(), used.clamp(min=1))
    adapted(torch.zeros(2, 3, dtype=torch.long)).logits.sum().backward()
    gradient = adapted.fxgraft_shared.default.theta.grad
    assert torch.isfinite(gradient).all() and not gradient[used == 0].any()


def test_one_vector_for_the_whole_model(bert):
    adapted = fg.rewrite(bert, SPEC)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == ["fxgraft_shared.default.theta"]
    assert fg.explain(adapted).trainable == 120
    groups = fg.rewrite(bert, fg.Spec(SPEC.method, SPEC.targets, overrides={"layer.0.*": fg.UniLoRA(2, 30)}))
    assert fg.explain(groups).trainable == 150 and len(fg.adapter_state(groups)) == 2


def test_indices_do_not_reach_the_state_dict_and_memory_is_4_bytes(bert):
    method = fg.UniLoRA(rank=4, vector_length=160)
    adapted = fg.rewrite(bert, fg.Spec(method, ["query", "value"]))
    assert [n for n in adapted.state_dict() if "fxgraft" in n] == ["fxgraft_shared.default.theta"]
    buffers = {n: b for n, b in adapted.named_buffers() if "fxgraft" in n}
    resident = sum(b.numel() * b.element_size() for b in buffers.values())
    virtual = method.virtual(fg.rewriter.state.record_of(adapted, "default").sites)
    assert virtual == 4 * 4 * 64 and resident / virtual <= 4.2
    assert {b.dtype for b in buffers.values()} == {torch.int32, torch.uint8}


def test_start_is_not_a_no_op_and_has_no_alpha(bert, ids):
    adapted = fg.rewrite(bert, SPEC)
    theta = fg.adapter_state(adapted)["theta"]
    assert 0.4 < theta.abs().max() <= 0.5
    assert not torch.equal(adapted(ids).logits, bert(ids).logits)


def test_on_disk_it_is_the_vector_and_the_head(bert, ids, tmp_path):
    adapted = perturb(fg.rewrite(bert, fg.Spec(SPEC.method, SPEC.targets, train=["classifier"])))
    fg.save_adapter(adapted, tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in saved.items()} == {
        "theta": (120,), "classifier.weight": (2, 32), "classifier.bias": (2,)
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(fg.load_adapter(bert, tmp_path)(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 0}, {"vector_length": -3}, {"seed": -1}, {"sampler": "random"}, {"init_bound": 0}, {"dropout": 1}],
)
def test_wrong_values_raise_at_construction(wrong):
    with pytest.raises(fg.SpecError, match=next(iter(wrong))):
        fg.UniLoRA(**wrong)


def test_a_vector_longer_than_the_virtual_parameters_is_refused(bert):
    with pytest.raises(fg.SpecError, match="4 site\\(s\\) have 1024 virtual LoRA parameters"):
        fg.rewrite(bert, fg.Spec(fg.UniLoRA(4, 1025), ["query", "value"]))


def test_counts_of_large_models_fit_their_dtype(mlp):
    adapted = fg.rewrite(mlp, fg.Spec(fg.UniLoRA(rank=5, vector_length=1), ["up", "down"]))
    counts = adapted.fxgraft_shared.default.counts
    assert counts.dtype == torch.uint8 and counts.item() == 5 * (7 + 11 + 11 + 5)
    wide = fg.rewrite(torch.nn.Linear(300, 300), fg.Spec(fg.UniLoRA(rank=5, vector_length=1)))
    assert wide.fxgraft_shared.default.counts.dtype == torch.int32
