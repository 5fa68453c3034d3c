"""The modules that a spec trains in full, and the parameters that are tied to theirs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..analysis.dataflow import tied_names
from ..base_names import base_modules, base_parameters
from ..errors import TargetError, listing
from ..sites import Site
from ..spec import Spec
from ..state import Tie
from .patterns import inside, matches, no_match


def modules_to_train(spec: Spec, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    train: list[str] = []
    for pattern in spec.train:
        hits = [n for n in modules if n and matches(n, pattern)]
        if not hits:
            raise no_match("train", pattern, [n for n in modules if n])
        hits = [n for n in hits if not inside(n.rpartition(".")[0], hits)]  # the outermost ones
        for name in hits:
            if next(modules[name].parameters(), None) is None:
                raise TargetError(f"train {pattern!r}: {name!r} has no parameters to train")
        train += [n for hit in hits for n in _parts(hit, modules) if n not in train]
    return tuple(train)


def _parts(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """A module to train, or the parts of a list of modules: a parent goes through the list and calls these."""
    module = modules[path]
    own = [*module._parameters.values(), *module._buffers.values()]
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) or own:
        return [path]
    # a module that stands at several places has one name here
    children = [n for n in modules if n.startswith(f"{path}.") and "." not in n[len(path) + 1 :]]
    held = [n for n in children if next(modules[n].parameters(), None) is not None]
    return [part for child in held for part in _parts(child, modules)]


def ties_of(model: nn.Module, train: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[Tie, ...]:
    """Every parameter outside the trained modules that is tied to one inside."""
    tied = tied_names(model) if train else {}
    found: dict[str, Tie] = {}
    for path in train:
        for name, _ in base_parameters(modules[path]):
            for other in sorted(tied.get(f"{path}.{name}", ())):
                holder, _, attribute = other.rpartition(".")
                if not inside(holder, train) and holder in modules:  # a module at two places counts once
                    found.setdefault(other, Tie(holder, attribute, path, name))
    return tuple(found.values())


def warn_untied(model: nn.Module, spec: Spec) -> None:
    """Say which parameters keep the base's values although a trained one was tied to them."""
    if spec.train and not spec.keep_ties:
        modules = dict(base_modules(model))
        if ties := ties_of(model, modules_to_train(spec, modules), modules):
            warnings.warn(
                f"keep_ties=False unties {ties[0].trained!r} from {listing(tie.full for tie in ties)}, which keeps the "
                "base's values",
                stacklevel=3,
            )


def check_ties(sites: Iterable[Site], ties: Iterable[Tie]) -> None:
    follows = {(tie.path, tie.attribute): tie for tie in ties}
    for site in sites:
        if (tie := follows.get((site.owner, site.weight))) is not None:
            raise TargetError(
                f"{site.name!r} is tied to {tie.trained!r}, which is trained in full and it with it: an adapter there "
                "would be on top of a weight that is trained already. Take one of them out, or set "
                "Spec(keep_ties=False), which unties them"
            )
