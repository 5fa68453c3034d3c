"""The modules that a spec trains in full, and the parameters that are tied to theirs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..analysis.dataflow import tied_names
from ..base_names import base_modules, base_parameters
from ..errors import TargetError, listing
from ..method import Method
from ..sites import Site
from ..spec import Spec
from ..state import Tie
from .patterns import inside, matches, no_match


def to_train(spec: Spec, modules: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of modules to train in full, and the names of single parameters outside them (`*.bias`): what a pattern
    means that no module matches."""
    train: list[str] = []
    names: list[str] = []
    for pattern in spec.train:
        hits = [n for n in modules if n and matches(n, pattern)]
        if not hits:
            names += _parameters_of(pattern, modules)
        hits = [n for n in hits if not inside(n.rpartition(".")[0], hits)]  # the outermost ones
        for name in hits:
            if next(modules[name].parameters(), None) is None:
                raise TargetError(f"train {pattern!r}: {name!r} has no parameters to train")
        train += [n for hit in hits for n in _parts(hit, modules) if n not in train]
    alone = dict.fromkeys(name for name in names if not inside(name.rpartition(".")[0], train))
    return tuple(train), tuple(alone)


def _parameters_of(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of the parameters that a pattern matches."""
    known = {
        f"{path}.{name}".lstrip("."): (path, parameter)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    hits = [name for name in known if matches(name, pattern)]
    if not hits:
        raise no_match("train", pattern, [*(n for n in modules if n), *known])
    for name in hits:
        path, parameter = known[name]
        where = f"train {pattern!r}: the parameter {name!r}"
        if isinstance(modules[path], nn.RNNBase):
            raise TargetError(
                f"{where} is one of a {type(modules[path]).__name__}, which keeps all of its weights in a list of its "
                f"own and would go on with the base's: train {path!r} in full, or leave it out"
            )
        if not path:
            raise TargetError(
                f"{where} belongs to the model itself and to no module in it, and a copy beside it would have no name: "
                "put it into a module, or leave it out"
            )
        if not parameter.is_floating_point():
            raise TargetError(f"{where} is {parameter.dtype}, which takes no gradient: leave it out")
    return hits


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


def with_ties(model: nn.Module, names: Sequence[str], ties: Sequence[Tie], keep: bool) -> tuple[str, ...]:
    """The single parameters to train with what is tied to them; those that follow a trained module are not among
    them."""
    tied = tied_names(model) if names and keep else {}
    follow = {tie.full for tie in ties}
    both = dict.fromkeys(other for name in names for other in (name, *sorted(tied.get(name, ()))))
    known = {name for name, _ in base_modules(model)}  # a module at two places counts once
    return tuple(name for name in both if name not in follow and name.rpartition(".")[0] in known)


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
        if ties := ties_of(model, to_train(spec, modules)[0], modules):
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


def check_parameters(sites: Iterable[tuple[Site, Method]], parameters: Sequence[str]) -> None:
    """Raise where a site's weight is trained by itself, or a bias that its method changes."""
    for site, method in sites:
        weight, bias = (f"{site.owner}.{n}".lstrip(".") if n else None for n in (site.weight, site.bias))
        if weight in parameters:
            raise TargetError(f"{site.name!r} is both a target and trained in full ({weight!r}): choose one")
        if bias in parameters and (instead := method.adds_bias(site)) is not None:
            raise TargetError(
                f"{site.name!r}: {type(method).__name__} changes the bias there, and {bias!r} is trained in full too: "
                f"leave it out of train, or {instead}"
            )
