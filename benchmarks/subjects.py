"""What is measured: a BERT of base width, and the adapters of fxgraft and of HF PEFT on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fxgraft as fg

QUERY_VALUE = ("query", "value")
ALL_LINEAR = ("query", "key", "value", "dense")  # every linear of a BertModel without pooler
SHAPES = ((8, 128), (1, 16))

LORA_RANK = 8
UNILORA_RANK = 4
UNILORA_LENGTH = 23_040


@dataclass(frozen=True)
class Subject:
    """One model of a comparison. `beside` is the subject that does the same in PEFT."""

    name: str
    model: nn.Module
    beside: str | None = None

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def bert(layers: int = 4, width: int = 768) -> BertModel:
    """Random weights: the time does not depend on them. No dropout, whose cost would dilute every ratio."""
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=1000,  # the embedding is not measured: inputs are given behind it
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).eval()


def peft_model(base: nn.Module, config: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a model without a name on the hub
        return peft.get_peft_model(base, config, **options)


#: the methods beside LoRA and Uni-LoRA; GLoRA by its paths, since they cost differently
STRUCTURED = {
    "fxgraft LoRA-XS r32": fg.LoRAXS(rank=32),
    "fxgraft PRoLoRA r8": fg.PRoLoRA(rank=8, unshared=1, a_chunks=7, b_chunks=7),
    "fxgraft HydraLoRA r4 N3": fg.HydraLoRA(rank=4, experts=3),
    "the same, dropout 0.05": fg.HydraLoRA(rank=4, experts=3, dropout=0.05),
    "fxgraft GLoRA, A low-rank": fg.GLoRA(4, fg.GLoRAPath(A="lora", B="lora", C="lora", D="vector", E="vector")),
    "fxgraft GLoRA, A by rows": fg.GLoRA(4, fg.GLoRAPath(A="vector", B="lora", C="lora", D="vector", E="vector")),
    "fxgraft GLoRA supernet": fg.GLoRA(4),
}


def structured(base: nn.Module, targets: tuple[str, ...]) -> list[Subject]:
    """The other methods, and PEFT's GLoRA. LoRA-SB is LoRA-XS's operator with other values."""
    subjects = [
        Subject(name, fg.rewrite(copy.deepcopy(base), fg.Spec(method, targets=list(targets))).eval())
        for name, method in STRUCTURED.items()
    ]
    glora = peft_model(copy.deepcopy(base), peft.GloraConfig(r=4, target_modules=list(targets))).eval()
    return [*subjects, Subject("PEFT GLoRA", glora)]


#: what `compiled.py` serves and trains beside LoRA and Uni-LoRA, at comparable ranks
SERVED = {
    "fxgraft LoRA-XS r8": fg.LoRAXS(rank=8),
    "fxgraft PRoLoRA r8": fg.PRoLoRA(rank=8, unshared=1, a_chunks=7, b_chunks=7),
    "fxgraft HydraLoRA r4 N3": fg.HydraLoRA(rank=4, experts=3),
}
GLORA_PATH = fg.GLoRAPath(A="lora", B="lora", C="lora", D="vector", E="vector")


def rewritten(
    base: nn.Module,
    method: fg.LoRA | fg.LoRAXS | fg.PRoLoRA | fg.HydraLoRA | fg.GLoRA | fg.UniLoRA,
    targets: tuple[str, ...],
) -> nn.Module:
    """An adapted copy of the base whose deltas are not zero."""
    adapted = fg.rewrite(copy.deepcopy(base), fg.Spec(method, targets=list(targets))).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return adapted


def adapters(base: nn.Module, targets: tuple[str, ...], length: int = UNILORA_LENGTH) -> list[Subject]:
    """Both methods in both libraries, each on its own copy of the base: shared weights would favour the second caller
    of a pair, which finds them in the cache."""
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        f"PEFT LoRA r{LORA_RANK}": lambda model: peft_model(
            model, peft.LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=list(targets))
        ),
        f"fxgraft LoRA r{LORA_RANK}": lambda model: fg.rewrite(
            model, fg.Spec(fg.LoRA(rank=LORA_RANK, alpha=16), targets=list(targets))
        ),
        "PEFT Uni-LoRA": lambda model: peft_model(
            model,
            peft.UniLoraConfig(r=UNILORA_RANK, theta_d_length=length, target_modules=list(targets)),
        ),
        "fxgraft Uni-LoRA": lambda model: fg.rewrite(
            model, fg.Spec(fg.UniLoRA(rank=UNILORA_RANK, vector_length=length), targets=list(targets))
        ),
    }
    subjects = []
    for name, make in makers.items():
        beside = name.replace("fxgraft", "PEFT") if name.startswith("fxgraft") else None
        subjects.append(Subject(name, make(copy.deepcopy(base)).eval(), beside))
    trainable = {subject.name: subject.trainable for subject in subjects}
    for subject in subjects:
        if subject.beside and subject.trainable != trainable[subject.beside]:
            raise RuntimeError(f"not the same adapter: trainable parameters are {trainable}")
    return subjects


def frozen(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base).requires_grad_(False)


def embeddings(batch: int, length: int, width: int = 768, requires_grad: bool = False) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, width).requires_grad_(requires_grad)


def forward(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    """An inference call."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=inputs).last_hidden_state

    return call


def training_step(model: nn.Module, inputs: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Forward, loss and backward, and what clears the gradients before the next step. No optimizer: its cost grows
    with the trainable parameters only and is the same for the same adapter."""

    def call() -> Tensor:
        loss = model(inputs_embeds=inputs).last_hidden_state.square().mean()
        loss.backward()
        return loss

    def clear() -> None:
        inputs.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return call, clear
