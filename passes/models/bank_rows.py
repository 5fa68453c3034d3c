"""Which rows of each site's input belong to which sample of a batch, found by trying.

The model runs on the inputs of a call, then again and again with half of the samples changed. A row that only ever
changes together with one sample is that sample's; where rows of a site never change (learned queries), their outputs
are changed instead, and what changes behind them tells. Works on a copy of the modules; the base's tensors are shared.

What is proved: for inputs of this kind (which arguments there are, and which of their dimensions are 1), each site's
rows are the samples' own along one dimension, `rewriter/calls/sample_rows.py`.

Does not handle: rows of several samples in one, rows that all samples share, tokens regrouped by what they contain.
Each is an `AdapterError` that names the site.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.calls.sample_rows import Rows
from ...rewriter.errors import AdapterError
from ...rewriter.sites import Site
from .bank_probe import Inputs, Place, Run, Trial, differ

#: a dimension, and whether the samples are inside of it (neighbouring rows are of different ones); None: it is they
Layout = tuple[int, bool | None]


def _candidates(shape: tuple[int, ...], batch: int) -> Iterator[tuple[Layout, Tensor]]:
    """Ways the rows `shape` may hold the samples, and the sample of every row."""
    for axis, size in enumerate(shape):
        if not size or size % batch:
            continue
        index, view = torch.arange(size), [1] * len(shape)
        view[axis] = size
        if size == batch:
            yield (axis, None), index.view(view)
        else:
            yield (axis, False), (index // (size // batch)).view(view)
            yield (axis, True), (index % batch).view(view)


class Evidence:
    """The runs with changed samples, against the one without."""

    def __init__(self, base: Run, batch: int) -> None:
        self.base, self.batch = base, batch
        self.changed: dict[Place, list[Tensor]] = {place: [] for place in base.seen}
        self.samples: list[Tensor] = []
        self.regrouped: set[str] = set()  # sites whose input has other rows, or that are called another time

    def add(self, run: Run, samples: Tensor) -> None:
        """A run in which the content of these samples `(batch,)` bool was another."""
        self.samples.append(samples)
        for place, then in self.base.seen.items():
            now = run.seen.get(place)
            if now is None or now.shape != then.shape:
                self.regrouped.add(place[0])
            else:
                self.changed[place].append(differ(then.rows, now.rows, then.dtype))
        self.regrouped |= {name for name, _ in run.seen.keys() - self.base.seen.keys()}

    def moved(self, place: Place) -> bool:
        return any(bool(changed.any()) for changed in self.changed[place])

    def fits(self, place: Place, owner: Tensor) -> bool:
        """Whether rows only ever changed together with their sample."""
        pairs = zip(self.changed[place], self.samples, strict=True)
        return not any(bool((changed & ~samples[owner]).any()) for changed, samples in pairs)

    def layouts(self, place: Place) -> list[tuple[Layout, Tensor]]:
        rows = self.base.seen[place].shape[:-1]
        return [(layout, owner) for layout, owner in _candidates(rows, self.batch) if self.fits(place, owner)]


def _vary(trial: Trial, base: Run) -> Evidence:
    """Runs with other content, leaving out arguments that only a few values are valid for."""

    def takes(leaves: Sequence[int]) -> bool:
        try:
            trial.run(leaves, first)
        except Exception:  # whatever the model says of content that is not valid
            return False
        return True

    found = Evidence(base, trial.batch)
    first = next(trial.halves())
    content = trial.inputs.content
    if not takes(content):
        content = [leaf for leaf in content if takes([leaf])]
        if not takes(content):
            content = content[:1]
    for samples in trial.halves():
        found.add(trial.run(content, samples), samples)
    for mask in trial.inputs.masks:
        if takes([mask]):
            found.add(trial.run([mask], first), first)
    return found


def _stir(trial: Trial, base: Run, owners: Mapping[Place, Tensor]) -> Evidence:
    """Runs with other outputs at places whose rows are said to be of these samples."""
    found = Evidence(base, trial.batch)
    for samples in trial.halves():
        masks = {place: samples[owner].expand(base.seen[place].shape[:-1]) for place, owner in owners.items()}
        found.add(trial.run(stir=masks), samples)
    return found


def layouts(
    root: nn.Module, sites: Sequence[Site], batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int
) -> dict[str, Layout]:
    """How the rows of every site that these inputs reach belong to the `batch` samples.

    Args:
        root: a model with or without adapters; only its base is run.
        axis: the inputs' dimension that the samples are along.

    Raises:
        AdapterError: a site's rows do not belong to single samples, or it cannot be told.
    """
    trial = Trial(root, sites, Inputs(args, kwargs, batch, axis), batch)
    base = trial.run()
    found = _vary(trial, base)
    names = [site.name for site in sites]
    if regrouped := [name for name in names if name in found.regrouped]:
        raise AdapterError(
            f"{regrouped[0]!r} gets other rows when only the content of a sample changes (experts that a router sends "
            f"tokens to, padding that is left out): {_NO_BANK}"
        )
    settled: dict[Place, tuple[Layout, Tensor]] = {}
    unsettled: dict[Place, list[tuple[Layout, Tensor]]] = {}
    for place, (shape, *_) in base.seen.items():
        possible = [] if place[0] in found.regrouped else found.layouts(place)
        if len(possible) == 1 and found.moved(place):
            settled[place] = possible[0]
        elif place[0] in names:
            if not possible:
                raise AdapterError(_refusal(place, shape, batch, found.moved(place)))
            unsettled[place] = possible
        elif found.moved(place) and not possible and any(_candidates(shape[:-1], batch)):
            warnings.warn(
                f"{place[0]} of the model, {tuple(shape[:-1])}, has numbers that depend on several samples: where "
                "these are of several tenants, no tenant alone would give such a number",
                stacklevel=2,
            )
    if not settled:
        raise AdapterError(
            f"no input of this call could be varied sample by sample, so it cannot be told which rows {names[0]!r} and "
            f"the others take from which sample: {_NO_BANK}"
        )
    result: dict[str, Layout] = {}
    owners = {place: owner for place, (_, owner) in settled.items()}
    for place, layout in (*((p, one) for p, (one, _) in settled.items()), *_settle(trial, base, owners, unsettled)):
        if place[0] in names:
            result[place[0]] = merge(place[0], result.get(place[0]), layout)
    return result


def _settle(
    trial: Trial, base: Run, owners: Mapping[Place, Tensor], unsettled: Mapping[Place, list[tuple[Layout, Tensor]]]
) -> Iterator[tuple[Place, Layout]]:
    """Layouts of places whose rows no input changes (learned queries): the one where a change of a sample's rows
    changes nothing but that sample."""

    def holds(tried: Mapping[Place, Tensor]) -> bool:
        found = _stir(trial, base, tried)
        fits = not found.regrouped and all(found.fits(place, owner) for place, owner in owners.items())
        return fits and any(found.moved(place) for place in owners)

    simple = {place: possible[0] for place, possible in unsettled.items() if len(possible) == 1}
    if simple and holds({place: owner for place, (_, owner) in simple.items()}):
        yield from ((place, layout) for place, (layout, _) in simple.items())
        unsettled = {place: possible for place, possible in unsettled.items() if place not in simple}
    for place, possible in unsettled.items():
        good = [layout for layout, owner in possible if holds({place: owner})]
        if len(good) != 1:
            raise AdapterError(_refusal(place, base.seen[place].shape, trial.batch, False))
        yield place, good[0]


def merge(name: str, old: Layout | None, new: Layout) -> Layout:
    """What holds for both; `AdapterError` where nothing does."""
    if old is None or old == new or (old[0] == new[0] and new[1] is None):
        return new if old is None else old
    if old[0] == new[0] and old[1] is None:
        return new
    raise AdapterError(
        f"{name!r} is called with the samples along dimension {old[0]} and along dimension {new[0]}, or in two orders: "
        f"{_NO_BANK}"
    )


def rows_of(layout: Layout) -> Rows:
    """The layout as a site keeps it."""
    axis, inner = layout
    return None if axis == 0 and not inner else (axis, bool(inner))


_NO_BANK = (
    "a bank cannot give every sample its own adapter there. Serve each tenant on its own (the adapted model, or "
    "fg.merge of it), or train the tenants without that site"
)


def _refusal(place: Place, shape: tuple[int, ...], batch: int, moved: bool) -> str:
    if moved:
        said = f"rows of its input {shape} depend on several of the {batch} samples, or on none in particular"
    else:
        said = f"its input {shape} has the same rows for all {batch} samples"
    return (
        f"{place[0]!r}: {said}: {_NO_BANK}. Where the samples are along another dimension of the model's inputs, say "
        "so: fg.bank(..., batch_axis=1)"
    )
