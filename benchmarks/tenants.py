"""Many tenants in one batch: `fg.bank`, compiled, against the base without adapters and PEFT's `adapter_names`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
import peft
import subjects
import torch
from torch import Tensor

import fxgraft as fg

TENANTS = 32


def _run(model: Callable[..., Any], inputs: Tensor, **keywords: Any) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=inputs, **keywords).last_hidden_state

    return call


def measure(report: harness.Report, *, quick: bool) -> None:
    """A batch with a sample of every tenant, at 1, 16 and 128 tokens. PEFT's mixed batches run eagerly only."""
    layers, width, count = (2, 256, 4) if quick else (4, 768, TENANTS)
    base = subjects.bert(layers, width)
    targets = list(subjects.ALL_LINEAR)
    method = fg.LoRA(rank=subjects.LORA_RANK, alpha=16)
    one = subjects.rewritten(base, method, subjects.ALL_LINEAR)
    states = {}
    for index in range(count):
        torch.manual_seed(index)
        states[f"t{index}"] = {key: torch.randn_like(value) * 1e-2 for key, value in fg.adapter_state(one).items()}
    banked = fg.bank(one, states)
    names = list(states)
    ids = fg.adapter_ids(banked, names)

    config = peft.LoraConfig(r=subjects.LORA_RANK, lora_alpha=16, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    theirs.eval()

    for tokens in (1, 16, 128):
        torch._dynamo.reset()
        inputs = subjects.embeddings(count, tokens, width)
        frozen = subjects.frozen(base)
        compiled_base, compiled_bank = torch.compile(frozen), fg.compile(banked)

        candidates = [
            harness.Candidate("compiled base", _run(compiled_base, inputs)),
            harness.Candidate("fxgraft bank, compiled", _run(compiled_bank, inputs, adapter_ids=ids)),
            harness.Candidate("base, eager", _run(frozen, inputs)),
            harness.Candidate(
                "fxgraft bank, eager", _run(banked, inputs, adapter_ids=ids), beside="PEFT adapter_names"
            ),
            harness.Candidate("PEFT adapter_names", _run(theirs, inputs, adapter_names=names)),
        ]
        title = f"{count} tenants in a batch of {count}, LoRA r{subjects.LORA_RANK} on all linears, {tokens} token(s)"
        rounds = report.options["rounds"] if tokens < 128 else max(3, report.options["rounds"] // 4)
        report.add(harness.measure(title, candidates, "compiled base", rounds=rounds, warmup=2))
    bytes_ = fg.explain(banked).bytes
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    report.fact("bank bytes", bytes_, f"the bank of {count}: {bytes_ / 1e6:.1f} MB beside {base_bytes / 1e6:.1f} MB")
