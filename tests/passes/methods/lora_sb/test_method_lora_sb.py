"""LoRA-SB: packed signs, what it needs, the delta it starts from, and Theorem 3."""

from __future__ import annotations

import pytest
import torch
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.lora_sb.lora_sb import LoRASB, UpdateEstimate, pack_signs, unpack_signs
from fxgraft.passes.methods.lora_xs import lora_xs

SITES = {"up": (11, 7), "down": (5, 11)}


def estimate_of(signs, eta=0.01):
    return UpdateEstimate(
        eta, {n: pack_signs(s) for n, s in signs.items()}, {n: tuple(s.shape) for n, s in signs.items()}, 1, {}, 0
    )


@pytest.fixture
def signs():
    return {name: torch.randint(-1, 2, shape).float() for name, shape in SITES.items()}


def truncation(matrix, rank):
    svd = torch.linalg.svd(matrix.double())
    return svd.U[:, :rank] @ torch.diag(svd.S[:rank]) @ svd.Vh[:rank]


def delta_of(adapted, site):
    state = fg.adapter_state(adapted)
    A, B, R = (state[f"{site}.{n}"].double() for n in "ABR")
    return B @ R @ A


# -- the estimate ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 7), (4, 8)])
def test_signs_survive_packing_at_two_bits(shape):
    values = torch.randn(shape)
    values[torch.rand(shape) < 0.3] = 0
    packed = pack_signs(values)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-values.numel() // 4))
    assert torch.equal(unpack_signs(packed, shape).float(), values.sign())


def test_update_is_minus_eta_sign(signs):
    estimate = estimate_of(signs, 0.25)
    assert torch.equal(estimate.update("up"), -0.25 * signs["up"])
    assert estimate.signs("up").dtype == torch.int8


# -- start -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_delta_is_the_truncated_update(mlp, signs, dtype):
    mlp = mlp.to(dtype)
    adapted = fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up", "down"]), update=estimate_of(signs))
    close = 1e-5 if dtype == torch.float32 else 1e-12
    state = fg.adapter_state(adapted)
    for site, values in signs.items():
        assert relative_error(delta_of(adapted, site), truncation(-0.01 * values.double(), 3)) < close
        A, B, R = (state[f"{site}.{n}"] for n in "ABR")
        assert {t.dtype for t in (A, B, R)} == {dtype}
        assert relative_error(A @ A.t(), torch.eye(3)) < close
        assert relative_error(B.t() @ B, torch.eye(3)) < close
        assert torch.equal(R, torch.diag(R.diagonal()))
        assert relative_error(R.diagonal(), torch.linalg.svdvals(0.01 * values.double())[:3]) < close
    x = torch.randn(4, 7, dtype=dtype)
    expected = x.double() @ truncation(-0.01 * signs["up"].double(), 3).t()
    assert relative_error(adapted.up(x).double() - mlp.up(x).double(), expected) < close * 10  # a difference of sums


def test_full_rank_starts_at_the_whole_update(mlp, signs):
    adapted = fg.rewrite(mlp, fg.Spec(LoRASB(rank=5), targets=["down"]), update=estimate_of(signs))
    merged = fg.merge(adapted)
    expected = mlp.down.weight.double() - 0.01 * signs["down"].double()
    assert relative_error(merged.down.weight, expected) < 1e-5


def test_large_sites_take_the_randomised_svd(signs):
    base = nn.Sequential(nn.Linear(60, 90))
    direction = torch.randn(90, 3) @ torch.randn(3, 60) + 0.3 * torch.randn(90, 60)
    estimate = estimate_of({"0": direction})
    best = torch.linalg.svdvals(direction.sign().double())[:4].square().sum() * 0.01**2
    captured = {}
    for name, method in {
        "exact": LoRASB(rank=4),
        "default": LoRASB(rank=4, exact_up_to=0),
        "theirs": LoRASB(rank=4, exact_up_to=0, oversample=0, niter=1),
    }.items():
        adapted = fg.rewrite(base, fg.Spec(method, targets=["0"]), update=estimate)
        captured[name] = (fg.adapter_state(adapted)["0.R"].square().sum() / best).item()
    assert captured["exact"] == pytest.approx(1, abs=1e-5)
    assert captured["default"] == pytest.approx(1, abs=1e-3)
    assert captured["theirs"] < captured["default"] - 1e-3, "the options reach the decomposition"


def test_conv1d_and_part_of_a_fused_weight(gpt2, ids):
    targets = ["c_fc", fg.Target("c_attn", parts=3, select=(0, 2))]
    labels = ids.clone()
    estimate = fg_estimate(gpt2, [{"input_ids": ids, "labels": labels}], targets, samples=3)
    adapted = fg.rewrite(gpt2, fg.Spec(LoRASB(rank=4), targets=targets), update=estimate)
    for site, shape in {"transformer.h.1.mlp.c_fc": (128, 32), "transformer.h.0.attn.c_attn[2]": (32, 32)}.items():
        assert estimate.shapes[site] == shape
        assert relative_error(delta_of(adapted, site), truncation(estimate.update(site), 4)) < 1e-5
    perturb(adapted, 0.2)
    with torch.no_grad():
        merged = fg.merge(adapted)(ids).logits
        assert relative_error(adapted(ids).logits, merged) < 1e-5
        assert relative_error(gpt2(ids).logits, merged) > 1e-3


def fg_estimate(model, batches, targets, **options):
    from fxgraft.passes.methods.lora_sb.estimate import estimate_update

    return estimate_update(model, batches, targets=targets, lr=1e-2, total_steps=50, **options)


# -- Theorem 3 ---------------------------------------------------------------------------------------------------
def test_gradient_of_R_is_the_projected_full_gradient(mlp, signs):
    mlp = mlp.double()
    adapted = fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up", "down"]), update=estimate_of(signs))
    x = torch.randn(6, 7, dtype=torch.float64)
    adapted(x).square().sum().backward()

    full = fg.merge(adapted).requires_grad_(True)
    full(x).square().sum().backward()
    trained = dict(adapted.named_parameters())
    for site in SITES:
        state = fg.adapter_state(adapted)
        A, B = state[f"{site}.A"], state[f"{site}.B"]
        projected = B.t() @ full.get_submodule(site).weight.grad @ A.t()
        assert relative_error(trained[f"{site}.fxgraft.default.R"].grad, projected) < 1e-10


def test_gradient_of_the_product_is_the_best_one_in_the_subspace():
    """Theorem 3 itself: `B g_R A` is the projection of the full gradient, i.e. no step in R comes closer to it."""
    B = torch.linalg.qr(torch.randn(11, 3, dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q.t()
    R = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    W = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 11, dtype=torch.float64)
    y = x @ W.t() + lora_xs(x, A, B, R, 1.0)
    g_R, G = torch.autograd.grad((y - target).square().sum(), (R, W))
    best = torch.linalg.lstsq(torch.kron(B.contiguous(), A.t().contiguous()), G.reshape(-1, 1)).solution.reshape(3, 3)
    assert relative_error(g_R, best) < 1e-10


def test_only_R_trains_and_everything_is_saved(mlp, signs):
    adapted = fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up", "down"]), update=estimate_of(signs))
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"{s}.fxgraft.default.R" for s in SITES}
    assert set(fg.adapter_state(adapted)) == {f"{s}.{n}" for s in SITES for n in "ABR"}


def test_one_operator_for_both_methods(mlp, signs):
    adapted = fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up"]), update=estimate_of(signs))
    program = torch.export.export(adapted, (torch.randn(2, 7),), strict=False)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.fxgraft.lora_xs.default]
    assert [n.args[-1] for n in nodes] == [1.0]


def test_bf16_base_keeps_float32_factors(mlp, signs):
    adapted = fg.rewrite(mlp.bfloat16(), fg.Spec(LoRASB(rank=3), targets=["up"]), update=estimate_of(signs))
    assert relative_error(delta_of(adapted, "up"), truncation(-0.01 * signs["up"], 3)) < 1e-5
    assert adapted(torch.randn(2, 7).bfloat16()).dtype == torch.bfloat16


# -- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("update", [None, {"up": torch.ones(11, 7)}])
def test_without_an_estimate_the_error_shows_the_call(mlp, update):
    with pytest.raises(fg.SpecError, match=r"fg\.estimate_update\(model, batches.*\n.*rank=3.*update=estimate"):
        fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up"]), update=update)


def test_estimate_for_other_sites_is_an_error(mlp, signs):
    with pytest.raises(fg.AdapterError, match=r"nothing for 1 of 2 site\(s\): 'down'.*'up'"):
        fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up", "down"]), update=estimate_of({"up": signs["up"]}))
    with pytest.raises(fg.AdapterError, match=r"is \(7, 11\) at 'up'.*\(11, 7\)"):
        fg.rewrite(mlp, fg.Spec(LoRASB(rank=3), targets=["up"]), update=estimate_of({"up": signs["up"].t()}))
    assert [n for n, _ in mlp.named_parameters()] == ["up.weight", "up.bias", "down.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize("values", [{"rank": 0}, {"oversample": -1}, {"niter": 1.5}, {"exact_up_to": True}])
def test_wrong_values_raise_at_construction(values):
    with pytest.raises(fg.SpecError, match=next(iter(values))):
        LoRASB(**values)


def test_json_round_trip():
    spec = fg.Spec(LoRASB(rank=3, oversample=0), targets=["up"])
    assert fg.Spec.from_dict(spec.to_dict()) == spec
