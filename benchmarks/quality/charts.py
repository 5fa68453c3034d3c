"""The table and the plot of a results file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import quickstart
from contenders import CONTENDERS, FULL, Contender
from records import Results, learning_rate, spread
from rich import box
from rich.table import Table


def rows(results: Results) -> list[tuple[Contender, list[dict[str, Any]]]]:
    """The contenders that have finished runs, with these runs by seed."""
    found = [(c, sorted(results.of("final", method=c.key), key=lambda line: line["seed"])) for c in (*CONTENDERS, FULL)]
    return [(contender, lines) for contender, lines in found if lines]


def table(results: Results) -> Table:
    """One row per contender, in Markdown."""
    made = Table(box=box.MARKDOWN)
    made.add_column("method", no_wrap=True)
    made.add_column("configuration", no_wrap=True)
    for heading in ("trained", "saved", "lr", "accuracy", "seeds", "training, s", "rest, s"):
        made.add_column(heading, justify="right", no_wrap=True)
    for contender, lines in rows(results):
        accuracy = spread([line["accuracy"] for line in lines])
        made.add_row(
            contender.title,
            contender.config,
            span([line["parameters"] for line in lines]),
            quickstart.size(max(line["bytes"] for line in lines)),
            f"{learning_rate(lines[0]['half_decades']):.1e}",
            f"{accuracy.mean:.4f}" + ("" if accuracy.deviation is None else f" ± {accuracy.deviation:.4f}"),
            " ".join(f"{line['accuracy']:.4f}" for line in lines),
            f"{spread([line['train_seconds'] for line in lines]).mean:.0f}",
            f"{spread([line['other_seconds'] for line in lines]).mean:.0f}",
        )
    return made


def span(values: list[int]) -> str:
    """A count, or the smallest and the largest where the seeds differ."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def notes(results: Results) -> list[str]:
    """What a reader of the table needs besides."""
    s, lines = results.settings, results.of("final")
    mean = spread([line["accuracy"] for line in lines]).mean
    error = math.sqrt(mean * (1 - mean) / s["test"])
    probe = [
        f"a logistic regression on the frozen model's mean-pooled features: {line['accuracy']:.4f} (C {line['c']:g})"
        for line in results.of("probe")
    ]
    return [
        *probe,
        f"accuracy on {s['test']:,} test headlines: mean ± standard deviation over the seeds, then each seed; the same "
        f"headlines for all; the binomial standard error of one accuracy is {error:.4f}",
        f"trained without the head; saved with it; head lr {s['head_lr']:.1e}, of the head alone as tuned; "
        f"{s['epochs']} epoch(s) of {s['train']:,} headlines, batch {s['batch']}",
        " | ".join(f"{key} {value}" for key, value in results.environment.items() if value is not None),
    ]


def plot(results: Results, path: Path) -> None:
    """A dot per seed and a bar at the mean, per contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = rows(results)
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(found) + 1.4), layout="constrained")
    for place, (contender, lines) in enumerate(found):
        values = [line["accuracy"] for line in lines]
        color = "0.45" if contender.reference else "C0"
        shifts = [0.16 * (i - (len(values) - 1) / 2) for i in range(len(values))]  # equal values stay apart
        axes.scatter(values, [place + shift for shift in shifts], s=28, color=color, alpha=0.75, linewidths=0, zorder=3)
        mean = spread(values).mean
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color=color, linewidth=2, zorder=2)
        axes.annotate(f"{mean:.3f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", color=color)
    for line in results.of("probe"):
        axes.axvline(line["accuracy"], color="0.45", linestyle=":", zorder=1, label="logistic regression, frozen model")
        axes.legend(loc="lower left", fontsize=8, frameon=False)
    labels = [f"{contender.title}\n{span([line['parameters'] for line in lines])}" for contender, lines in found]
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"accuracy on {results.settings['test']:,} test headlines: a dot per seed, a bar at the mean")
    axes.set_title("MiniLM on sarcastic headlines; numbers trained besides the head", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
