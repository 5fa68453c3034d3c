"""The results file, and the rules that need nothing but its lines: what to try next, what was best, mean and spread."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTENSIONS = 2  # so many candidates may follow where the best of a grid is at its edge


def learning_rate(half_decades: int) -> float:
    """`10 ** (half_decades / 2)`."""
    return 10 ** (half_decades / 2)


def best(losses: Mapping[int, float]) -> int:
    """The candidate with the lowest validation loss; of equal ones the smallest."""
    return min(sorted(losses), key=losses.__getitem__)


def next_candidate(grid: Sequence[int], losses: Mapping[int, float]) -> int | None:
    """The next learning rate to try, None when the tuning is done.

    First the grid, in order. Then, while the best candidate is the smallest or the largest one tried, the next one
    beyond it, up to EXTENSIONS of them: an optimum is only known when both of its neighbours are worse.
    """
    for candidate in grid:
        if candidate not in losses:
            return candidate
    if len(losses) - len(grid) >= EXTENSIONS:
        return None
    top = best(losses)
    return top - 1 if top == min(losses) else top + 1 if top == max(losses) else None


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; of a single value the deviation is not known."""

    mean: float
    deviation: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of the seeds' values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


class Results:
    """A study's lines: first its settings, then one line per finished run, written at once.

    Args:
        path: the file; it is made with its folder when the first line is written.

    Raises:
        SystemExit: the file holds a study with other settings than the ones given to `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # stopped within a line: that run is done again
                text = text[: text.rfind("\n") + 1]
                path.write_text(text, encoding="utf-8")
            self.lines = [json.loads(line) for line in text.splitlines()]

    def begin(self, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write the settings, or check that the file's are the same."""
        settings = json.loads(json.dumps(settings))
        if not self.lines:
            self.append("study", settings=settings, environment=dict(environment))
        elif self.settings != settings:
            differs = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
            raise SystemExit(
                f"{self.path} holds a study with other settings ({', '.join(differs)}): give another --out."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What the study was started with."""
        return self.lines[0]["settings"]

    @property
    def environment(self) -> dict[str, Any]:
        """Where it ran."""
        return self.lines[0]["environment"]

    def append(self, kind: str, **values: Any) -> None:
        """Add a line."""
        line = {"kind": kind, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def of(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """The lines of a kind that have the wanted values."""
        return [
            line for line in self.lines if line["kind"] == kind and all(line[key] == v for key, v in wanted.items())
        ]

    def losses(self, method: str) -> dict[int, float]:
        """A method's validation loss by half decades of the learning rate, the mean over the tuning seeds; infinite
        where one of them diverged."""
        found: dict[int, list[float]] = {}
        for line in self.of("tuning", method=method):
            found.setdefault(line["half_decades"], []).append(math.inf if line["loss"] is None else line["loss"])
        return {candidate: statistics.fmean(losses) for candidate, losses in found.items()}
