"""Which tensors a run is fed for `adapter=`: one adapter's, those of several partial ones, or a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...rewriter.errors import AdapterError, listing
from ..adapterfiles.fit import overlap
from .adapter_cache import AdapterCache
from .weighted import Combiner, check_weights


def active_values(
    adapter: str | Sequence[str] | Mapping[str, float] | None, cache: AdapterCache, combine: Combiner, own: bool
) -> dict[str, Any]:
    """OrtValues by input name. `own`: the graph takes the method's own tensors, which have no weighted sum. Raises
    `AdapterError`."""
    if adapter is None:
        return {}
    if isinstance(adapter, str):
        return cache.get(adapter).values
    if isinstance(adapter, Mapping):
        weights = check_weights(adapter)
        if own and list(weights.values()) != [1.0]:
            raise AdapterError(
                "the graph does the method's arithmetic, and takes one adapter's own tensors: weights need a graph "
                "exported with expanded=True"
            )
        return combine([cache.get(name) for name in weights], list(weights.values()))
    if not isinstance(adapter, Sequence):
        raise AdapterError(f"adapter={adapter!r}: give a name, several in a list, or weights by name in a dict")
    if wrong := [name for name in adapter if not isinstance(name, str)]:
        raise AdapterError(f"adapter={adapter!r}: {wrong[0]!r} is no adapter's name")
    values: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for one in [cache.get(name) for name in adapter]:
        shared = overlap(values, one.values)
        if shared:
            raise AdapterError(
                f"adapters {owner[shared[0]]!r} and {one.name!r} both set {listing(shared)}: one run takes one "
                "value each. Run them one after the other, or combine them before the export"
            )
        values.update(one.values)
        owner.update(dict.fromkeys(one.values, one.name))
    return values
