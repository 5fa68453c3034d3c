"""One run: a fresh base and head, the contender's adapter, training, and what came out."""

from __future__ import annotations

import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import contenders
import quickstart
import torch
import transformers
from contenders import HEAD, Contender, Run
from quickstart import Headlines
from torch import nn
from torch.nn.functional import cross_entropy

import fxgraft as fg

# HF Trainer's default. Without it a rate tuned on one seed let LoRA collapse on another.
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Outcome:
    """The finished model of a run.

    Attributes:
        parameters: trained numbers of the model that is scored, without the head.
        supernet: trained numbers during training, without the head; more than `parameters` where a search chose.
        bytes: of what is kept beside the base: the saved folder with the head, or the trained weights of a reference.
        train_seconds: the training loop alone.
        other_seconds: before and after it: estimating, decomposing, searching.
    """

    model: nn.Module
    parameters: int
    supernet: int
    bytes: int
    train_seconds: float
    other_seconds: float


def fresh_base(folder: Path, seed: int) -> nn.Module:
    """The pretrained model with a head for 2 classes, which depends on the seed alone."""
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()


def trained(model: nn.Module, *, with_head: bool = False) -> int:
    """How many numbers train."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and (with_head or not n.startswith(f"{HEAD}.")))


def steps(train: Headlines, batch_size: int, epochs: int) -> int:
    """The optimizer's steps of a run."""
    return math.ceil(len(train) / batch_size) * epochs


def run_once(contender: Contender, folder: Path, run: Run, *, head_lr: float, batch_size: int, epochs: int) -> Outcome:
    """Train a contender: AdamW without decay, warm-up, then linear to zero; the last step's weights are kept."""
    base = fresh_base(folder, run.seed)
    model, before = contenders.timed(contender.build, base, run)
    supernet = trained(model)
    seconds = train_model(model, run, head_lr, batch_size, epochs)
    model, after = contenders.timed(contender.finish, model, run)
    return Outcome(model, trained(model), supernet, stored_bytes(model, contender), seconds, before + after)


def train_model(model: nn.Module, run: Run, head_lr: float, batch_size: int, epochs: int) -> float:
    """Train what requires grad and return the seconds it took."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name.startswith(f"{HEAD}.")], "lr": head_lr},
        {"params": [p for name, p in named if not name.startswith(f"{HEAD}.")], "lr": run.lr},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: quickstart.warmup_then_linear(s, run.steps))
    lengths = [len(tokens) for tokens in run.train.tokens]
    rng = random.Random(run.seed)
    torch.manual_seed(run.seed)  # dropout and GLoRA's draws: the same stream whatever the initialisation drew
    model.train()
    began = time.perf_counter()
    for _ in range(epochs):
        for rows in quickstart.training_batches(lengths, batch_size, rng):
            loss = cross_entropy(model(**run.train.batch(rows)).logits, run.train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for _, p in named], MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
    return time.perf_counter() - began


def stored_bytes(model: nn.Module, contender: Contender) -> int:
    """Size on disk of the adapter with the head; a reference has no adapter and keeps what it trained."""
    if contender.reference:
        return 4 * trained(model, with_head=True)
    with tempfile.TemporaryDirectory() as folder:
        return quickstart.folder_bytes(Path(fg.save_adapter(model, Path(folder) / "adapter")))


def score(model: nn.Module, data: Headlines) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    logits = quickstart.collect(quickstart.torch_predict(model), data)
    return quickstart.accuracy(logits, data.labels), cross_entropy(logits, data.labels).item()
