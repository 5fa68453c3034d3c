"""Patterns -> sites. A pattern that matches nothing, or something that cannot be adapted, is an error."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .analysis.dataflow import tied_names
from .bounded_regex import full_match
from .capture.parent_reads import reader_of
from .capture.trace import trace
from .errors import AdapterError, CaptureError, TargetError, listing, near_misses
from .grafted_class import base_class, plain_view
from .method import Method
from .sites import LinearNode, NoMatch, Site, find_linears
from .spec import ALL_LINEAR, Spec, Target
from .state import Tie, base_modules, base_parameters, find_state, unwrap

#: last path components that name an output head in models that do not declare one
HEAD_NAMES = frozenset(
    {
        *("lm_head", "head", "heads", "classifier", "score", "cls", "qa_outputs"),
        *("embed_out", "output_layer", "output_projection", "prediction_head", "fc_out"),
    }
)
_NOT_LINEAR = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(frozen=True)
class Resolution:
    """The sites of a spec in model order, each with its method, and the modules to train in full."""

    sites: tuple[tuple[Site, Method], ...]
    train: tuple[str, ...]
    ties: tuple[Tie, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A 2-d parameter that may turn out to be a linear weight."""

    name: str
    owner: str
    attribute: str


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches: `re:` the whole name, globs from any component on, else a name ending."""
    if pattern.startswith("re:"):
        return full_match(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def _is_name(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def _candidates(modules: Mapping[str, nn.Module]) -> dict[str, _Candidate]:
    found = {}
    for path, module in modules.items():
        if isinstance(module, _NOT_LINEAR):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 2:
                name = path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
                found[name] = _Candidate(name, path, attribute)
    return found


def output_heads(model: nn.Module) -> set[str]:
    """Paths of the modules that produce the model's output.

    They are: what `get_output_embeddings()` names; a linear tied to an embedding; in a transformers model with a head,
    everything outside `base_model`; in any other model, modules whose last name is one of `HEAD_NAMES`.
    """
    modules = dict(base_modules(model))
    paths = {id(m): path for path, m in modules.items()}
    heads = set()
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if callable(get_output_embeddings):
        try:
            head = get_output_embeddings()
            heads.add(paths.get(id(unwrap(head))) if isinstance(head, nn.Module) else None)
        except (NotImplementedError, AttributeError):
            heads.discard(None)  # transformers raises these for models without one
    embeddings = {path for path, m in modules.items() if isinstance(m, nn.Embedding)}
    for name, names in tied_names(model).items():
        owner, _, _ = name.rpartition(".")
        if owner not in embeddings and any(other.rpartition(".")[0] in embeddings for other in names):
            heads.add(owner)
    base = getattr(model, "base_model", None)
    base = unwrap(base) if isinstance(base, nn.Module) else None
    if base is not None and base is not model and id(base) in paths:
        inside = paths[id(base)]
        heads |= {path for path in modules if path and path != inside and not path.startswith(inside + ".")}
    elif not hasattr(model, "base_model"):
        heads |= {path for path in modules if path.rpartition(".")[2] in HEAD_NAMES}
    heads.discard(None)
    return {str(head) for head in heads}


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _sites_of(model_modules: Mapping[str, nn.Module], candidate: _Candidate) -> LinearNode | NoMatch:
    """The product a candidate takes part in, from the trace of its owner alone."""
    owner = model_modules[candidate.owner]
    parent = model_modules.get(candidate.owner.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return NoMatch(
            "nn.MultiheadAttention reads this weight without calling the layer: an adapter on it would be "
            "silently skipped; use separate projections"
        )
    reader = reader_of(model_modules, candidate.owner, candidate.attribute)
    if reader is not None:
        return _hosted(model_modules, candidate, reader)
    base = base_class(owner)
    if base.forward is nn.Module.forward:
        return NoMatch(f"{base.__name__} has no forward")
    try:
        graph = trace(plain_view(owner)).graph
    except CaptureError as error:
        return NoMatch(str(error))
    parameters = {n: p for n, p in owner._parameters.items() if p is not None}
    found = find_linears(graph, parameters)[candidate.attribute]
    return found if isinstance(found, NoMatch) else found[0]


def _hosted(modules: Mapping[str, nn.Module], candidate: _Candidate, reader: str) -> LinearNode | NoMatch:
    """The product in the graph of the module that reads the weight, where torch.fx can follow its forward."""
    host, within = modules[reader], candidate.owner[len(reader) + 1 if reader else 0 :]
    said = (
        f"{base_class(host).__name__} ({reader or 'the root'}) reads this weight without calling the layer: an adapter "
        "on it would be silently skipped"
    )
    try:
        graph = trace(plain_view(host)).graph
    except CaptureError as error:
        return NoMatch(f"{said}, and cannot be put into the product itself: {error}")
    if any(node.op == "call_module" and f"{within}.".startswith(f"{node.target}.") for node in graph.nodes):
        return NoMatch(f"{said} there, as the layer is called too")
    owner = modules[candidate.owner]
    tensors = {f"{within}.{name}": p for name, p in owner._parameters.items() if p is not None}
    found = find_linears(graph, tensors)[f"{within}.{candidate.attribute}"]
    if isinstance(found, NoMatch):
        return NoMatch(f"{said}, and cannot be put into the product itself: {found.reason}")
    bias = found[0].bias_name
    return replace(found[0], bias_name=None if bias is None else bias.rpartition(".")[2], host=reader)


def _make_sites(candidate: _Candidate, linear: LinearNode, weight: Tensor, target: Target | None) -> list[Site]:
    produced = weight.shape[1 - linear.contracted]
    parts = target.parts if target else 1
    if produced % parts:
        raise TargetError(
            f"Target({target.pattern!r}, parts={parts}): {candidate.name!r} produces {produced} features, "  # type: ignore[union-attr]
            f"which {parts} does not divide"
        )
    selected = target.select if target and parts > 1 else (0,)
    return [
        Site(
            name=candidate.name if parts == 1 else f"{candidate.name}[{part}]",
            owner=candidate.owner,
            weight=candidate.attribute,
            bias=linear.bias_name,
            in_features=weight.shape[linear.contracted],
            out_features=produced // parts,
            contracted=linear.contracted,
            offset=part * (produced // parts),
            part=part,
            parts=parts,
            dtype=weight.dtype,
            device=weight.device,
            form=linear.form,
            host=linear.host,
        )
        for part in selected
    ]


def _no_match(what: str, pattern: str, known: Iterable[str]) -> TargetError:
    known = list(known)
    close = near_misses(pattern.removeprefix("re:"), known) or sorted({n.rpartition(".")[2] for n in known})[:8]
    return TargetError(f"{what} {pattern!r} matches nothing in this model. Close names: {listing(close)}")


def _select(
    spec: Spec,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, _Candidate],
    heads: set[str],
    train: tuple[str, ...],
) -> dict[str, tuple[Target | None, bool]]:
    """Candidate name -> (its Target, whether it was asked for by more than `all-linear`)."""
    chosen: dict[str, tuple[Target | None, bool]] = {}
    for given in spec.targets:
        target = given if isinstance(given, Target) else None
        pattern = target.pattern if target else str(given)
        if pattern == ALL_LINEAR:
            hits = [n for n, c in candidates.items() if not _inside(c.owner, heads) and not _inside(c.owner, train)]
        else:
            hits = [name for name in candidates if matches(name, pattern)]
            others = [n for n in modules if n and matches(n, pattern) and n not in candidates]
            if others and (not hits or _is_name(pattern)):
                kinds = ", ".join(f"{n!r} is a {base_class(modules[n]).__name__}" for n in others[:4])
                inner = [n for n in candidates if n.startswith(others[0] + ".")]
                hint = f"; inside it are {listing(inner, 4)}" if inner else ""
                raise TargetError(
                    f"target {pattern!r} matches {len(others)} module(s) without a linear weight of their own: "
                    f"{kinds}{hint}. Name linear layers, or exclude these"
                )
        if not hits:
            raise _no_match("target", pattern, candidates)
        for name in hits:
            asked = pattern != ALL_LINEAR
            before = chosen.get(name)
            if before is not None and before[0] != target and (before[0] or target):
                raise TargetError(f"{name!r} is matched by two targets with different parts: {spec.targets}")
            chosen[name] = (target, asked or (before is not None and before[1]))
    for pattern in spec.exclude:
        # names of modules count too, so that excluding a block excludes what is inside
        blocks = [n for n in modules if n and matches(n, pattern)]
        gone = [n for n, c in candidates.items() if matches(n, pattern) or _inside(c.owner, blocks)]
        if not gone:
            raise _no_match("exclude", pattern, candidates)
        for name in gone:
            chosen.pop(name, None)
    if not chosen:
        raise TargetError(f"targets {list(spec.targets)} are all taken out again by exclude {list(spec.exclude)}")
    return chosen


def _train_modules(spec: Spec, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    train: list[str] = []
    for pattern in spec.train:
        hits = [n for n in modules if n and matches(n, pattern)]
        if not hits:
            raise _no_match("train", pattern, [n for n in modules if n])
        hits = [n for n in hits if not _inside(n.rpartition(".")[0], hits)]  # the outermost ones
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
                if not _inside(holder, train) and holder in modules:  # a module at two places counts once
                    found.setdefault(other, Tie(holder, attribute, path, name))
    return tuple(found.values())


def warn_untied(model: nn.Module, spec: Spec) -> None:
    """Say which parameters keep the base's values although a trained one was tied to them."""
    if spec.train and not spec.keep_ties:
        modules = dict(base_modules(model))
        if ties := ties_of(model, _train_modules(spec, modules), modules):
            warnings.warn(
                f"keep_ties=False unties {ties[0].trained!r} from {listing(tie.full for tie in ties)}, which keeps the "
                "base's values",
                stacklevel=3,
            )


def _check_ties(sites: Iterable[Site], ties: Iterable[Tie]) -> None:
    follows = {(tie.path, tie.attribute): tie for tie in ties}
    for site in sites:
        if (tie := follows.get((site.owner, site.weight))) is not None:
            raise TargetError(
                f"{site.name!r} is tied to {tie.trained!r}, which is trained in full and it with it: an adapter there "
                "would be on top of a weight that is trained already. Take one of them out, or set "
                "Spec(keep_ties=False), which unties them"
            )


def resolve(model: nn.Module, spec: Spec) -> Resolution:
    """Find every site of a spec. Reads the model and changes nothing.

    Raises:
        TargetError: a pattern matches nothing (near misses are listed) or something that cannot be adapted.
    """
    modules = dict(base_modules(model))
    candidates = _candidates(modules)
    train = _train_modules(spec, modules)
    chosen = _select(spec, modules, candidates, output_heads(model), train)

    sites: list[tuple[Site, Method]] = []
    left_out: list[str] = []
    used_overrides: set[str] = set()
    for name, candidate in candidates.items():
        if name not in chosen:
            continue
        target, asked = chosen[name]
        if _inside(candidate.owner, train):
            raise TargetError(f"{name!r} is both a target and inside a trained module ({list(train)}): choose one")
        linear = _sites_of(modules, candidate)
        if isinstance(linear, NoMatch):
            if asked:
                raise TargetError(f"{name!r} cannot be adapted: {linear.reason}. Exclude it or choose other targets")
            if isinstance(modules[candidate.owner], nn.Linear):
                left_out.append(f"{name} ({linear.reason})")
            continue
        weight: Any = modules[candidate.owner]._parameters[candidate.attribute]
        for site in _make_sites(candidate, linear, weight, target):
            # a part of a fused weight answers to its own name, `qkv[0]`, and to the weight's
            hits = [p for p in spec.overrides if matches(site.name, p) or matches(name, p)]
            used_overrides.update(hits)
            sites.append((site, spec.overrides[hits[0]] if hits else spec.method))
    for pattern in spec.overrides:
        if pattern not in used_overrides:
            raise _no_match("override", pattern, [site.name for site, _ in sites])
    if left_out:
        warnings.warn(f"{ALL_LINEAR!r} left out {len(left_out)} layer(s): {'; '.join(left_out[:4])}", stacklevel=3)
    if not sites:
        raise TargetError(f"{ALL_LINEAR!r} found no linear layer that can be adapted in this {type(model).__name__}")
    ties = ties_of(model, train, modules) if spec.keep_ties else ()
    _check_ties((site for site, _ in sites), ties)
    return Resolution(tuple(sites), train, ties)


def check_name(model: nn.Module, name: Any) -> None:
    """Raise `AdapterError` unless `name` can name a new adapter of this model."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"adapter name {name!r}: allowed are letters, digits, '_' and '-'")
    if hasattr(nn.Module, name) or name in ("shared", "method", "site"):
        raise AdapterError(f"adapter name {name!r} is taken by torch.nn.Module: choose another")
    state = find_state(model)
    if state is not None and name in state.adapters:
        raise AdapterError(
            f"this model already has an adapter {name!r}: choose another name, or fg.remove(model, {name!r}) first"
        )
