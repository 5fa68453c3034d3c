"""Adapter checkpoints of our own: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

The config carries the format version, the spec, the sites with their shapes, a hash of what is derived from it, and the
versions that wrote it; the tensors are what `adapter_state` returns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.aot.loaded_package import register_folder_reader
from ...rewriter.adapter_state import AdapterState, SiteMethod
from ...rewriter.errors import CheckpointError, SpecError, listing
from ...rewriter.graft_plan import Plan
from ...rewriter.method import Method
from ...rewriter.modules.shards import full, on_first
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.parts import cut_from
from ...rewriter.sites import beside
from ...rewriter.spec import Spec
from ...rewriter.state import record_of
from ...rewriter.tensors import live_state
from .derived_hash import IN_CONFIG, check_derived, derived_hash
from .folder_files import CONFIG, WEIGHTS, Stored, check_config_is_theirs, read_folder, writable, write_folder
from .graft_values import filled
from .stored_cuts import CUTS, StoredCut, exact_targets, names_here, read_cuts, renamed, stored_cuts

FORMAT, FORMAT_VERSION = "fxgraft", 1
ABOUT = frozenset({"versions"})
FITTED = "fitted"  # in the config: sites that are too small for the spec have less than it says

Size = tuple[int, int]


def save_own(
    adapted: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    values: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one adapter to a folder (made if needed) and return the folder.

    Tensors tied to each other are written as they are; derived tensors are not written. An adapter already there is
    replaced only when the new one is complete.

    Args:
        values: tensors to write in place of the model's own, in the names of `adapter_state`: those gathered from
            several processes.
    """
    root = unwrap(adapted)
    record = record_of(root, name)
    live, values = live_state(root, name), values or {}
    tensors = {k: values[k] if k in values else full(t.detach()) for k, t in live.items()}
    tensors = writable(tensors, name)
    try:
        own = version("fxgraft")
    except PackageNotFoundError:  # run from a source tree
        own = "source"
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": record.spec.to_dict(),
        "sites": {s.name: [s.out_features, s.in_features] for s in record.sites},
        **stored_cuts(record.sites),
        **({FITTED: True} if record.fitted else {}),
        "versions": {"fxgraft": own, "torch": torch.__version__},
    }
    if (derived := derived_hash(root, name)) is not None:
        config[IN_CONFIG] = derived
    here = [] if values else live.values()  # whoever gathered them says which process writes
    on_first(here, lambda: write_folder(directory, config, tensors))
    return Path(directory)


def is_own(stored: Stored) -> bool:
    """Whether a folder is in this format."""
    return stored.config.get("format") == FORMAT


def load_own(model: M, stored: Stored, name: str) -> M:
    """Graft an adapter of ours; the input model is not changed, and nothing is returned unless all of it fits.

    Raises:
        CheckpointError: the files are damaged, of a newer version, or made for another model.
    """
    what = stored.what
    spec, sites, cuts = _read_spec(stored)

    names = names_here(model, sites, cuts)
    if names:
        spec = replace(spec, targets=exact_targets(sites, names), exclude=())
    wanted = {names.get(site, site): size for site, size in sites.items()}

    def fits(plan: Plan) -> None:
        here = {site.name: (site.out_features, site.in_features) for site in plan.sites}
        if here != wanted:
            raise CheckpointError(_other_model(wanted, here, f"{what} was made for another model than this {kind}"))
        for site in plan.sites:
            there = cuts.get(site.stem, StoredCut()).plain
            if there != site.plain_cut and site.name not in names.values():
                raise CheckpointError(
                    f"{what} was made for another model than this {kind}: {site.stem!r} is cut into "
                    f"{cut_from(there) if there else 'equal parts'} there, and into {site.cut or 'no parts'} here"
                )

    kind = type(unwrap(model)).__name__
    hint = "The adapter was saved for another model or by another program"
    tensors = {renamed(key, names): tensor for key, tensor in stored.tensors.items()} if names else stored.tensors
    adapted = filled(
        model, spec, name, tensors, what, order=list(wanted), fits=fits, hint=hint, keep=True, fit=_is_fitted(stored)
    )
    check_derived(adapted, name, stored, {here: there for there, here in names.items()})
    return adapted


def _other_model(there: Mapping[str, Size], here: Mapping[str, Size], what: str) -> str:
    missing, extra = [n for n in there if n not in here], [n for n in here if n not in there]
    differing = [f"{n}: {there[n]} there, {here[n]} here" for n in there if n in here and there[n] != here[n]]
    return (
        f"{what} (shapes are out x in):"
        + (f" missing here {listing(missing, 4)};" if missing else "")
        + (f" unknown there {listing(extra, 4)};" if extra else "")
        + (f" {'; '.join(differing[:4])}" if differing else "")
    )


def _read_spec(stored: Stored) -> tuple[Spec, dict[str, Size], dict[str, StoredCut]]:
    """The spec of a folder of ours, its sites `(out, in)` in the order they count in, and how their weights are cut."""
    config, what = stored.config, stored.what
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{what} has format version {version!r}, this fxgraft reads {FORMAT_VERSION}; update fxgraft"
        )
    if missing := [k for k in ("spec", "sites") if not isinstance(config.get(k), dict)]:
        raise CheckpointError(f"{what}: {CONFIG} lacks {listing(missing)}")
    if not stored.weights:
        raise CheckpointError(f"{what}: {WEIGHTS} is missing")
    try:
        spec = Spec.from_dict(config["spec"])
    except SpecError as error:
        raise CheckpointError(f"{what}: {error}") from error
    sites = _sites(config["sites"], what)
    check_config_is_theirs(stored, ABOUT)
    return spec, sites, read_cuts(config.get(CUTS, {}), what)


def _is_fitted(stored: Stored) -> bool:
    given = stored.config.get(FITTED, False)
    if not isinstance(given, bool):
        raise CheckpointError(f"{stored.what}: {FITTED!r} in its {CONFIG} is {given!r}, expected true or false")
    return given


def _sites(given: Mapping[str, Any], what: str) -> dict[str, Size]:
    for name, shape in given.items():
        if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
            raise CheckpointError(f"{what}: the site {name!r} in its {CONFIG} is {shape!r}, expected [out, in]")
    return {name: (out_features, in_features) for name, (out_features, in_features) in given.items()}


def read_state(directory: str | os.PathLike[str]) -> AdapterState:
    """The tensors of a folder that `save_adapter` wrote in fxgraft's format, with the methods they are of.

    Raises:
        CheckpointError: the folder is damaged, or another program's: its names mean something only beside the model.
    """
    stored = read_folder(directory)
    if not is_own(stored):
        raise CheckpointError(
            f"{stored.what} is not in fxgraft's own format: load it with fg.load_adapter(model, folder) and give the "
            "fg.adapter_state of that"
        )
    return own_state(stored)


def own_state(stored: Stored) -> AdapterState:
    """The state in a folder of ours, without the model: for whoever has none, such as a package."""
    spec, sites, cuts = _read_spec(stored)
    groups: dict[Method, int] = {}
    methods = {}
    for name, (out_features, in_features) in sites.items():
        stem, _, part = name.removesuffix("]").partition("[")  # a part of a fused weight answers to more names
        cut = cuts.get(stem, StoredCut())
        names = (name, stem, *(beside(stem, alias) for alias in (cut.names[int(part)] if part and cut.names else ())))
        method = spec.method_at(names)
        method = method.fitted(out_features, in_features) if _is_fitted(stored) else method
        group = groups.setdefault(method, len(groups))
        methods[name] = SiteMethod(method, out_features, in_features, group, cut.plain if part else ())
    return AdapterState(stored.tensors, methods)


register_folder_reader(read_state)
