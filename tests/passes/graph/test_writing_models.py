"""Models that write while they run, through the passes: caches, routers, state-space scans, BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch
from mutating import PIPELINES, Compared
from small_models import perturb
from torch import nn

import fxgraft as fg

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 90,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
PASSES = {name: PIPELINES[name] for name in ("inference", "joined", "chosen")}
FAMILIES = {
    "deepseek_v3": ("DeepseekV3", {**SMALL, **LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
                    "topk_group": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    "mamba": ("Mamba", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 90, "expand": 2,
              "time_step_rank": 4}),
    "jamba": ("Jamba", {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 4,
              "mamba_dt_rank": 4}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def family(name):
    import transformers

    if name == "llama4":
        config = transformers.Llama4TextConfig(
            **SMALL, intermediate_size_mlp=48, head_dim=8, num_local_experts=4, num_experts_per_tok=1
        )
        return transformers.Llama4ForCausalLM(config).eval()
    prefix, settings = FAMILIES[name]
    return getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**settings)).eval()


@pytest.mark.parametrize("name", [*FAMILIES, "llama4"])
def test_routers_and_scans(name):
    # without a GPU's kernels Jamba multiplies by the weight of dt_proj and does not call it, in a branch
    exclude = ["dt_proj"] if name == "jamba" else []
    adapted = perturb(fg.rewrite(family(name), fg.Spec(fg.LoRA(rank=2), exclude=exclude))).eval()
    ids, backend = torch.randint(3, 90, (2, 8)), Compared(PASSES)
    with torch.no_grad():
        want = adapted(ids).logits
        got = torch.compile(adapted, backend=backend)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert backend.rewritten and backend.compared


def decode(model, adapted, prompt, steps):
    """Greedy tokens and logits of `steps` calls on a static cache; the first, of the prompt, runs in eager mode."""
    from transformers import StaticCache

    cache = StaticCache(config=adapted.config, max_cache_len=prompt.shape[1] + steps)
    tokens, logits = prompt, []
    given, place = prompt, torch.arange(prompt.shape[1])
    for step in range(steps):
        out = (model if step else adapted)(given, past_key_values=cache, cache_position=place, use_cache=True).logits[
            :, -1
        ]
        logits.append(out.clone())
        given, place = out.argmax(-1, keepdim=True), place[-1:] + 1
        tokens = torch.cat([tokens, given], 1)
    return tokens, torch.stack(logits)


@pytest.mark.parametrize("method", ["lora", "unilora"])
def test_a_llama_decodes_with_a_static_cache(llama, method):
    config = fg.LoRA(rank=2) if method == "lora" else fg.UniLoRA(rank=2, vector_length=200, init_bound=0.3)
    adapted = perturb(fg.rewrite(llama, fg.Spec(config))).eval()
    prompt, backend = torch.randint(3, 90, (2, 5)), Compared(PASSES)
    with torch.no_grad():
        tokens, logits = decode(adapted, adapted, prompt, 6)
        got_tokens, got = decode(torch.compile(adapted, backend=backend), adapted, prompt, 6)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(got_tokens, tokens)
    assert backend.rewritten and backend.compared


def test_a_llama_decodes_with_a_static_cache_through_inductor(llama):
    adapted = perturb(fg.rewrite(llama, fg.Spec(fg.LoRA(rank=2)))).eval()
    prompt = torch.randint(3, 90, (2, 5))
    with torch.no_grad():
        tokens, logits = decode(adapted, adapted, prompt, 4)
        got_tokens, got = decode(fg.compile(adapted), adapted, prompt, 4)
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(got_tokens, tokens)


class Convolutions(nn.Module):
    """BatchNorm that counts, a ReLU in place, and an adapted head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten())
        self.up, self.head = nn.Linear(8 * 36, 16), nn.Linear(16, 5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.act(self.up(self.body(x))))


@pytest.mark.parametrize("through", ["passes", "inductor"])
def test_batch_norm_counts_in_training(through):
    adapted = perturb(fg.rewrite(Convolutions(), fg.Spec(fg.LoRA(rank=2), targets=["up", "head"]))).train()
    twin = copy.deepcopy(adapted)
    compiled = fg.compile(adapted) if through == "inductor" else torch.compile(adapted, backend=Compared())
    for _ in range(2):
        x = torch.randn(6, 3, 8, 8)
        one, other = compiled(x), twin(x)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        one.square().sum().backward()
        other.square().sum().backward()
    for (name, a), (_, b) in zip(adapted.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), (_, b) in zip(adapted.named_parameters(), twin.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert int(dict(adapted.named_buffers())["body.1.num_batches_tracked"]) == 2
