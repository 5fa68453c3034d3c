"""How the weights of an adapter's sites are cut, as a folder of ours says it, and the names of parts across models.

A model with a layer for q, k and v each, and one with a fused layer of the same weights, name the same rows otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ...rewriter.base_names import base_modules
from ...rewriter.errors import CheckpointError
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.sites import Site, beside
from ...rewriter.targeting.fused_parts import parts_by_name
from ...rewriter.targeting.patterns import exactly
from ...rewriter.targeting.weight_products import candidates_of
from .folder_files import CONFIG

CUTS = "cuts"  # in the config: how weights are cut into parts whose number does not say it


class StoredCut(NamedTuple):
    """How a weight is cut: `Cut.plain`, and the names of its parts."""

    plain: tuple[int, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()


def stored_cuts(sites: Sequence[Site]) -> dict[str, Any]:
    """The entry of the config that says how weights are cut; none where all cuts are into equal, nameless parts."""
    told = {
        site.stem: {"parts": list(site.cut.plain), "names": [list(names) for names in site.cut.names]}
        for site in sites
        if site.cut is not None and (site.cut.plain or site.cut.names)
    }
    return {CUTS: told} if told else {}


def read_cuts(given: Any, what: str) -> dict[str, StoredCut]:
    try:
        cuts = {stem: StoredCut(tuple(told["parts"]), tuple(map(tuple, told["names"]))) for stem, told in given.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{what}: {CUTS!r} in its {CONFIG} is {given!r}, expected parts and names") from error
    for stem, (plain, names) in cuts.items():
        numbers = all(type(size) is int and size > 0 for size in plain) and len(plain) != 1
        if not numbers or not all(isinstance(name, str) for alike in names for name in alike):
            raise CheckpointError(f"{what}: {CUTS!r} in its {CONFIG} says {given[stem]!r} of {stem!r}")
    return cuts


def parts_elsewhere(model: nn.Module) -> dict[str, str]:
    """The names that parts of fused weights would have as layers -> the sites they are in this model."""
    modules = dict(base_modules(unwrap(model)))
    return {n: site for n, site in parts_by_name(modules, candidates_of(modules)).items() if n not in modules}


def names_here(model: nn.Module, names: Iterable[str], cuts: Mapping[str, StoredCut]) -> dict[str, str]:
    """What this model calls the sites of an adapter: parts of its fused layers, or layers of its own for parts.

    Only those whose name is another here; a name that means nothing here stays for the refusal.
    """
    modules = dict(base_modules(unwrap(model)))
    strange = [name for name in names if name not in modules]
    found = {name: site for name, site in parts_elsewhere(model).items() if name in strange} if strange else {}
    for name in strange:
        stem, _, part = name.removesuffix("]").partition("[")
        told = cuts.get(stem, StoredCut()).names if part else ()
        own = [beside(stem, other) for other in (told[int(part)] if part.isdigit() and int(part) < len(told) else ())]
        if stem not in modules and (here := [n for n in own if n in modules]):
            found[name] = here[0]
    return found


def exact_targets(sites: Iterable[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Patterns for exactly these sites: those of names this model has, and those it knows parts by."""
    as_layers = [names.get(site, site) for site in sites if site not in names or not names[site].endswith("]")]
    as_parts = [site for site in sites if site in names and names[site].endswith("]")]
    return tuple(exactly(found) for found in (as_layers, as_parts) if found)


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key of a tensor with its site's name here."""
    site = next((site for site in names if key.startswith(f"{site}.")), None)
    return key if site is None else names[site] + key[len(site) :]
