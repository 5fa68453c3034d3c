"""Timing of several callables against each other in one process, for machines that are noisy.

Every round calls every candidate once, so a slow moment of the machine hits all of them alike; the order is rotated,
and turned round on every second lap, so that none always runs after the same one. Two figures are reported per
reference: the ratio of the medians, and the median of the ratios taken within each round. Where the two differ by more
than a few per cent, the machine was too busy for either.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Args:
        name: its row in the table.
        call: what is timed; it gets the result of `prepare`, unless that is None.
        prepare: done before each timed call, outside the time: a fresh model, cleared gradients.
        beside: the candidate that does the same in the other library; its ratio gets a column of its own.
        note: shown at the end of the row.
    """

    name: str
    call: Callable[..., object]
    prepare: Callable[[], object] | None = None
    beside: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Ratio:
    """How many times longer than a reference. `low..high` is the 95 % interval of the median of the rounds' ratios."""

    of_medians: float
    median: float
    p10: float
    p90: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    reference: Ratio | None
    beside: str | None
    beside_ratio: Ratio | None
    note: str


@dataclass
class Group:
    """Candidates that were timed together."""

    title: str
    reference: str
    rounds: int
    calls_per_time: int
    rows: list[Row]
    remarks: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median from the ranks alone: no assumption on how the noise is distributed."""
    ordered = sorted(values)
    half = 0.98 * math.sqrt(len(ordered))
    low = max(math.floor(len(ordered) / 2 - half), 0)
    high = min(math.ceil(len(ordered) / 2 + half), len(ordered) - 1)
    return ordered[low], ordered[high]


def ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Of two candidates of the same rounds."""
    each = [mine / other for mine, other in zip(times, reference, strict=True)]
    low, high = median_interval(each)
    return Ratio(
        of_medians=statistics.median(times) / statistics.median(reference),
        median=statistics.median(each),
        p10=percentile(each, 0.1),
        p90=percentile(each, 0.9),
        low=low,
        high=high,
    )


def order(count: int, turn: int) -> list[int]:
    """Who runs when in a round: rotated by one each round, reversed on every second lap."""
    start = turn % count
    places = [(start + place) % count for place in range(count)]
    return places[::-1] if (turn // count) % 2 else places


def time_once(candidate: Candidate, calls: int) -> float:
    """Milliseconds per call."""
    spent = 0
    for _ in range(calls):
        prepared = candidate.prepare() if candidate.prepare else None
        given = () if prepared is None else (prepared,)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        result = candidate.call(*given)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent += time.perf_counter_ns() - start
        del result, prepared, given  # freed outside the time
    return spent / calls / 1e6


def measure(
    title: str,
    candidates: Sequence[Candidate],
    reference: str,
    *,
    rounds: int,
    warmup: int = 3,
    least_ms: float = 20.0,
    remarks: Sequence[str] = (),
    before_timing: Callable[[], object] | None = None,
) -> Group:
    """Time the candidates against each other.

    Args:
        title: of the group.
        candidates: the reference is one of them.
        reference: the name whose ratio is 1.
        rounds: how often each is timed.
        warmup: untimed rounds before.
        least_ms: calls that are faster are timed in batches that take about this long.
        remarks: printed under the table.
        before_timing: called once between the warm-up and the first timed round.
    """
    named = {candidate.name: candidate for candidate in candidates}
    if len(named) != len(candidates):
        raise ValueError(f"two candidates of {title!r} have one name")
    for wanted in {reference, *(c.beside for c in candidates if c.beside)}:
        if wanted not in named:
            raise ValueError(f"{wanted!r} is a reference in {title!r}, but no candidate")

    times: dict[str, list[float]] = {name: [] for name in named}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=warmup + rounds)
        fastest = math.inf
        for turn in range(warmup):
            for place in order(len(candidates), turn):
                fastest = min(fastest, time_once(candidates[place], 1))
            progress.advance(task)
        calls = max(1, min(50, round(least_ms / fastest))) if warmup else 1
        if before_timing:
            before_timing()
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # a collection would fall on whoever runs at that moment
        try:
            for turn in range(rounds):
                for place in order(len(candidates), turn):
                    times[candidates[place].name].append(time_once(candidates[place], calls))
                gc.collect()
                progress.advance(task)
        finally:
            if collecting:
                gc.enable()

    rows = []
    for name, candidate in named.items():
        mine = times[name]
        rows.append(
            Row(
                name=name,
                median_ms=statistics.median(mine),
                p10_ms=percentile(mine, 0.1),
                p90_ms=percentile(mine, 0.9),
                reference=None if name == reference else ratio(mine, times[reference]),
                beside=candidate.beside,
                beside_ratio=ratio(mine, times[candidate.beside]) if candidate.beside else None,
                note=candidate.note,
            )
        )
    return Group(title, reference, rounds, calls, rows, list(remarks))


# -- where it ran --------------------------------------------------------------------------------------------------
def processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a reader needs to compare figures: versions, threads, processor. No date and no host name."""
    versions = {}
    for name in ("fxgraft", "torch", "transformers", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        **versions,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


# -- output --------------------------------------------------------------------------------------------------------
def _shown(value: Ratio | None) -> str:
    return f"{value.of_medians:.3f} / {value.median:.3f}  [{value.low:.3f}-{value.high:.3f}]" if value else ""


def show(group: Group, console: Console) -> None:
    """Print one group as a table."""
    beside = any(row.beside for row in group.rows)
    notes = any(row.note for row in group.rows)
    table = Table(title=group.title, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("ms, median", justify="right")
    table.add_column("p10-p90", justify="right")
    table.add_column(f"of {group.reference}", justify="right")
    if beside:
        table.add_column("of the same in PEFT", justify="right")
    if notes:
        table.add_column("")
    for row in group.rows:
        cells = [row.name, f"{row.median_ms:.2f}", f"{row.p10_ms:.2f}-{row.p90_ms:.2f}", _shown(row.reference) or "1"]
        cells += [_shown(row.beside_ratio)] if beside else []
        cells += [row.note] if notes else []
        table.add_row(*cells)
    table.caption = (
        f"{group.rounds} rounds of {group.calls_per_time} call(s); ratios: of the medians / median of the rounds' "
        "[95 % interval]"
    )
    console.print(table)
    for remark in group.remarks:
        console.print(f"  {remark}", highlight=False)
    console.print()


@dataclass
class Report:
    """Groups as they come in: printed at once, written as JSON after each, so that an interrupted run keeps them."""

    benchmark: str
    options: Mapping[str, Any]
    json_path: Path | None = None
    groups: list[Group] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    # Wide enough for the tables when the output goes to a file.
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 160))

    def __post_init__(self) -> None:
        self.environment = environment()
        shown = " | ".join(f"{key} {value}" for key, value in self.environment.items() if value is not None)
        self.console.print(f"{self.benchmark}: {shown}\n", highlight=False)

    def add(self, group: Group) -> None:
        self.groups.append(group)
        show(group, self.console)
        self.write()

    def fact(self, name: str, value: Any, text: str) -> None:
        """A figure that is no time."""
        self.facts[name] = value
        self.console.print(text, highlight=False)
        self.write()

    def write(self) -> None:
        if self.json_path is None:
            return
        content = {
            "benchmark": self.benchmark,
            "environment": self.environment,
            "options": dict(self.options),
            "facts": self.facts,
            "groups": [asdict(group) for group in self.groups],
        }
        self.json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def arguments(description: str, *, rounds: int, quick_rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, help=f"timed rounds; default {rounds}, with --quick {quick_rounds}")
    parser.add_argument("--threads", type=int, help="torch threads; default: what torch takes by itself")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file too")
    parser.add_argument("--quick", action="store_true", help="small and few: it runs, but its figures mean nothing")
    parser.set_defaults(default_rounds=rounds, quick_rounds=quick_rounds)
    return parser


def start(benchmark: str, options: argparse.Namespace) -> Report:
    """Apply the common options and open the report."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rounds is None:
        options.rounds = options.quick_rounds if options.quick else options.default_rounds
    if options.rounds < 1:
        raise SystemExit("--rounds: allowed are whole numbers from 1 up")
    skipped = {"json", "plot", "default_rounds", "quick_rounds"}
    shown = {key: value for key, value in vars(options).items() if key not in skipped}
    return Report(benchmark, shown, options.json)
