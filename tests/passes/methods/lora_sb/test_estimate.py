"""estimate_update: the sums, what it leaves untouched, its memory, several processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from estimates import OPTIONS, first, full_gradients, mean_square, pairs, weighted
from small_models import MLP, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.passes.methods.lora_sb.estimate import estimate_update
from fxgraft.passes.methods.lora_sb.lora_sb import LoRASB


# -- the sums ----------------------------------------------------------------------------------------------------
def test_signs_are_those_of_the_sum_over_examples(mlp):
    batches = pairs(4, 1, 3)
    estimate = estimate_update(mlp, batches, targets=["up", "down"], loss=weighted, forward=first, samples=8, **OPTIONS)
    oracle = full_gradients(mlp, batches, ["up", "down"])
    assert estimate.samples == 8
    assert estimate.eta == pytest.approx(0.1 / (0.1 * 40))
    assert estimate.shapes == {"up": (11, 7), "down": (5, 11)}
    for name, gradient in oracle.items():
        assert torch.equal(estimate.signs(name).float(), gradient.sign())
        assert torch.equal(estimate.update(name), -estimate.eta * gradient.sign())


def test_examples_count_alike_in_batches_of_different_size(mlp):
    """With batch means added up unweighted, the single example would outvote the others."""
    batches = pairs(9, 1)
    batches[1][0].mul_(2)
    oracle = full_gradients(mlp, batches, ["up"])["up"]
    unweighted = sum(full_gradients(mlp, [b], ["up"])["up"] / len(b[0]) for b in batches)
    assert not torch.equal(oracle.sign(), unweighted.sign()), "this test could not tell them apart"
    estimate = estimate_update(mlp, batches, targets=["up"], loss=weighted, forward=first, samples=10, **OPTIONS)
    assert torch.equal(estimate.signs("up").float(), oracle.sign())


def test_samples_count_examples_and_cut_the_last_batch(mlp):
    batches = pairs(4, 4, 4)
    estimate = estimate_update(mlp, batches, targets=["up"], loss=weighted, forward=first, samples=6, **OPTIONS)
    assert estimate.samples == 6
    oracle = full_gradients(mlp, [batches[0], (batches[1][0][:2], batches[1][1][:2])], ["up"])["up"]
    assert torch.equal(estimate.signs("up").float(), oracle.sign())
    whole = full_gradients(mlp, batches[:2], ["up"])["up"]
    assert not torch.equal(oracle.sign(), whole.sign()), "this test could not tell them apart"


def test_a_batch_that_cannot_be_cut_is_used_whole(mlp):
    batches = [(x, y, ["text"] * len(x)) for x, y in pairs(4, 4, 4)]
    assert (
        estimate_update(mlp, batches, targets=["up"], loss=weighted, forward=first, samples=6, **OPTIONS).samples == 8
    )


def test_what_a_batch_may_be(mlp):
    x = torch.randn(4, 7)
    runs = [estimate_update(mlp, [b], targets=["up"], loss=mean_square, samples=4, **OPTIONS) for b in (x, (x,), [x])]
    runs.append(estimate_update(mlp, [{"x": x}], targets=["up"], loss=mean_square, samples=4, **OPTIONS))
    assert all(torch.equal(r.signs("up"), runs[0].signs("up")) for r in runs)


def test_no_more_batches_are_read_than_needed(mlp):
    read = []

    def stream():
        for index, batch in enumerate(pairs(4, 4, 4)):
            read.append(index)
            yield batch

    estimate_update(mlp, stream(), targets=["up"], loss=weighted, forward=first, samples=8, **OPTIONS)
    assert read == [0, 1]


def test_model_loss_conv1d_and_parts(gpt2, ids):
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    targets = [fg.Target("c_attn", parts=3, select=(0, 2)), "c_fc"]
    estimate = estimate_update(gpt2, [batch], targets=targets, samples=3, **OPTIONS)
    gpt2.requires_grad_(True)
    gpt2(**batch).loss.backward()
    qkv = gpt2.transformer.h[1].attn.c_attn.weight.grad.t()
    assert torch.equal(estimate.signs("transformer.h.1.attn.c_attn[0]").float(), qkv[:32].sign())
    assert torch.equal(estimate.signs("transformer.h.1.attn.c_attn[2]").float(), qkv[64:].sign())
    assert "transformer.h.1.attn.c_attn[1]" not in estimate.shapes
    fc = gpt2.transformer.h[0].mlp.c_fc.weight.grad.t()
    assert torch.equal(estimate.signs("transformer.h.0.mlp.c_fc").float(), fc.sign())


def test_a_tied_weight_takes_the_gradient_of_the_product_alone(llama, ids):
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    estimate = estimate_update(llama, [{"input_ids": ids, "labels": ids}], targets=["lm_head"], samples=3, **OPTIONS)
    hidden = llama.model(input_ids=ids).last_hidden_state.detach()
    head = llama.lm_head.weight.detach().clone().requires_grad_()
    llama.loss_function(logits=hidden @ head.t(), labels=ids, vocab_size=90).backward()
    agree = (estimate.signs("lm_head").float() == head.grad.sign()).float().mean()
    assert agree > 0.999, "entries at rounding level may differ"
    llama.requires_grad_(True)
    llama(input_ids=ids, labels=ids).loss.backward()
    assert (estimate.signs("lm_head").float() == llama.lm_head.weight.grad.sign()).float().mean() < 0.98


def test_adapters_are_left_out(mlp):
    batches = pairs(4)
    options = {"targets": ["down"], "loss": weighted, "forward": first, "samples": 4, **OPTIONS}
    plain = estimate_update(mlp, batches, **options)
    adapted = fg.rewrite(mlp, fg.Spec(fg.UniLoRA(rank=2, vector_length=20, init_bound=5.0), targets=["up"]))
    assert torch.equal(estimate_update(adapted, batches, **options).signs("down"), plain.signs("down"))
    assert fg.active(adapted) == ["default"]


def test_bf16_gradients_are_summed_wide():
    """256 + 1 is 256 in bfloat16: a narrow sum would lose the small gradients and keep the wrong sign."""
    layer = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    batches = [torch.tensor([[v]]).bfloat16() for v in (256.0, *[1.0] * 8, -262.0)]
    estimate = estimate_update(layer, batches, targets=["0"], loss=lambda y, b: y.sum(), samples=10, **OPTIONS)
    narrow = torch.tensor(0.0).bfloat16()
    for batch in batches:
        narrow = narrow + batch.sum()
    assert narrow < 0
    assert estimate.signs("0").item() == 1


# -- options -----------------------------------------------------------------------------------------------------
def test_rounds_give_the_same_for_less_memory(bert, ids):
    batches = [{"input_ids": i[None], "labels": torch.tensor([n % 2])} for n, i in enumerate(ids)]
    targets = ["query", "value", "intermediate.dense"]
    one, three = (estimate_update(bert, iter(batches), targets=targets, samples=3, rounds=r, **OPTIONS) for r in (1, 3))
    assert one.packed.keys() == three.packed.keys()
    assert all(torch.equal(one.packed[n], three.packed[n]) for n in one.packed)
    assert three.peak_bytes["cpu"] < 0.6 * one.peak_bytes["cpu"]


def test_training_mode_is_an_option(mlp):
    class Noisy(MLP):
        modes = []

        def forward(self, x):
            self.modes.append(self.training)
            return super().forward(x)

    model = Noisy().train()
    for training in (False, True):
        estimate_update(
            model, [torch.randn(2, 7)], targets=["up"], loss=mean_square, samples=2, training=training, **OPTIONS
        )
    assert Noisy.modes == [False, True]


def test_total_steps_default_is_the_loaders_length_times_epochs(mlp):
    options = {"targets": ["up"], "loss": mean_square, "samples": 2, "progress": False}
    estimate = estimate_update(mlp, [torch.randn(2, 7)] * 50, lr=1e-3, warmup_ratio=0.06, epochs=30, **options)
    assert estimate.eta == pytest.approx(1e-3 / (0.06 * 50 * 30))
    with pytest.raises(fg.SpecError, match="total_steps"):
        estimate_update(mlp, iter([torch.randn(2, 7)]), lr=1e-3, **options)
    with pytest.warns(UserWarning, match="shorter than one step"):
        estimate_update(mlp, [torch.randn(2, 7)], lr=1e-3, warmup_ratio=0.02, **options)


def test_too_few_samples_are_a_warning(mlp):
    with pytest.warns(UserWarning, match="5 samples were asked for, batches had 2"):
        found = estimate_update(mlp, [torch.randn(2, 7)], targets=["up"], loss=mean_square, samples=5, **OPTIONS)
    assert found.samples == 2


def test_the_result_starts_lora_sb(bert, ids):
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 0])}
    estimate = estimate_update(bert, [batch], targets="all-linear", samples=3, lr=1e-3, total_steps=50, progress=False)
    adapted = fg.rewrite(bert, fg.Spec(LoRASB(rank=4)), update=estimate)
    with torch.no_grad():
        before, after = bert(**batch).loss, adapted(**batch).loss
    assert after < before, "one step against the gradient"


def test_every_form_of_a_model():
    model, batches = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 3)), pairs(4)
    spec, x = fg.Spec(LoRASB(rank=2), targets=["0", "2"]), batches[0][0]
    options = {"targets": ["0", "2"], "loss": weighted, "forward": first, "samples": 4, **OPTIONS}
    plain = estimate_update(model, batches, **options)
    program = torch.export.export(model, (x,), strict=False)
    for form in (torch.fx.symbolic_trace(model), program):
        found = estimate_update(form, batches, **options)
        assert found.shapes == plain.shapes
        assert all(torch.equal(found.signs(n), plain.signs(n)) for n in plain.shapes)
        adapted = fg.rewrite(form, spec, update=found)
        run = adapted.module() if form is program else adapted
        assert relative_error(run(x), fg.rewrite(model, spec, update=plain)(x)) < 1e-5


# -- nothing is touched ------------------------------------------------------------------------------------------
class Boom(Exception):
    pass


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(3, 6)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    values = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    calls = []

    def loss(output, batch):
        calls.append(1)
        if fail and len(calls) == 2:
            raise Boom
        return output.square().mean()

    def run():
        return estimate_update(
            model, [torch.randn(4, 7)] * 3, targets=["0", "3"], loss=loss, samples=12, training=True, **OPTIONS
        )

    if fail:
        with pytest.raises(Boom):
            run()
    else:
        assert run().signs("0").any()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model[3].weight.grad, torch.ones(3, 6))
    assert all(p.grad is None for p in parameters if p is not model[3].weight)
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


# -- memory ------------------------------------------------------------------------------------------------------
class Deep(nn.Module):
    def __init__(self, layers=12, width=160):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def allocation_peak(function):
    """Most bytes allocated on the CPU above the start, from the allocator's own record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_memory_stays_far_below_the_full_gradients():
    model, x = Deep(), torch.randn(2, 160)
    one = 160 * 160 * 4

    def plain():
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    found = []

    def ours():
        found.append(
            estimate_update(model, [x], targets="all-linear", loss=mean_square, samples=2, rounds=12, **OPTIONS)
        )

    assert allocation_peak(plain) > 12 * one
    peak = allocation_peak(ours)
    assert peak < 5 * one, "one sum, one gradient, and the signs"
    (estimate,) = found
    assert estimate.full_bytes == 12 * one
    assert 2 * one <= estimate.peak_bytes["cpu"] <= peak
    assert "12 sites, 2 samples" in str(estimate)
    assert f"{estimate.peak_bytes['cpu'] / 1e6:.1f} MB on cpu" in str(estimate)


# -- several processes -------------------------------------------------------------------------------------------
WORKER = """
    import sys, torch, torch.distributed as dist, torch.nn as nn
    from fxgraft.passes.methods.lora_sb.estimate import estimate_update
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(2, 4, 7)
    options = dict(targets=["0", "2"], samples=7, lr=0.1, total_steps=50)
    found = estimate_update(model, [data[rank]], loss=lambda y, b: y.square().mean(), **options)
    torch.save({"samples": found.samples, **{n: found.signs(n) for n in ("0", "2")}}, f"{folder}/{rank}.pt")

    def fails_in_one(output, batch):
        if rank == 1:
            raise ValueError("this process alone")
        return output.square().mean()

    try:
        estimate_update(model, [data[rank]], loss=fails_in_one, **options)
    except Exception as error:
        print(type(error).__name__, error)
    dist.destroy_process_group()
"""


def test_two_processes_reduce_before_the_sign_and_fail_together(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    running = [
        subprocess.Popen([sys.executable, script, str(r), tmp_path], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        for r in range(2)
    ]
    waiting, failed = (p.communicate(timeout=300)[0] for p in running)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    data = torch.randn(2, 4, 7)
    together, alone = (
        estimate_update(model, b, targets=["0", "2"], loss=mean_square, samples=n, **OPTIONS)
        for b, n in (([data[0], data[1][:3]], 7), ([data[0]], 4))
    )
    results = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert [r["samples"] for r in results] == [7, 7]
    for name in ("0", "2"):
        assert all(torch.equal(r[name], together.signs(name)) for r in results)
    assert any(not torch.equal(together.signs(n), alone.signs(n)) for n in ("0", "2")), "the other process counts"
    assert failed.startswith("ValueError this process alone")
    assert waiting.startswith("SpecError") and "1 other process" in waiting, "it is told, not left waiting"
