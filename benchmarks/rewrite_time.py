"""How long it takes to graft adapters on every linear of Llama-3-70B, against HF PEFT, and what they hold in memory.

The model is its structure only, on the meta device: 80 blocks, 560 linears, no weights. PEFT changes the model it is
given and gets a fresh one each time, built outside the time; fxgraft leaves its input as it was.
"""

from __future__ import annotations

import copy
import gc
import tracemalloc
from collections.abc import Callable

import harness
import peft
import subjects
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxgraft as fg

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
UNILORA_RANK = 4
UNILORA_LENGTH = 524_288


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def peft_lora(model: nn.Module) -> nn.Module:
    """With PEFT's option for models without weights: otherwise it fills the factors on the CPU and throws them away."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(LINEARS))
    return subjects.peft_model(model, config, low_cpu_mem_usage=True)


def peft_inject(model: nn.Module) -> nn.Module:
    """PEFT's other entrance, which leaves out its wrapper."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=list(LINEARS))
    return peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)


def fxgraft_lora(model: nn.Module) -> nn.Module:
    return fg.rewrite(model, fg.Spec(fg.LoRA(rank=RANK, alpha=16), targets=list(LINEARS)))


def fxgraft_unilora(model: nn.Module) -> nn.Module:
    method = fg.UniLoRA(rank=UNILORA_RANK, vector_length=UNILORA_LENGTH)
    return fg.rewrite(model, fg.Spec(method, targets=list(LINEARS)))


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def python_memory(make: Callable[[nn.Module], nn.Module], model: nn.Module) -> tuple[float, float]:
    """MiB of Python objects the result holds, and at the peak. Tracing is slow, so this is no timed round."""
    gc.collect()
    tracemalloc.start()
    try:
        result = make(model)
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    return held / 2**20, peak / 2**20


def living_storages() -> dict[int, int]:
    """Address -> bytes of every tensor storage that is alive and holds memory."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def resident(base: nn.Module, make: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, int]:
    """The adapted model and the bytes of tensors it holds beyond the base, wherever they are kept."""
    before = living_storages()
    adapted = make(base)
    after = living_storages()
    return adapted, sum(size for address, size in after.items() if address not in before)


def memory_facts(report: harness.Report, quick: bool) -> None:
    """Bytes of tensors per parameter of the LoRA factors, on a model that has weights."""
    base = subjects.bert(2, 256) if quick else subjects.bert()
    width = base.config.hidden_size
    targets = list(subjects.ALL_LINEAR)
    rank = subjects.UNILORA_RANK
    length = 4096 if quick else subjects.UNILORA_LENGTH
    linears = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(targets))
    ]
    virtual = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "fxgraft": lambda model: fg.rewrite(
            model, fg.Spec(fg.UniLoRA(rank=rank, vector_length=length), targets=targets)
        ),
        "PEFT": lambda model: subjects.peft_model(
            model, peft.UniLoraConfig(r=rank, theta_d_length=length, target_modules=targets)
        ),
    }
    report.console.print(
        f"Uni-LoRA on all {len(linears)} linears of a BERT {width} wide: {virtual:,} virtual parameters, "
        f"vector of {length:,}",
        highlight=False,
    )
    for library, make in makers.items():
        adapted, extra = resident(copy.deepcopy(base), make)
        beyond = extra - 4 * length  # the vector itself is what is trained
        report.fact(
            f"unilora_bytes_per_virtual_parameter_{library}",
            beyond / virtual,
            f"  {library}: {beyond / virtual:.2f} bytes per virtual parameter besides the vector",
        )
        del adapted


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], rounds=15, quick_rounds=3)
    options = parser.parse_args()
    report = harness.start("rewrite_time", options)

    layers = 4 if options.quick else 80
    model = llama(layers)
    count = trainable(peft_lora(llama(layers)))
    ours = trainable(fxgraft_lora(model))
    if ours != count:
        raise RuntimeError(f"not the same adapter: {ours:,} trainable parameters, {count:,} in PEFT")
    note = f"{count:,} trainable"
    candidates = [
        harness.Candidate("PEFT LoRA", peft_lora, prepare=lambda: llama(layers), note=note),
        harness.Candidate("PEFT LoRA, inject", peft_inject, prepare=lambda: llama(layers), note=note),
        harness.Candidate("fxgraft LoRA", lambda: fxgraft_lora(model), beside="PEFT LoRA", note=note),
        harness.Candidate("fxgraft Uni-LoRA", lambda: fxgraft_unilora(model), note=f"{UNILORA_LENGTH:,} trainable"),
    ]
    report.add(
        harness.measure(
            f"Grafting: Llama-3-70B structure, {layers} blocks, meta device, all linears, rank {RANK}",
            candidates,
            "PEFT LoRA",
            rounds=options.rounds,
            warmup=1,
            remarks=["PEFT's Uni-LoRA is left out: it draws and shuffles all indices even without weights."],
        )
    )
    for name, make in {"PEFT": peft_lora, "fxgraft": fxgraft_lora}.items():
        held, peak = python_memory(make, llama(layers))
        report.fact(
            f"python_mib_{name}",
            {"held": held, "peak": peak},
            f"  {name}: Python objects of the adapted model {held:.1f} MiB, peak while grafting {peak:.1f} MiB",
        )
    report.console.print()
    memory_facts(report, options.quick)


if __name__ == "__main__":
    main()
