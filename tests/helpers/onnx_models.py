"""Small random models with adapters that have an effect, for the ONNX tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

import fxgraft as fg

TOLERANCE = 1e-5  # of an output's largest value; float32 over two layers differs by about 3e-7


class Classifier(nn.Module):
    """Two linears and a head whose bias is zero, as fresh heads are."""

    def __init__(self, bias: float = 0.0):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 11), nn.Linear(11, 5, bias=False), nn.Linear(5, 3)
        nn.init.constant_(self.head.bias, bias)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        hidden = self.down(torch.nn.functional.gelu(self.up(x))) * scale
        return {"scores": self.head(hidden), "hidden": hidden}


class Fused(nn.Module):
    """One weight for three products."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(q * k + v)


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier().eval()


def bert(layers: int = 1) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, vocab_size=100,
        max_position_embeddings=32, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=100, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(1, length - 2) :] = 0  # one real token at least: a row with none is undefined
    return {"input_ids": ids, "attention_mask": mask}


def graft(
    model: nn.Module, targets: list, rank: int = 4, train: tuple[str, ...] = (), seed: int = 1, name: str = "default"
) -> nn.Module:
    """A LoRA with random values in all its tensors and in the modules it trains."""
    method = fg.LoRA(rank=rank, alpha=2 * rank)
    return stir(fg.rewrite(model, fg.Spec(method, targets=targets, train=list(train)), name=name), seed)


def stir(adapted: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return adapted.eval()


def difference(got, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    want = want.detach().double()
    return float((torch.from_numpy(got).double() - want).abs().max() / want.abs().max())


def unwritable(folder: Path) -> Path:
    """A folder nothing can be created in, for root too."""
    if os.geteuid() == 0:
        return Path("/proc")
    folder.chmod(0o500)
    return folder
