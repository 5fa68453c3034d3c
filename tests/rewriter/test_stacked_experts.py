"""Adapters on experts: an own one for every expert, in every implementation, against float64 weights of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from expert_models import EXPERTS, SWITCHED, made, mixtral, tokens
from methods import METHODS, graft, needs_estimate
from small_models import noisy, relative_error

import fxgraft as fg
from fxgraft.rewriter.products.expert_weights import contracted_dim
from fxgraft.rewriter.sites import NoMatch
from fxgraft.rewriter.state import record_of

pytest.importorskip("transformers")
STACKS = ["gate_up_proj", "down_proj"]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
ON_EXPERTS = {n: m for n, m in METHODS.items() if n.split()[0] not in ("glora", "hydralora", "supernet")}


def targets(name: str) -> list[str]:
    return ["input_linear", "output_linear"] if name == "jetmoe" else STACKS


def adapted(name: str, method: fg.LoRA | None = None, seed: int = 1):
    model = made(EXPERTS[name])
    spec = fg.Spec(method or fg.LoRA(rank=3), targets=targets(name))
    return model, noisy(graft(model, spec), "default", seed)


def exact(model):
    """In float64, for which there is no grouped kernel."""
    model = model.double()
    if any(hasattr(m, "is_transposed") for m in model.modules()):
        model.set_experts_implementation("eager")
    return model


def logits(model, dtype=torch.float32):
    return model(tokens()).logits.to(dtype)


@pytest.mark.parametrize("name", EXPERTS)
def test_every_layout_computes_the_weights_that_merging_gives(name):
    model, grafted = adapted(name)
    base = logits(model)
    oracle = logits(exact(fg.merge(grafted)))
    for way in IMPLEMENTATIONS if name in SWITCHED else ("eager",):
        if name in SWITCHED:
            grafted.set_experts_implementation(way)
            model.set_experts_implementation(way)
        assert relative_error(logits(grafted), oracle) < 1e-5, way
        with fg.disabled(grafted):
            assert torch.equal(logits(grafted), logits(model)), way
    assert relative_error(base, oracle) > 1e-3  # the adapters do something


@pytest.mark.parametrize("method", ON_EXPERTS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_every_method_and_its_gradients_are_those_of_the_weight_it_amounts_to(name, method):
    _model, grafted = adapted(name, ON_EXPERTS[method])
    twin = exact(copy.deepcopy(grafted))
    expected = logits(twin)
    expected.square().sum().backward()
    oracle = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    assert relative_error(expected, logits(exact(fg.merge(grafted)))) < 1e-5
    for way in IMPLEMENTATIONS:
        grafted.set_experts_implementation(way)
        grafted.zero_grad()
        out = logits(grafted)
        assert relative_error(out, expected) < 1e-5, way
        out.square().sum().backward()
        for n, p in grafted.named_parameters():
            if p.requires_grad and oracle[n] is not None and oracle[n].abs().max() > 1e-9:
                assert relative_error(p.grad, oracle[n]) < 2e-5, (way, n)


def test_one_adapter_for_each_expert():
    model, grafted = adapted("mixtral")
    state = fg.adapter_state(grafted)
    prefix = "model.layers.0.mlp.experts"
    assert state[f"{prefix}.gate_up_proj.A"].shape == (4, 3, 24)
    assert state[f"{prefix}.gate_up_proj.B"].shape == (4, 40, 3)
    merged, base = fg.merge(grafted), model.model.layers[0].mlp.experts
    delta = (merged.model.layers[0].mlp.experts.down_proj - base.down_proj).detach()
    A, B = state[f"{prefix}.down_proj.A"], state[f"{prefix}.down_proj.B"]
    torch.testing.assert_close(delta, B @ A * (16 / 3), atol=1e-5, rtol=1e-4)
    assert not torch.equal(delta[0], delta[1])


def test_transposed_weights_are_merged_as_they_lie():
    model, grafted = adapted("gpt_oss")
    site = next(s for s in record_of(grafted, "default").sites if s.weight == "gate_up_proj")
    assert (site.experts, site.in_features, site.out_features) == (4, 24, 40)
    state = fg.adapter_state(grafted)
    delta = fg.merge(grafted).model.layers[0].mlp.experts.gate_up_proj - model.model.layers[0].mlp.experts.gate_up_proj
    A, B = (state[f"model.layers.0.mlp.experts.gate_up_proj.{n}"] for n in "AB")
    torch.testing.assert_close(delta.detach(), (B @ A * (16 / 3)).mT, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_all_linear_reaches_nearly_all_parameters_and_no_router(name):
    model = made(EXPERTS[name])
    grafted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["all-linear"]))
    sites = record_of(grafted, "default").sites
    assert not [s.name for s in sites if "router" in s.name or s.name.endswith("gate")]
    reached = sum(max(s.experts, 1) * s.in_features * s.out_features for s in sites)
    whole = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n)
    assert reached > 0.9 * whole


def test_a_router_is_adapted_when_it_is_named():
    model = made(mixtral)
    grafted = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["mlp.gate"])), "default", 0)
    assert [s.name for s in record_of(grafted, "default").sites] == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert not torch.equal(logits(grafted), logits(model))


def test_parts_weights_and_several_adapters_add_up():
    model = made(mixtral)
    part = fg.Spec(fg.LoRA(rank=2), targets=[fg.Target("gate_up_proj", parts=2, select=(1,))])
    grafted = noisy(fg.rewrite(model, part, name="a"), "a", 1)
    grafted = noisy(fg.rewrite(grafted, fg.Spec(fg.VeRA(rank=4), targets=STACKS), name="b"), "b", 2)
    fg.set_active(grafted, {"a": 0.5, "b": -2.0})
    oracle = logits(exact(fg.merge(grafted)))
    for way in IMPLEMENTATIONS:
        grafted.set_experts_implementation(way)
        assert relative_error(logits(grafted), oracle) < 1e-5
    fg.remove(grafted, "a")
    fg.remove(grafted, "b")
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(grafted), logits(model)) and type(grafted.model.layers[0].mlp.experts) is type(
        model.model.layers[0].mlp.experts
    )


def test_copies_pickles_and_checkpointing():
    _, grafted = adapted("mixtral")
    expected = logits(grafted)
    assert torch.equal(logits(copy.deepcopy(grafted)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(grafted))), expected)
    grafted.train()
    expected = logits(grafted)
    expected.sum().backward()
    plain = {n: p.grad.clone() for n, p in grafted.named_parameters() if p.requires_grad}
    grafted.zero_grad()
    grafted.gradient_checkpointing_enable()
    again = logits(grafted)
    again.sum().backward()
    assert torch.equal(again, expected)
    assert all(torch.equal(plain[n], p.grad) for n, p in grafted.named_parameters() if p.requires_grad)


def test_dropout_of_the_adapters_input_draws_in_training_only():
    _, grafted = adapted("mixtral", fg.LoRA(rank=3, dropout=0.5))
    for way in IMPLEMENTATIONS:
        grafted.set_experts_implementation(way)
        assert torch.equal(logits(grafted.eval()), logits(grafted))
        assert not torch.equal(logits(grafted.train()), logits(grafted))


def test_own_folders_swap_to_lora_and_combine(tmp_path):
    model, grafted = adapted("gpt_oss", fg.UniLoRA(rank=2, vector_length=20, init_bound=0.5))
    expected = logits(grafted)
    fg.save_adapter(grafted, tmp_path)
    assert torch.equal(logits(fg.load_adapter(model, tmp_path)), expected)
    lora = fg.to_lora(grafted)
    assert relative_error(logits(lora), expected.double()) < 1e-5
    other = noisy(fg.rewrite(lora, fg.Spec(fg.LoRA(rank=2), targets=STACKS), name="b"), "b", 3)
    both = fg.combine(other, {"default": 0.5, "b": 2.0}, "cat")
    fg.set_active(other, {"default": 0.5, "b": 2.0})
    assert relative_error(logits(both), logits(other, torch.float64)) < 1e-5
    _, second = adapted("gpt_oss", fg.UniLoRA(rank=2, vector_length=20, init_bound=0.5), seed=9)
    fg.swap(grafted, fg.adapter_state(second))
    assert torch.equal(logits(grafted), logits(second))


def test_explain_says_how_many_experts_a_site_has():
    _, grafted = adapted("mixtral")
    told = fg.explain(grafted)
    assert told.rows[0].shape == "4 experts, 40 x 24"
    assert told.trainable == 2 * 4 * 3 * (40 + 24 + 24 + 20)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - ON_EXPERTS.keys()))
def test_methods_that_are_no_two_factors_are_refused_with_the_way_out(method):
    model = made(mixtral)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        fg.SpecError, match=r"experts.gate_up_proj.*(two factors|whole weights|bias).*(xclude|overrides)"
    ):
        fg.rewrite(model, fg.Spec(METHODS[method], targets=["gate_up_proj"]))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(needs_estimate(METHODS[m]) for m in (method,))


def test_kernels_that_read_the_weights_themselves_are_refused():
    model, grafted = adapted("mixtral")
    grafted.model.layers[0].mlp.experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(fg.AdapterError, match="set_experts_implementation"):
        logits(grafted)
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(fg.TargetError, match=r"gate_up_proj.*set_experts_implementation"):
        fg.rewrite(model, fg.Spec(fg.LoRA(), targets=["gate_up_proj"]))


def test_a_bank_of_experts_is_refused():
    _, grafted = adapted("mixtral")
    with pytest.raises(fg.SpecError, match="rows of its experts"):
        fg.bank(grafted)


class _Odd(torch.nn.Module):
    """Experts as a user writes them; `mix` reads the weight in no way that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5, 4))
        self.mix = torch.nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x, chosen):
        out = torch.stack([torch.nn.functional.linear(row, self.weight[e]) for row, e in zip(x, chosen, strict=True)])
        return out + torch.einsum("bi,eoi->bo", x, self.mix)


class _Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _Odd()

    def forward(self, x, chosen):
        return self.experts(x, chosen)


def test_experts_of_ones_own_and_what_is_not_understood():
    torch.manual_seed(0)
    model, x, chosen = _Around(), torch.randn(6, 4), torch.tensor([0, 2, 1, 0, 0, 2])
    grafted = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["experts"])), "default", 0)
    assert [s.name for s in record_of(grafted, "default").sites] == ["experts"]
    assert relative_error(grafted(x, chosen), fg.merge(grafted).double()(x.double(), chosen)) < 1e-5
    with pytest.raises(fg.TargetError, match="mix"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["mix"]))


class _Helped(_Odd):
    """Its forward has a method of its own multiply with the weight, which the module itself would give it."""

    def forward(self, x, chosen):
        if self.known != 3:
            raise ValueError("three experts")
        return torch.nn.functional.linear(x, self.weight[0]) + self.more(x, chosen)

    @property
    def known(self):
        return self.weight.shape[0]

    def more(self, x, chosen):
        return self.most(x.relu())

    def most(self, x):
        return torch.nn.functional.linear(x, self.weight[1])


def test_a_method_of_the_experts_that_reads_the_weight_too_is_told():
    model = _Around()
    model.experts = _Helped()
    said = contracted_dim(model.experts, "weight")
    assert isinstance(said, NoMatch) and "'most' of _Helped, which its forward calls, reads 'weight' too" in said.reason
    with pytest.raises(fg.TargetError, match="'experts' cannot be adapted"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["experts"]))


def test_a_method_of_the_experts_that_asks_for_its_shape_is_none_of_these():
    class Asked(_Helped):
        def most(self, x):
            return x.new_zeros(len(x), self.weight.shape[1])

    model, x, chosen = _Around(), torch.randn(6, 4), torch.tensor([0, 2, 1, 0, 0, 2])
    model.experts = Asked()
    grafted = noisy(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets=["experts"])), "default", 0)
    assert relative_error(grafted(x, chosen), fg.merge(grafted).double()(x.double(), chosen)) < 1e-5


def test_lora_sb_starts_from_the_gradient_of_every_expert():
    model = made(mixtral)
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    estimate = fg.estimate_update(model, batches, targets=STACKS, lr=1e-2, warmup_ratio=0.1, total_steps=10, samples=2)
    model.zero_grad()
    model(**batches[0]).loss.backward()
    for index in range(4):
        gradient = model.model.layers[1].mlp.experts.down_proj.grad[index]
        name = f"model.layers.1.mlp.experts.down_proj@{index}"
        clear = gradient.abs() > 1e-7
        assert torch.equal(estimate.signs(name)[clear], gradient.sign().to(torch.int8)[clear])
    grafted = fg.rewrite(model, fg.Spec(fg.LoRASB(rank=20), targets=["down_proj"]), update=estimate)
    delta = (fg.merge(grafted).model.layers[1].mlp.experts.down_proj - model.model.layers[1].mlp.experts.down_proj)[2]
    torch.testing.assert_close(delta, estimate.update("model.layers.1.mlp.experts.down_proj@2"), atol=1e-4, rtol=1e-3)
