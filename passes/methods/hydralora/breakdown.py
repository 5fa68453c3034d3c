"""The LoRA breakdown of HydraLoRA (arXiv 2404.19245, section 3.1): do adapters of different tasks differ in A or in B?

    adapters trained on several tasks  ->  distances of the A's and of the B's, and a t-SNE of both, coloured by task

Any method with exact low-rank factors can be analysed; the result never changes the adapters. What it does not handle:
adapters grafted with the same random seed start from the same A, and then agree in A partly for that reason; train with
different seeds to see what training did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....rewriter.errors import AdapterError, FxgraftError, listing
from ..low_rank_factors import linear_factors

Adapter = nn.Module | Mapping[str, Tensor]
_SUFFIXES = ((".A", ".B"), (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"))


@dataclass(frozen=True)
class Agreement:
    """How alike matrices of the same site are, as means over sites and pairs of adapters; NaN where there is no pair.

    `cosine`: of the flattened matrices, 1 = same direction. `distance`: of the spanned spaces, the squared projection
    distance `1 - |Qi^T Qj|^2 / r`, 0 = same space, 1 = orthogonal; the rows of A, the columns of B.
    """

    cosine: float
    distance: float
    pairs: int


@dataclass(frozen=True)
class Breakdown:
    """The result of `lora_breakdown`: `agreement[matrix][kind]` with matrix `A` or `B` and kind `within` or `between`
    tasks, and the matrices themselves, `(task, site, A, B)` in float32, one entry per adapter and site."""

    agreement: Mapping[str, Mapping[str, Agreement]]
    entries: Sequence[tuple[str, str, Tensor, Tensor]]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry[0] for entry in self.entries))

    def embed(self, matrix: str, seed: int = 0) -> list[tuple[list[str], Any]]:
        """t-SNE of all A or all B: for each shape that occurs, the tasks and the points `(count, 2)` (numpy)."""
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise FxgraftError("the t-SNE needs scikit-learn: pip install scikit-learn") from error
        by_shape: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for task, _, A, B in self.entries:
            value = {"A": A, "B": B}[matrix]
            by_shape.setdefault(tuple(value.shape), []).append((task, value.flatten()))
        found = []
        for group in by_shape.values():
            points = torch.stack([value for _, value in group]).numpy()
            if len(group) < 3:
                raise AdapterError(f"a t-SNE needs at least 3 matrices of one shape; there are {len(group)}")
            tsne = TSNE(2, perplexity=min(30.0, (len(group) - 1) / 3), random_state=seed, init="random")
            found.append(([task for task, _ in group], tsne.fit_transform(points)))
        return found

    def save_figure(self, path: str | Path, seed: int = 0) -> Path:
        """Save the figure: all A on the left, all B on the right, a colour per task, a row per shape."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise FxgraftError("the figure needs matplotlib: pip install matplotlib") from error
        panels = {matrix: self.embed(matrix, seed) for matrix in "AB"}
        rows = max(len(groups) for groups in panels.values())
        figure = Figure(figsize=(10, 4.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)  # no display, and nothing global is touched
        axes = figure.subplots(rows, 2, squeeze=False)
        for column, (matrix, groups) in enumerate(panels.items()):
            for row in range(rows):
                axis = axes[row][column]
                if row >= len(groups):
                    axis.set_visible(False)
                    continue
                tasks, points = groups[row]
                for colour, task in enumerate(self.tasks):
                    mine = [i for i, t in enumerate(tasks) if t == task]
                    axis.scatter(points[mine, 0], points[mine, 1], s=14, color=f"C{colour % 10}", label=task)
                between = self.agreement[matrix]["between"]
                axis.set_title(f"{matrix}: between tasks cosine {between.cosine:.2f}, distance {between.distance:.2f}")
                axis.set_xticks([])
                axis.set_yticks([])
        axes[0][0].legend()
        figure.savefig(path, dpi=150)
        return Path(path)


def _pairs_of(adapter: Adapter, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    if isinstance(adapter, nn.Module):
        return {site: (A.float().cpu(), B.float().cpu()) for site, (A, B) in linear_factors(adapter, name).items()}
    found = {}
    for end_a, end_b in _SUFFIXES:
        for key, A in adapter.items():
            stem = key.removesuffix(end_a)
            if stem != key and stem + end_b in adapter:
                found[stem] = (A.detach().float().cpu(), adapter[stem + end_b].detach().float().cpu())
    if not found:
        raise AdapterError(f"no LoRA matrices in this state; its keys are {listing(adapter)}")
    return found


def _basis(matrix: Tensor) -> Tensor | None:
    """Orthonormal columns `(n, rank)` of the space that the columns of `matrix` span; None for a zero matrix."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((S[0] * 1e-6 < S).sum()) if S[0] > 0 else 0
    return U[:, :rank] if rank else None


def _agreement(items: Sequence[tuple[str, str, Tensor, Tensor | None]], within: bool) -> Agreement:
    """Over all pairs of the same site; items are (task, site, matrix, basis)."""
    by_site: dict[str, list[tuple[str, Tensor, Tensor | None]]] = {}
    for task, site, matrix, basis in items:
        by_site.setdefault(site, []).append((task, matrix, basis))
    cosines, distances = [], []
    for group in by_site.values():
        for (task1, matrix1, basis1), (task2, matrix2, basis2) in combinations(group, 2):
            if (task1 == task2) != within or basis1 is None or basis2 is None:
                continue
            if matrix1.shape == matrix2.shape:
                cosines.append(F.cosine_similarity(matrix1.flatten(), matrix2.flatten(), 0).item())
            overlap = (basis1.t() @ basis2).square().sum().item()
            distances.append(1 - overlap / min(basis1.shape[1], basis2.shape[1]))
    mean = lambda values: sum(values) / len(values) if values else math.nan  # noqa: E731
    return Agreement(mean(cosines), mean(distances), len(distances))


def lora_breakdown(adapters: Mapping[str, Adapter | Sequence[Adapter]], name: str = "default") -> Breakdown:
    """Compare the A's and the B's of adapters trained on different tasks, site by site.

    Args:
        adapters: for each task an adapter, or several (then there are pairs within a task too). An adapter is an
            adapted model of any method with exact low-rank factors, or a state with `<site>.A` / `<site>.B` or PEFT's
            `<site>.lora_A.weight` / `<site>.lora_B.weight`. The alpha of a state is not known and not applied.
        name: of the adapter in adapted models.

    Raises:
        AdapterError: fewer than two adapters, a state without LoRA matrices, adapters of different sites.
        MergeError: a method without factors (HydraLoRA, GLoRA).
    """
    entries: list[tuple[str, str, Tensor, Tensor]] = []
    sites: set[str] | None = None
    count = 0
    for task, given in adapters.items():
        for adapter in [given] if isinstance(given, (nn.Module, Mapping)) else given:
            pairs = _pairs_of(adapter, name)
            if sites is not None and sites != set(pairs):
                raise AdapterError(f"task {task!r} has other sites: {listing(sorted(sites ^ set(pairs)))} differ")
            sites, count = set(pairs), count + 1
            entries += [(task, site, A, B) for site, (A, B) in pairs.items()]
    if count < 2:
        raise AdapterError(f"lora_breakdown compares adapters; it was given {count}")
    agreement = {}
    for matrix in "AB":
        values = [(t, s, A if matrix == "A" else B) for t, s, A, B in entries]
        items = [(t, s, v, _basis(v.t() if matrix == "A" else v)) for t, s, v in values]
        agreement[matrix] = {"within": _agreement(items, True), "between": _agreement(items, False)}
    return Breakdown(agreement, entries)
