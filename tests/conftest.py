"""Small models and helpers every test file uses. Seeds and thread counts are fixed."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class MLP(nn.Module):
    """Rectangular, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 11)
        self.down = nn.Linear(11, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


@pytest.fixture
def mlp():
    return MLP().eval()


@pytest.fixture
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=90, num_labels=2
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 90, (3, 9))


def perturb(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Give every trained tensor a value that shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def relative_error(value: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest deviation from a float64 oracle, relative to the oracle's largest entry."""
    oracle = oracle.detach().double()
    return ((value.detach().double() - oracle).abs().max() / oracle.abs().max()).item()
