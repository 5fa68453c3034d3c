"""How many parameters each method trains on the models of its paper. No weights are loaded: everything is on meta.

    python examples/parameter_table.py

Every row grafts a method onto a model of the stated structure and counts; the last column is the published figure
(the papers' tables, or what their formulas give where a table rounds).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fxgraft as fg


class FusedViT(nn.Module):
    """The linears of a ViT with a fused qkv projection, as GLoRA's paper counts them (ViT-B: width 768, 12 blocks)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "fc1": nn.Linear(width, 4 * width),
                    "fc2": nn.Linear(4 * width, width),
                }
            )
            for _ in range(blocks)
        )


@functools.cache
def model(name: str) -> nn.Module:
    """A model of a published structure, without weights."""
    import transformers as t

    encoder = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}

    def sizes(size: str) -> dict[str, int]:
        width, layers, heads, inner = encoder[size]
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
        }

    def decoder(
        width: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, **more: int
    ) -> dict[str, int]:
        return {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            **more,
        }

    build = {
        "RoBERTa-base": lambda: t.RobertaModel(t.RobertaConfig(**sizes("base"))),
        "RoBERTa-large": lambda: t.RobertaModel(t.RobertaConfig(**sizes("large"))),
        "ViT-B": lambda: t.ViTModel(t.ViTConfig(**sizes("base"))),
        "ViT-L": lambda: t.ViTModel(t.ViTConfig(**sizes("large"))),
        "ViT-B, fused qkv": lambda: FusedViT(768, 12),
        "Llama-2-7B": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder(4096, 32, 32, 32, 11008, 32000))),
        "Llama-2-13B": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder(5120, 40, 40, 40, 13824, 32000))),
        "Llama-3.2-3B": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**decoder(3072, 28, 24, 8, 8192, 128256, head_dim=128))
        ),
        "Mistral-7B": lambda: t.MistralForCausalLM(t.MistralConfig(**decoder(4096, 32, 32, 8, 14336, 32000))),
        "Gemma-7B": lambda: t.GemmaForCausalLM(t.GemmaConfig(**decoder(3072, 28, 16, 16, 24576, 256000, head_dim=256))),
        "Gemma-2-9B": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**decoder(3584, 42, 16, 8, 14336, 256000, head_dim=256))
        ),
    }
    with torch.device("meta"):
        return build[name]()


@dataclass(frozen=True)
class Row:
    """One published count. For Uni-LoRA `virtual` is the number of LoRA parameters its vector stands for."""

    model: str
    method: fg.LoRA | fg.UniLoRA | fg.VeRA | fg.LoRASB | fg.PRoLoRA | fg.HydraLoRA | fg.GLoRA
    targets: tuple[str, ...]
    published: int
    virtual: int | None = None


ALL = ("all-linear",)
QV = ("re:.*(query|value|q_proj|v_proj)",)
MLP = ("gate_proj", "up_proj", "down_proj")
FOUR = ("query", "value", "attention.output.dense", "output.dense")

ROWS = (
    *(Row(f"RoBERTa-{s}", fg.UniLoRA(4, 23_040), QV, 23_040, v) for s, v in (("base", 147_456), ("large", 393_216))),
    Row("ViT-B", fg.UniLoRA(4, 72_000), QV, 72_000, 147_456),
    Row("ViT-L", fg.UniLoRA(4, 144_000), QV, 144_000, 393_216),
    Row("Gemma-7B", fg.UniLoRA(4, 524_288), ALL, 524_288, 12_500_992),
    Row("Mistral-7B", fg.UniLoRA(4, 524_288), ALL, 524_288, 10_485_760),
    Row("Llama-2-7B", fg.UniLoRA(4, 524_288), ALL, 524_288, 9_994_240),
    Row("Llama-2-13B", fg.UniLoRA(4, 1_048_576), ALL, 1_048_576, 15_646_720),
    *(
        Row(name, fg.LoRA(64), ALL, count)
        for name, count in (("Gemma-7B", 200_015_872), ("Llama-2-7B", 159_907_840), ("Llama-2-13B", 250_347_520))
    ),
    Row("RoBERTa-base", fg.VeRA(1024), QV, 43_008),
    Row("RoBERTa-large", fg.VeRA(256), QV, 61_440),
    *(Row("Llama-2-7B", fg.VeRA(r), ALL, n) for r, n in ((256, 1_417_216), (1024, 1_589_248))),
    Row("Llama-2-13B", fg.VeRA(1024), ALL, 2_416_640),
    *(Row("Mistral-7B", fg.LoRASB(r), ALL, n) for r, n in ((32, 229_376), (64, 917_504), (96, 2_064_384))),
    *(Row("Gemma-2-9B", fg.LoRASB(r), ALL, n) for r, n in ((32, 301_056), (64, 1_204_224), (96, 2_709_504))),
    *(Row("Llama-3.2-3B", fg.LoRASB(r), ALL, n) for r, n in ((32, 200_704), (64, 802_816), (96, 1_806_336))),
    *(Row("RoBERTa-large", fg.LoRASB(r), FOUR, n) for r, n in ((8, 6_144), (16, 24_576), (24, 55_296))),
    *(
        Row(name, fg.LoRA(32), ALL, count)
        for name, count in (("Mistral-7B", 83_886_080), ("Gemma-2-9B", 108_036_096), ("Llama-3.2-3B", 48_627_712))
    ),
    *(
        Row("Llama-2-7B", fg.PRoLoRA(r, u, m, m), ALL, n)
        for r, u, m, n in (
            (8, 1, 7, 4_999_520),
            (16, 4, 3, 19_992_064),
            (32, 4, 7, 19_998_080),
            (32, 7, 25, 19_991_520),
        )
    ),
    *(Row("Llama-2-7B", fg.LoRA(r), ALL, n) for r, n in ((8, 19_988_480), (16, 39_976_960))),
    Row("Llama-2-7B", fg.HydraLoRA(8, 3), QV, 8_388_608 + 786_432),
    Row("Llama-2-7B", fg.HydraLoRA(8, 10), QV, 23_068_672 + 2_621_440),
    Row("Llama-2-7B", fg.HydraLoRA(8, 3), MLP, 24_969_216 + 1_843_200),
    *(Row("ViT-B, fused qkv", fg.GLoRA(r), ALL, n) for r, n in ((2, 884_832), (4, 1_603_776), (8, 3_041_664))),
)


def count(row: Row) -> tuple[int, int | None]:
    """The trained parameters of a row, and for Uni-LoRA the virtual ones."""
    adapted = fg.rewrite(model(row.model), fg.Spec(row.method, row.targets))
    explanation = fg.explain(adapted)
    if not isinstance(row.method, fg.UniLoRA):
        return explanation.trainable, None
    indices = ("index_a", "index_b")
    virtual = sum(r.tensors[n][0] * r.tensors[n][1] for r in explanation.rows if r.kind == "site" for n in indices)
    return explanation.trainable, virtual


def main() -> None:
    table = Table(title="Trained parameters")
    for column in ("model", "method", "targets"):
        table.add_column(column, overflow="fold")
    for column in ("counted", "published", "virtual, counted", "published"):
        table.add_column(column, justify="right")
    for row in ROWS:
        trained, virtual = count(row)
        stand_in = ("", "") if virtual is None else (f"{virtual:,}", f"{row.virtual:,}")
        table.add_row(
            row.model, str(row.method), ", ".join(row.targets), f"{trained:,}", f"{row.published:,}", *stand_in
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
