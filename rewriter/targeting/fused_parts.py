"""What of a weight is asked for: all of it, or parts, by number or by the names they would have as layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..errors import TargetError, listing
from ..parts import Cut
from ..sites import beside
from ..spec import Target
from .fused_presets import Fused, fused
from .patterns import matches
from .weight_products import Candidate, cut_of


@dataclass(frozen=True)
class Choice:
    """What of one weight is adapted.

    Args:
        target: how the user says it is cut; None without a `Target`.
        known: how it is cut by its architecture, where parts were asked for by name.
        select: the parts, by number.
        asked: whether it was asked for by more than `all-linear`.
    """

    target: Target | None = None
    known: Fused | None = None
    select: tuple[int, ...] = (0,)
    asked: bool = True

    def joined(self, other: Choice) -> Choice | None:
        """This and another choice of the same weight; None where they do not go together."""
        asked = self.asked or other.asked
        if self.known is not None and other.known is not None:
            return replace(self, select=tuple(dict.fromkeys((*self.select, *other.select))), asked=asked)
        same = self.known is None and other.known is None and self.target == other.target
        return replace(self, asked=asked) if same else None

    def without(self, part: Choice, pattern: str, name: str) -> Choice | None:
        """This choice without parts that are excluded by name; None where nothing is left."""
        if self.known is None:
            raise TargetError(
                f"exclude {pattern!r} is a part of {name!r}, which is adapted as a whole or in other parts: name the "
                f"parts to adapt, {listing(part.known.usual) if part.known else ''}"
            )
        left = tuple(number for number in self.select if number not in part.select)
        return replace(self, select=left) if left else None

    def settled(
        self, candidate: Candidate, produced: int, modules: Mapping[str, nn.Module]
    ) -> tuple[Cut | None, tuple[int, ...]]:
        """How the weight is cut and which of its parts are adapted."""
        if self.known is not None:
            return self.known.cut(candidate.name, produced), tuple(sorted(self.select))
        cut = None if self.target is None else cut_of(candidate, produced, self.target)
        if cut is None or self.target is None:
            return None, (0,)
        return _named(cut, candidate, modules), tuple(int(part) for part in self.target.select)


def _named(cut: Cut, candidate: Candidate, modules: Mapping[str, nn.Module]) -> Cut:
    """The cut with the architecture's names, where it is the architecture's."""
    known = fused(modules, candidate)
    if known is None or len(known.names) != len(cut.sizes):
        return cut
    try:
        own = known.cut(candidate.name, cut.produced)
    except TargetError:  # the user's numbers count, whatever the architecture would say
        return cut
    return own if own == cut else cut


def whole_or_parts(modules: Mapping[str, nn.Module], candidate: Candidate, target: Target | None) -> Choice:
    """The choice of a weight that a pattern matches."""
    if target is None or not target.by_name:
        return Choice(target)
    known = fused(modules, candidate)
    if known is None:
        raise TargetError(
            f"Target({target.pattern!r}, select={list(target.select)}): how {candidate.name!r} is cut is not known; "
            "give parts=, the number of its parts or their sizes, and select= their numbers"
        )
    numbers = [known.number(str(name)) for name in target.select]
    if None in numbers:
        raise TargetError(
            f"Target({target.pattern!r}, select={list(target.select)}): the parts of {candidate.name!r} are "
            f"{listing(known.usual)}"
        )
    return Choice(known=known, select=tuple(dict.fromkeys(n for n in numbers if n is not None)))


def parts_called(
    pattern: str, modules: Mapping[str, nn.Module], candidates: Mapping[str, Candidate]
) -> dict[str, Choice]:
    """The weights with parts that a pattern means, which matches no weight: `q_proj` where the model has `qkv_proj`."""
    found = {}
    for name, known in _fused(modules, candidates):
        hits = [
            number for number, names in enumerate(known.names) if any(matches(beside(name, n), pattern) for n in names)
        ]
        if hits:
            found[name] = Choice(known=known, select=tuple(hits))
    return found


def names_of_parts(modules: Mapping[str, nn.Module], candidates: Mapping[str, Candidate]) -> list[str]:
    """The usual names of all parts whose cut is known."""
    return [beside(name, part) for name, known in _fused(modules, candidates) for part in known.usual]


def parts_by_name(modules: Mapping[str, nn.Module], candidates: Mapping[str, Candidate]) -> dict[str, str]:
    """Every name that a part would have as a layer -> the site it is."""
    return {
        beside(name, alias): f"{name}[{number}]"
        for name, known in _fused(modules, candidates)
        for number, names in enumerate(known.names)
        for alias in names
    }


def _fused(modules: Mapping[str, nn.Module], candidates: Mapping[str, Candidate]) -> Iterator[tuple[str, Fused]]:
    for name, candidate in candidates.items():
        if (known := fused(modules, candidate)) is not None:
            yield name, known
