"""Candidates of a path search: which paths a budget allows, and how they mutate and cross."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....rewriter.errors import AdapterError
from .path import CHOICES, PATHS, GLoRAPath

Genome = tuple[int, ...]  # an index into PATHS per site
_GENES = tuple(CHOICES)
_EXACT_WORK = 2e11  # bit operations the exact test of a budget may take: a few seconds
_TRIES = 50


class SearchSpace:
    """Which paths are within the budget, and how to come by them.

    Args:
        costs: for every site the parameters of each of the 432 paths.
        low, high: the floor and the cap on their sum.

    Raises:
        AdapterError: no choice of paths is within the budget.
    """

    def __init__(self, costs: Sequence[Sequence[int]], low: int, high: int | None) -> None:
        self.costs = np.asarray(costs, dtype=np.int64)
        least, most = int(self.costs.min(1).sum()), int(self.costs.max(1).sum())
        self.low, self.high = low, most if high is None else min(high, most)
        if low > most or self.high < least or self.low > self.high or not self._reachable():
            asked = f"at least {low:,}" + ("" if high is None else f" and at most {high:,}")
            raise AdapterError(
                f"no choice of paths has {asked} trainable parameters: the {len(self.costs)} site(s) have from "
                f"{least:,} to {most:,}, in the steps their tensors allow. "
                "Widen max_params / min_params or change the rank"
            )

    def _reachable(self) -> bool:
        """Whether some sum of the sites' costs is within the budget: all sums as the bits of one number."""
        options = [sorted(set(map(int, row))) for row in self.costs]
        if sum(map(len, options)) * self.high > _EXACT_WORK:
            return True  # too large for the exact test; a search that finds nothing says so
        sums, window = 1, (1 << (self.high + 1)) - 1
        for row in options:
            wider = 0
            for cost in row:
                wider |= sums << cost
            sums = wider & window
        return sums >> self.low != 0

    def params(self, genome: Genome) -> int:
        return int(self.costs[np.arange(len(genome)), list(genome)].sum())

    def random(self, rng: np.random.Generator) -> Genome:
        return self._repair([int(i) for i in rng.integers(0, len(PATHS), len(self.costs))], rng)

    def mutated(self, parent: Genome, p: float, rng: np.random.Generator) -> Genome:
        """Every tensor of every site is drawn anew with probability p."""
        children = []
        for index in parent:
            genes = {
                tensor: str(rng.choice(CHOICES[tensor])) if rng.random() < p else getattr(PATHS[index], tensor)
                for tensor in _GENES
            }
            children.append(GLoRAPath(**genes).index)
        return self._repair(children, rng)

    def crossed(self, one: Genome, other: Genome, rng: np.random.Generator) -> Genome:
        """Every tensor of every site comes from either parent."""
        children = []
        for pair in zip(one, other, strict=True):
            genes = {tensor: getattr(PATHS[pair[int(rng.integers(2))]], tensor) for tensor in _GENES}
            children.append(GLoRAPath(**genes).index)
        return self._repair(children, rng)

    def _repair(self, genome: list[int], rng: np.random.Generator) -> Genome:
        """Change random tensors, one at a time, until the budget holds: a tight one is hardly ever met by chance."""
        total = self.params(tuple(genome))
        for _ in range(2000 + 50 * len(genome)):
            if self.low <= total <= self.high:
                return tuple(genome)
            site, tensor = int(rng.integers(len(genome))), _GENES[int(rng.integers(len(_GENES)))]
            now = PATHS[genome[site]]
            options = [GLoRAPath(**{**_as_dict(now), tensor: choice}).index for choice in CHOICES[tensor]]
            costs = [int(self.costs[site, i] - self.costs[site, genome[site]]) for i in options]
            # steps that come out closer to the budget
            off = self._distance(total)
            better = [(i, d) for i, d in zip(options, costs, strict=True) if self._distance(total + d) < off]
            if not better and rng.random() < 0.05:  # leave a dead end
                better = list(zip(options, costs, strict=True))
            if better:
                index, change = better[int(rng.integers(len(better)))]
                genome[site] = index
                total += change
        raise AdapterError(
            f"found no paths with {self.low:,} to {self.high:,} trainable parameters: widen max_params / min_params"
        )

    def _distance(self, total: int) -> int:
        return max(self.low - total, total - self.high, 0)


def _as_dict(path: GLoRAPath) -> dict[str, str]:
    return {tensor: getattr(path, tensor) for tensor in _GENES}


@dataclass(frozen=True)
class Evolution:
    """How a candidate follows from the scored ones; the same seed and trials give the same candidate."""

    space: SearchSpace
    population: int
    top: int
    mutations: int
    crossovers: int
    p: float
    seed: int

    def propose(self, slot: int, scored: Sequence[tuple[Genome, float]]) -> Genome:
        """The candidate for place `slot` of the search, in generation `slot // population`. `scored` is in order."""
        rng = np.random.default_rng([self.seed, slot])
        generation, place = divmod(slot, self.population)
        seen = {genome for genome, _ in scored}
        before = dict(scored[: generation * self.population])
        parents = sorted(before, key=before.__getitem__, reverse=True)[: self.top]
        for _ in range(_TRIES):  # a small space runs out of new candidates
            if not parents or place >= self.mutations + self.crossovers:
                genome = self.space.random(rng)
            elif place < self.mutations:
                genome = self.space.mutated(parents[int(rng.integers(len(parents)))], self.p, rng)
            else:
                pair = rng.choice(len(parents), 2, replace=len(parents) < 2)
                genome = self.space.crossed(parents[int(pair[0])], parents[int(pair[1])], rng)
            if genome not in seen:
                break
        return genome
