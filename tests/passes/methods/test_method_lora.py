"""LoRA against a float64 oracle, PEFT, and its stated start."""

import math

import pytest
import torch
from small_models import MLP, perturb, relative_error
from torch import nn

import fxgraft as fg


def oracle(x, A, B, scale):
    """One output at a time, in float64, from the paper's formula."""
    x, A, B = x.double(), A.double(), B.double()
    y = torch.zeros(*x.shape[:-1], B.shape[0], dtype=torch.float64)
    for o in range(B.shape[0]):
        for k in range(A.shape[0]):
            y[..., o] += scale * B[o, k] * (x * A[k]).sum(-1)
    return y


@pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
def test_operator(batch):
    x, A, B = torch.randn(*batch, 7), torch.randn(3, 7), torch.randn(5, 3)
    assert relative_error(torch.ops.fxgraft.lora(x, A, B, 0.7), oracle(x, A, B, 0.7)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_operator_in_half_precision(dtype, tolerance):
    """Factors stay float32 and are cast where they meet x: 8 and 11 bits of mantissa, three roundings."""
    x, A, B = torch.randn(4, 64).to(dtype), torch.randn(8, 64), torch.randn(32, 8)
    y = torch.ops.fxgraft.lora(x, A, B, 0.5)
    assert y.dtype == dtype and relative_error(y, oracle(x, A, B, 0.5)) < tolerance


def test_gradients():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 7), (3, 7), (5, 3))]
    assert torch.autograd.gradcheck(lambda x, A, B: torch.ops.fxgraft.lora(x, A, B, 0.7), inputs)


@pytest.mark.parametrize("rslora", [False, True])
def test_scale(rslora):
    assert fg.LoRA(rank=4, alpha=6, rslora=rslora).scale == 6 / (2 if rslora else 4)


def test_start_is_the_base_bit_for_bit(bert, ids):
    adapted = fg.rewrite(bert, fg.Spec(fg.LoRA(rank=3)))
    assert torch.equal(adapted(ids).logits, bert(ids).logits)


def test_initialisation():
    adapted = fg.rewrite(nn.Linear(400, 100), fg.Spec(fg.LoRA(rank=16)))
    state = fg.adapter_state(adapted)
    bound = 1 / math.sqrt(400)
    assert state["A"].abs().max() <= bound and state["A"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not state["B"].any()


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"lora_alpha": 3, "r": 5}])
def test_same_as_peft(config, bert, ids):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 16, **config}
    ours = perturb(
        fg.rewrite(
            bert,
            fg.Spec(
                fg.LoRA(settings["r"], settings["lora_alpha"], rslora=settings.get("use_rslora", False)),
                ["query", "intermediate.dense"],
            ),
        )
    )
    expected = ours(ids).logits
    peft = get_peft_model(bert, LoraConfig(target_modules=["query", "intermediate.dense"], **settings)).eval()
    with torch.no_grad():
        for name, tensor in fg.adapter_state(ours).items():
            site, _, factor = name.rpartition(".")
            peft.base_model.model.get_submodule(site).get_submodule(f"lora_{factor}.default").weight.copy_(tensor)
    torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Linear(5, 7, bias=False)])
def test_rectangular_layers(layer):
    adapted = perturb(fg.rewrite(layer, fg.Spec(fg.LoRA(rank=3, alpha=2))))
    x, state = torch.randn(2, 4, layer.in_features), fg.adapter_state(adapted)
    expected = oracle(x, state["A"], state["B"], 2 / 3) + layer.double()(x.double())
    assert relative_error(adapted.float()(x), expected) < 1e-5


def test_trainable_count(mlp):
    assert fg.explain(fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=2)))).trainable == 2 * (7 + 11) + 2 * (11 + 5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0}, {"rank": -1}, {"rank": 2.0}, {"rank": True}, {"alpha": 0}, {"alpha": -1}, {"alpha": float("nan")},
        {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": "a"},
    ],
)  # fmt: skip
def test_wrong_values_raise_at_construction(wrong):
    with pytest.raises(fg.SpecError, match=next(iter(wrong))):
        fg.LoRA(**wrong)


def test_a_rank_above_the_site_is_what_the_site_can_have():
    adapted = perturb(fg.rewrite(MLP(), fg.Spec(fg.LoRA(rank=6), ["down"])))
    assert fg.explain(adapted).rows[0].less == "rank 5 of 6"
    x = torch.randn(3, 7)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x), rtol=1e-5, atol=1e-6)
