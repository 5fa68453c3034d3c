"""A quality study: seven methods, one budget, three seeds, learning rates tuned alike. See README.md beside this file.

    python benchmarks/quality/study.py

Every finished run is a line of `results.jsonl` in the --out folder; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

import charts  # noqa: E402
import harness  # noqa: E402
import quickstart  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import transformers  # noqa: E402
from assets import AssetError, minilm_dir  # noqa: E402
from contenders import CONTENDERS, FULL, Contender, Run, Search  # noqa: E402
from records import Results, best, learning_rate, next_candidate  # noqa: E402
from rich.console import Console  # noqa: E402

import fxgraft as fg  # noqa: E402

console = Console(highlight=False, width=None if Console().is_terminal else 160)


SEARCH = Search(generations=4, population=8, headlines=200)
TUNING_SEARCH = Search(generations=1, population=4, headlines=200)


@dataclass(frozen=True)
class Settings:
    """The protocol's sizes. A results file belongs to one of these."""

    train: int = 1920
    epochs: int = 1
    validation: int = 400
    test: int = 1000
    batch: int = 16
    head_lr: float = 1e-2
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seeds: tuple[int, ...] = (0, 4)
    search: Search = SEARCH
    tuning_search: Search = TUNING_SEARCH


QUICK = Settings(
    train=64, validation=40, test=40, batch=8, seeds=(1, 2), tuning_seeds=(0,),
    search=Search(2, 4, 20), tuning_search=Search(1, 2, 20),
)  # fmt: skip


class Study:
    """The runs that are still missing: first all learning rates, then seed by seed."""

    def __init__(self, settings: Settings, results: Results) -> None:
        self.settings, self.results = settings, results
        self.folder = minilm_dir()
        sizes = [settings.test, settings.validation, settings.train]
        self.test, self.validation, self.train = quickstart.read_headlines(self.folder, sizes)

    def run(self, contenders: Sequence[Contender]) -> None:
        """Do all of it."""
        for contender in contenders:
            self.tune(contender)
        for seed in self.settings.seeds:
            for contender in contenders:
                if not self.results.of("final", method=contender.key, seed=seed):
                    self.final(contender, seed)

    def probe(self) -> None:
        """What the frozen features are worth: a logistic regression on them, which needs no training of the model."""
        if not self.results.of("probe"):
            base = training.fresh_base(self.folder, self.settings.tuning_seeds[0])
            accuracy, c = quickstart.frozen_baseline(base, self.train, self.validation, self.test)
            self.results.append("probe", accuracy=accuracy, c=c)

    def once(self, contender: Contender, lr: float, seed: int, *, tuning: bool) -> training.Outcome:
        """One training run. Where only the head trains, the tuned learning rate is the head's."""
        s = self.settings
        search = s.tuning_search if tuning else s.search
        run = Run(seed, lr, training.steps(self.train, s.batch, s.epochs), self.train, self.validation, search)
        head_lr = lr if contender.key == "head" else s.head_lr
        return training.run_once(contender, self.folder, run, head_lr=head_lr, batch_size=s.batch, epochs=s.epochs)

    def tune(self, contender: Contender) -> None:
        """Try learning rates on the tuning seeds until the best is between two others."""
        while (k := self.next_run(contender)) is not None:
            half_decades, seed = k
            began = time.perf_counter()
            out = self.once(contender, learning_rate(half_decades), seed, tuning=True)
            accuracy, loss = training.score(out.model, self.validation)
            finite = loss if math.isfinite(loss) else None
            seconds = time.perf_counter() - began
            self.results.append(
                "tuning", method=contender.key, half_decades=half_decades, seed=seed, accuracy=accuracy, loss=finite,
                seconds=seconds,
            )  # fmt: skip
            console.print(
                f"tuning {contender.title:<17} lr {learning_rate(half_decades):.1e} seed {seed}: validation accuracy "
                f"{accuracy:.3f}, loss {loss:.3f}, {seconds:.0f} s"
            )

    def next_run(self, contender: Contender) -> tuple[int, int] | None:
        """The learning rate, in half decades, and the seed of the next tuning run."""
        tried = {line["half_decades"] for line in self.results.of("tuning", method=contender.key)}
        for candidate in sorted(tried):  # one that a stop left without some of its seeds
            for seed in self.settings.tuning_seeds:
                if not self.results.of("tuning", method=contender.key, half_decades=candidate, seed=seed):
                    return candidate, seed
        candidate = next_candidate(contender.grid, self.results.losses(contender.key))
        return None if candidate is None else (candidate, self.settings.tuning_seeds[0])

    def final(self, contender: Contender, seed: int) -> None:
        """Train with the tuned learning rate and score on the test headlines, once."""
        k = best(self.results.losses(contender.key))
        out = self.once(contender, learning_rate(k), seed, tuning=False)
        accuracy, loss = training.score(out.model, self.test)
        self.results.append(
            "final", method=contender.key, seed=seed, half_decades=k, accuracy=accuracy, loss=loss,
            parameters=out.parameters, supernet=out.supernet,
            bytes=out.bytes, train_seconds=out.train_seconds, other_seconds=out.other_seconds,
        )  # fmt: skip
        console.print(
            f"seed {seed} {contender.title:<17} test accuracy {accuracy:.3f}, trained in {out.train_seconds:.0f} s "
            f"(+ {out.other_seconds:.0f} s before and after)"
        )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/quality"), help="folder of results.jsonl and the plot")
    parser.add_argument("--report", action="store_true", help="table and plot of the results there are; no run")
    parser.add_argument("--quick", action="store_true", help="tiny and meaningless: shows that everything runs")
    parser.add_argument("--full", action="store_true", help="full fine-tuning too, for reference; the slowest row")
    parser.add_argument("--threads", type=quickstart.positive, default=1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then print the table and draw the plot."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = Results(options.out / "results.jsonl")
    if not options.report:
        settings = QUICK if options.quick else Settings()
        results.begin(asdict(settings), harness.environment())
        study = Study(settings, results)
        study.run(CONTENDERS)
        study.probe()
        if options.full:
            study.run((FULL,))
    if not results.of("final"):
        raise SystemExit(f"{results.path} has no finished run to report: run without --report, or give another --out.")
    console.print(charts.table(results))
    for line in charts.notes(results):
        console.print(line)
    charts.plot(results, options.out / "quality.png")
    console.print(f"plot: {options.out / 'quality.png'}")


if __name__ == "__main__":
    try:
        main()
    except (AssetError, fg.FxgraftError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
