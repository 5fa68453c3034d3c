"""What is compared: the seven methods at one budget of trained numbers, and what frames them.

All adapters sit on query and value of the 6 layers of MiniLM: 12 sites of 384 x 384. The classification head is trained
besides, by everyone alike, and is in no count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import quickstart
from quickstart import Headlines
from torch import nn
from torch.nn.functional import cross_entropy

import fxgraft as fg

TARGETS = ["query", "value"]
HEAD = "classifier"
BUDGET = 36_864  # LoRA of rank 4: 12 sites x 4 x (384 + 384)
WARMUP = quickstart.WARMUP
SB_SAMPLES = 50  # headlines that LoRA-SB's first update is estimated from
SB_BATCH = 10

#: Learning rates are half decades, `10 ** (k / 2)`: whole numbers are safe keys of a file that a study resumes from.
GRID = (-5, -4, -3)
FULL_GRID = (-9, -8, -7)  # all weights of a model move with smaller steps than the few of an adapter


@dataclass(frozen=True)
class Search:
    """How GLoRA's paths are searched: so many generations and candidates, scored on so many validation headlines."""

    generations: int
    population: int
    headlines: int


@dataclass(frozen=True)
class Run:
    """What a contender may need to know of the run it is built for. `steps` is the optimizer's number of steps."""

    seed: int
    lr: float
    steps: int
    train: Headlines
    validation: Headlines
    search: Search


Build = Callable[[nn.Module, Run], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        key: its name in the results file.
        title: its name in the table.
        config: what was chosen, for the table.
        build: makes the model to train from a base with a fresh head.
        finish: makes the model to score from the trained one.
        grid: the learning rates to try first, as half decades.
        reference: no adapter; drawn apart.
    """

    key: str
    title: str
    config: str
    build: Build
    finish: Build = lambda model, run: model
    grid: tuple[int, ...] = GRID
    reference: bool = False


def head(headlines: Headlines, count: int) -> Headlines:
    """The first few of the headlines."""
    return Headlines(headlines.texts[:count], headlines.tokens[:count], headlines.labels[:count])


def spec(method: object) -> fg.Spec:
    """The same sites and the same head for every method."""
    return fg.Spec(method, targets=TARGETS, train=[HEAD])


def plainly(method: object) -> Build:
    """Graft a method that needs to know nothing of the run."""
    return lambda base, run: fg.rewrite(base, spec(method))


def unilora(base: nn.Module, run: Run) -> nn.Module:
    """The projection is part of the initialisation, so it changes with the seed."""
    return fg.rewrite(base, spec(fg.UniLoRA(rank=8, vector_length=BUDGET, seed=run.seed)))


def lora_sb(base: nn.Module, run: Run) -> nn.Module:
    """LoRA-SB from the first update that full fine-tuning with this learning rate and schedule would make."""
    order = range(len(run.train))
    batches = [run.train.batch(rows) | {"labels": run.train.labels[rows]} for rows in _chunks(order)]
    estimate = fg.estimate_update(
        base, batches, targets=TARGETS, samples=min(SB_SAMPLES, len(run.train)), lr=run.lr, warmup_ratio=WARMUP,
        total_steps=run.steps, loss=lambda output, batch: cross_entropy(output.logits, batch["labels"]), progress=False,
    )  # fmt: skip
    return fg.rewrite(base, spec(fg.LoRASB(rank=55)), update=estimate)


def _chunks(order: range) -> list[list[int]]:
    few = list(order[:SB_SAMPLES])
    return [few[i : i + SB_BATCH] for i in range(0, len(few), SB_BATCH)]


def best_path(supernet: nn.Module, run: Run) -> nn.Module:
    """The supernet on the best paths within the budget, found on validation headlines; nothing is trained again."""
    judged = head(run.validation, run.search.headlines)

    def accuracy(model: nn.Module) -> float:
        return quickstart.accuracy(quickstart.collect(quickstart.torch_predict(model), judged), judged.labels)

    size = run.search.population
    found = fg.search_paths(
        supernet, accuracy, max_params=BUDGET, generations=run.search.generations, population=size,
        top=max(1, size // 5), mutations=size // 2, crossovers=size // 2, seed=run.seed, progress=False,
    )  # fmt: skip
    return fg.fix_paths(supernet, found.paths)


def head_only(base: nn.Module, run: Run) -> nn.Module:
    """Nothing but the head trains."""
    base.requires_grad_(False)
    base.get_submodule(HEAD).requires_grad_(True)
    return base


def everything(base: nn.Module, run: Run) -> nn.Module:
    """Full fine-tuning."""
    return base.requires_grad_(True)


# A method with an alpha gets alpha = 2 rank: the scale 2 is the same for all, and the learning rate does the rest.
CONTENDERS = (
    Contender("lora", "LoRA", "r 4", plainly(fg.LoRA(rank=4, alpha=8))),
    Contender("lora_xs", "LoRA-XS", "r 55", plainly(fg.LoRAXS(rank=55, alpha=110))),
    Contender("lora_sb", "LoRA-SB", "r 55", lora_sb),
    Contender("unilora", "Uni-LoRA", "r 8, one vector", unilora),
    Contender(
        "prolora", "PRoLoRA", "r 13, 1 unshared, 4 chunks",
        plainly(fg.PRoLoRA(rank=13, unshared=1, a_chunks=4, b_chunks=4, alpha=26)),
    ),
    Contender("hydralora", "HydraLoRA", "r 2, 2 experts", plainly(fg.HydraLoRA(rank=2, experts=2, alpha=4))),
    Contender("glora", "GLoRA", "r 4, searched paths", plainly(fg.GLoRA(rank=4)), best_path),
    Contender("head", "head only", "frozen base", head_only, reference=True),
)  # fmt: skip
FULL = Contender("full", "full fine-tuning", "all weights", everything, grid=FULL_GRID, reference=True)


def timed(step: Build, model: nn.Module, run: Run) -> tuple[nn.Module, float]:
    """A contender's step and the seconds it took."""
    began = time.perf_counter()
    return step(model, run), time.perf_counter() - began
