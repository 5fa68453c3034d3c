"""Evolutionary search for the paths of a GLoRA supernet (arXiv 2306.07967, section 3.3).

The genes are 5 per site. The first generation is random; every later one mutates and crosses the best paths of all
generations before. optuna keeps the trials: with a storage of its own the search survives a stop and runs on several
processes or machines.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn

from ....rewriter.errors import AdapterError, FxgraftError
from .evolution import Evolution, Genome, SearchSpace
from .path import PATHS, GLoRAPath
from .supernet import get_paths, set_paths, supernet_sites


@dataclass(frozen=True)
class Generation:
    """One generation of a search: its best and mean score, the best score so far, and how many paths it scored."""

    index: int
    best: float
    mean: float
    best_so_far: float
    evaluations: int


@dataclass(frozen=True)
class PathSearch:
    """The result: the best paths by site, their score and trainable parameters, a `Generation` per generation."""

    paths: dict[str, GLoRAPath]
    score: float
    params: int
    history: tuple[Generation, ...]


def search_paths(
    supernet: nn.Module, evaluate: Callable[[nn.Module], float], *, max_params: int | None = None, min_params: int = 0,
    generations: int = 20, population: int = 50, top: int = 10, mutations: int | None = None,
    crossovers: int | None = None, p: float = 0.2, seed: int = 0, name: str = "default", storage: Any = None,
    study_name: str = "glora", progress: bool = True,
) -> PathSearch:  # fmt: skip
    """Find the paths with the best score among those within a budget of trainable parameters. Nothing is retrained.

    Args:
        supernet: a model with `GLoRA(path=None)` grafted in, trained. It gets its own paths and mode back at the end.
        evaluate: gets the supernet in eval mode with a candidate's paths set and returns a score, higher is better.
            Score on a validation split, never on the test split: the best of a thousand candidates is fitted to it.
        max_params, min_params: the cap and the floor on the parameters of the chosen paths (trained heads not counted).
        generations, population: 20 x 50 candidates in all, the first, random generation included.
        top: how many of the best so far are parents.
        mutations, crossovers: how many of a generation are made which way; the rest of it is random. None: half of the
            population each, or what the other leaves of it.
        p: probability that a mutation redraws a tensor's choice.
        seed: decides every candidate; a search that was stopped and goes on finds what an unbroken one finds.
        name: the supernet's adapter.
        storage: an optuna storage or its URL, e.g. `"sqlite:///search.db"`, or `optuna.storages.JournalStorage(...)`.
            The same call with the same storage goes on where it stopped. Several processes or machines with one
            storage share the work, each with its own copy of the supernet; they may score up to one candidate each
            beyond the total, and the candidates then depend on who finishes first. None keeps it in memory.
        study_name: of the search in the storage.
        progress: show a progress bar.

    Raises:
        AdapterError: no path is within the budget, a wrong argument, a score that is not finite, or a storage that
            holds a search with other settings. The first two before anything is evaluated.
        FxgraftError: optuna is not installed.
    """
    mutations, crossovers = _shares(population, mutations, crossovers)
    _check(generations, population, top, mutations, crossovers, p, min_params, max_params)
    sites = supernet_sites(supernet, name)
    costs = []
    for tensors in sites.values():
        site, rank = tensors.site, tensors.method.rank  # type: ignore[attr-defined]
        assert site is not None
        size = site.in_features, site.out_features, rank, site.bias is not None
        costs.append([path.parameters(*size) for path in PATHS])
    space = SearchSpace(costs, min_params, max_params)
    evolution = Evolution(space, population, top, mutations, crossovers, p, seed)
    settings = {
        "sites": list(sites), "costs": [max(c) for c in costs], "min_params": min_params, "max_params": max_params,
        "population": population, "top": top, "mutations": mutations, "crossovers": crossovers, "p": p, "seed": seed,
    }  # fmt: skip
    trials = _Trials(evolution, list(sites), storage, study_name, settings)

    total = generations * population
    before, training = get_paths(supernet, name), supernet.training
    modes = {module: module.training for module in supernet.modules()}
    try:
        columns = "[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[best]}"
        with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
            task = bar.add_task("searching paths", total=total, best="")
            while len(done := trials.scored()) < total:
                best = max((s for _, s in done), default=math.nan)
                bar.update(task, completed=len(done), best="" if math.isnan(best) else f"best {best:.4g}")
                trial, genome = trials.ask()
                known = dict(done)
                if genome in known:
                    trials.tell(trial, known[genome])
                    continue
                try:
                    set_paths(supernet, dict(zip(sites, (PATHS[i] for i in genome), strict=True)), name)
                    score = _score(supernet.eval(), evaluate)
                except BaseException:
                    trials.tell(trial, None)
                    raise
                trials.tell(trial, score)
            bar.update(task, completed=total, best=f"best {max(s for _, s in done):.4g}")
    finally:
        set_paths(supernet, before, name)
        supernet.train(training)
        for module, mode in modes.items():
            module.training = mode
    genome, score = max(done[:total], key=lambda pair: pair[1])
    paths = {site: PATHS[i] for site, i in zip(sites, genome, strict=True)}
    return PathSearch(paths, score, space.params(genome), _history(done[:total], population))


def _shares(population: int, mutations: int | None, crossovers: int | None) -> tuple[int, int]:
    """Half of the population each, unless said otherwise."""
    half = population // 2 if isinstance(population, int) else 0
    if mutations is None:
        mutations = half if crossovers is None else min(half, max(population - crossovers, 0))
    if crossovers is None:
        crossovers = min(half, max(population - mutations, 0))
    return mutations, crossovers


def _check(generations: int, population: int, top: int, mutations: int, crossovers: int, p: float, low: int,
           high: int | None) -> None:  # fmt: skip
    for what, value in {"generations": generations, "population": population, "top": top}.items():
        if not isinstance(value, int) or value < 1:
            raise AdapterError(f"search_paths({what}={value!r}): allowed are whole numbers from 1 up")
    if min(mutations, crossovers) < 0 or mutations + crossovers > population:
        raise AdapterError(f"search_paths({mutations=}, {crossovers=}): together at most the population, {population}")
    if not 0 < p <= 1:
        raise AdapterError(f"search_paths(p={p!r}): allowed are probabilities above 0 up to 1")
    if low < 0 or (high is not None and high < low):
        raise AdapterError(f"search_paths(min_params={low!r}, max_params={high!r}): allowed is 0 <= floor <= cap")


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    with torch.no_grad():
        score = float(evaluate(model))
    if not math.isfinite(score):
        raise AdapterError(f"search_paths: evaluate returned {score}; a score is a finite number, higher is better")
    if model.training:
        raise AdapterError("search_paths: evaluate left the model in training mode, where it draws random paths; "
                           "score it in eval mode")  # fmt: skip
    return score


def _history(scored: Sequence[tuple[Genome, float]], population: int) -> tuple[Generation, ...]:
    history: list[Generation] = []
    seen: set[Genome] = set()
    for start in range(0, len(scored), population):
        part = scored[start : start + population]
        scores = [score for _, score in part]
        so_far = max([max(scores), *(g.best_so_far for g in history[-1:])])
        new = {genome for genome, _ in part} - seen
        seen |= new
        history.append(Generation(len(history), max(scores), sum(scores) / len(scores), so_far, len(new)))
    return tuple(history)


class _Trials:
    """The scored candidates, in an optuna study: one integer parameter per site, the path's index."""

    def __init__(self, evolution: Evolution, sites: Sequence[str], storage: Any, study_name: str,
                 settings: dict[str, Any]) -> None:  # fmt: skip
        try:
            import optuna
        except ImportError as error:
            raise FxgraftError("search_paths keeps its trials in optuna: pip install 'fxgraft[search]'") from error
        self.evolution, self._states = evolution, optuna.trial.TrialState
        self._keys = [site or "(root)" for site in sites]
        space: dict[str, Any] = {key: optuna.distributions.IntDistribution(0, len(PATHS) - 1) for key in self._keys}
        trials = self

        class Sampler(optuna.samplers.BaseSampler):
            def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
                return space

            def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
                # candidates that others are scoring have their places; one that failed gives its place back
                states = (trials._states.COMPLETE, trials._states.RUNNING)
                taken = [t for t in study.get_trials(deepcopy=False, states=states) if t.number < trial.number]
                genome = trials.evolution.propose(len(taken), trials.scored())
                return dict(zip(trials._keys, genome, strict=True))

            def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
                raise AdapterError(f"the study has no site {param_name!r}")

        self._space = space
        with _quiet(optuna):
            self.study = optuna.create_study(
                storage=storage, study_name=study_name, direction="maximize", load_if_exists=True, sampler=Sampler()
            )
        settings = json.loads(json.dumps(settings))
        stored = self.study.user_attrs.get("fxgraft")
        if stored is None and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("fxgraft", settings)
        elif stored != settings:
            differs = sorted(k for k in settings if (stored or {}).get(k) != settings[k])
            raise AdapterError(
                f"the storage's study {study_name!r} is another search (it differs in {differs}): give another "
                "study_name, or the settings it was started with"
            )

    def scored(self) -> list[tuple[Genome, float]]:
        done = self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,))
        return [(tuple(t.params[key] for key in self._keys), t.values[0]) for t in done]

    def ask(self) -> tuple[Any, Genome]:
        trial = self.study.ask(self._space)
        return trial, tuple(trial.params[key] for key in self._keys)

    def tell(self, trial: Any, score: float | None) -> None:
        self.study.tell(trial, score, state=self._states.FAIL if score is None else self._states.COMPLETE)


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """optuna's own log lines would break the progress bar."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
