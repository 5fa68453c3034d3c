"""A picture of a benchmark's JSON file: the ratio of every row to its group's reference, with its interval."""

from __future__ import annotations

import json
from pathlib import Path


def ratios(source: Path, target: Path) -> None:
    """Draw one panel a group: dots are medians of the rounds' ratios, bars their 95 % interval, the line is 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = json.loads(source.read_text(encoding="utf-8"))["groups"]
    rows = [[row for row in group["rows"] if row["reference"]] for group in groups]
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(9, 0.8 * len(groups) + 0.28 * sum(map(len, rows))), squeeze=False,
        gridspec_kw={"height_ratios": [max(1, len(r)) for r in rows]}, layout="constrained",
    )  # fmt: skip
    for axis, group, shown in zip(panels[:, 0], groups, rows, strict=True):
        for place, row in enumerate(reversed(shown)):
            value = row["reference"]
            color = "tab:orange" if row["name"].startswith("PEFT") else "tab:blue"
            axis.plot([value["low"], value["high"]], [place, place], color=color, alpha=0.5, linewidth=3)
            axis.plot(value["median"], place, "o", color=color)
            axis.annotate(f"{value['median']:.3f}", (value["median"], place), (0, 5), textcoords="offset points",
                          ha="center", fontsize=7)  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(shown)), [row["name"] for row in reversed(shown)], fontsize=8)
        axis.set_ylim(-0.6, len(shown) - 0.2)
        axis.set_title(f"{group['title']}  (of {group['reference']})", fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=150)
    plt.close(figure)
