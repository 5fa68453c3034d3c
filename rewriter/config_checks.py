"""Checks that the method configs share: each raises `SpecError` and says what was given and what is allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from .errors import SpecError
from .sites import Site


def check_positive_int(config: object, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"{type(config).__name__}({name}={value!r}): allowed are whole numbers from 1 up")


def check_positive(config: object, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise SpecError(
                f"{type(config).__name__}({name}={value!r}): allowed are finite numbers above 0; "
                "a scale of zero would make the adapter silently do nothing"
            )


def check_dropout(config: object, dropout: Any) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise SpecError(f"{type(config).__name__}(dropout={dropout!r}): allowed are probabilities from 0 up to below 1")


C = TypeVar("C", bound=Any)


def lower_rank(config: C, out_features: int, in_features: int) -> C:
    """The config with a rank that a site of this size can have, and the scale as it was: more would add parameters and
    no expressiveness."""
    rank = min(config.rank, out_features, in_features)
    if rank == config.rank:
        return config
    less: dict[str, Any] = {"rank": rank}
    if hasattr(config, "alpha"):
        rooted = getattr(config, "rslora", False)
        less["alpha"] = config.alpha * (math.sqrt(rank / config.rank) if rooted else rank / config.rank)
    return replace(config, **less)  # type: ignore[no-any-return]


def check_rank(config: object, rank: int, sites: Sequence[Site], *, strict: bool = False) -> None:
    """A rank above `min(in, out)` adds parameters and no expressiveness: warn, as such adapters exist and must load.

    Args:
        strict: for methods whose factors come from an SVD and cannot have more columns: raise `SpecError`.
    """
    above = [site for site in sites if rank > min(site.in_features, site.out_features)]
    if not above:
        return
    site = above[0]
    text = (
        f"{type(config).__name__}(rank={rank}): {len(above)} site(s) are smaller than the rank, such as {site.name!r} "
        f"with {site.out_features} x {site.in_features} (out x in), whose rank is at most "
        f"{min(site.in_features, site.out_features)}; lower the rank, exclude the site, or give it an override"
    )
    if strict:
        raise SpecError(text)
    warnings.warn(text, stacklevel=6)
