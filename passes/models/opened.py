"""Adapted model -> twin that computes its adapters from tensors a graph can take as inputs.

    fxgraft::<method>(x, ...)        ->  the method's form, plain products of x and the tensors; low-rank: (x A) B
    fxgraft::bank_<...>(x, ids, ...) ->  the same with the tensors of every sample's slot
    W, b of a method without a form  ->  W', b' in whole (GLoRA)

Does not handle a method that has none of the three: it is refused with the reason.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...rewriter.adapter_tensors import AdapterTensors
from ...rewriter.base_names import base_modules, lookup
from ...rewriter.create import graft_adapter
from ...rewriter.errors import MergeError
from ...rewriter.forms import Form, form_of
from ...rewriter.method import Method, Tensors
from ...rewriter.modules.wrappers import strip_wrappers, unwrap
from ...rewriter.products.stacked_matrices import each
from ...rewriter.sites import Site
from ...rewriter.spec import Spec
from ...rewriter.state import find_state, record_of
from ...rewriter.switch import base_of
from ...rewriter.tensors import adapter_modules, trained_modules
from ..methods.dense_form import Dense
from ..methods.low_rank_factors import widened
from ..methods.low_rank_form import Factors
from .factors import compute_dtype, sites_as_targets
from .merge import fold_weights, follow, put_values

FORMS = "factors"  # name of the adapter in a twin

Placed = dict[str, tuple[Form, dict[str, Tensor]]]  # site name -> its form in the twin, the tensors


@dataclass(frozen=True)
class Twin:
    """A model over the same base tensors whose adapters are plain tensors.

    Args:
        module: the twin; modules the adapter trains stand under their base keys with the trained values.
        sites: site name -> the form there and its tensors, in the dtype of the base weight.
        keys: site name -> tensor of the form -> its state-dict key in the twin.
        whole: state-dict key -> merged tensor, of the sites without a form.
        heads: base state-dict key of a head the tenants train -> the stack of its differences: its key in the twin, and
            its values.
    """

    module: nn.Module
    sites: Placed
    keys: dict[str, dict[str, str]]
    whole: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


def read_form(method: Method, site: Site, shared: Tensors, local: Tensors) -> tuple[Form, dict[str, Tensor]]:
    """The form of one site and its tensors, from the method's own; computed in float32 (or wider)."""
    form = form_of(method)
    if form is None:
        raise MergeError(f"{type(method).__name__} has no form a graph takes as inputs: {method.not_low_rank}")
    read = functools.partial(form.read, method, widened(shared))
    return form.opened(each(site, read, widened(local)))


def _whole(tensors: AdapterTensors) -> bool:
    """Whether a site can be given to a graph as its whole weight only."""
    return tensors.site is not None and form_of(tensors.method) is None


@torch.no_grad()
def form_values(adapted: nn.Module, name: str) -> Placed:
    """For each site that has a form the form and its tensors, contiguous, in the dtype of the base weight."""
    root = unwrap(adapted)
    found = {}
    for _, tensors in adapter_modules(root, name, record_of(root, name)):
        site = tensors.site
        if site is None or _whole(tensors):
            continue
        form, values = read_form(tensors.method, site, tensors.shared_tensors(), tensors.tensors())
        dtype = compute_dtype(root, site)
        found[site.name] = form, {key: value.to(dtype).contiguous() for key, value in values.items()}
    return found


def whole_weights(adapted: nn.Module, name: str) -> dict[str, Tensor]:
    """State-dict key -> merged weight, and bias, of every site that has no form. A bias the base lacks is there too,
    as some paths of a method add one."""
    root = unwrap(adapted)
    replaced = fold_weights(root, name, _whole)
    for path, attribute in list(replaced):
        owner, key = lookup(root, path), (path, "bias")
        if attribute != "bias" and key not in replaced and "bias" in owner._parameters:
            replaced[key] = _bias(owner, replaced[path, attribute], _site_at(root, name, path))
    return {f"{path}.{attribute}".lstrip("."): tensor for (path, attribute), tensor in replaced.items()}


def _site_at(root: nn.Module, name: str, path: str) -> Site:
    return next(site for site in record_of(root, name).sites if site.owner == path)


def _bias(owner: nn.Module, weight: Tensor, site: Site) -> Tensor:
    own = owner._parameters["bias"]
    return weight.new_zeros(site.produced(weight)) if own is None else own.detach()


def base_weights(base: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the base model has at the keys of `whole_weights`; zeros for a bias it lacks."""
    state = base.state_dict()
    return {key: state[key].detach() if key in state else torch.zeros_like(tensor) for key, tensor in whole.items()}


def opened(adapted: nn.Module, name: str = "default") -> Twin:
    """The twin of a model with the one adapter, in the mode (train or eval) of the model.

    Raises:
        MergeError: a site's method has no form and cannot be folded into the weight either; the text says why.
    """
    root = unwrap(adapted)
    record = record_of(root, name)
    values, whole = form_values(root, name), whole_weights(root, name)
    plain = strip_wrappers(base_of(root))
    modules = dict(base_modules(plain))
    for path, module in trained_modules(root, name, record).items():
        put_values(modules[path], module)
    follow(plain, record.ties)
    for key, tensor in whole.items():
        path, _, attribute = key.rpartition(".")
        modules[path].register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
    module, keys = _grafted(plain, record.sites, values)
    return Twin(module, values, keys, whole)


@torch.no_grad()
def opened_bank(banked: nn.Module, name: str, slots: int) -> Twin:
    """The twin of a bank: stacks of the first `slots` slots."""
    root = unwrap(banked)
    record = record_of(root, name)
    placed: Placed = {}
    for _, stacks in adapter_modules(root, name, record):
        if (site := stacks.site) is None:
            continue
        assert isinstance(stacks.method, Form)
        form, tensors = _stacks(stacks.method, widened(stacks.shared_tensors()), widened(stacks.tensors()), slots)
        dtype = compute_dtype(root, site)
        placed[site.name] = form, {key: stack.to(dtype).contiguous() for key, stack in tensors.items()}
    module, keys = _grafted(strip_wrappers(base_of(root)), record.sites, placed)
    copy_rows(root, name, module)
    heads = {
        f"{site.owner}.{key}".lstrip("."): (keys[site.name][key], stack)
        for site in record.sites
        if isinstance(placed[site.name][0], Dense)
        for key, stack in placed.pop(site.name)[1].items()
    }
    return Twin(module, placed, keys, heads=heads)


def _stacks(form: Form, shared: Tensors, local: Tensors, slots: int) -> tuple[Form, dict[str, Tensor]]:
    """The stacks of one site, as a graph takes them, with this many slots."""
    if not form.derives:
        return form.opened({key: stack[:slots] for key, stack in local.items()}, slots)
    entries = []  # one adapter after the other is read into factors
    for slot in range(slots):
        common = {key: tensor[slot] if key in form.shared_axes else tensor for key, tensor in shared.items()}
        own = {key: tensor[slot] if key in form.axes else tensor for key, tensor in local.items()}
        entries.append(Factors.read(form, common, own))
    return Factors.opened({key: torch.stack([entry[key] for entry in entries]) for key in Factors.axes}, slots)


def copy_rows(banked: nn.Module, name: str, twin: nn.Module) -> None:
    """Tell the sites of a bank's twin what was found out about the bank's: how the samples lie in their inputs."""
    sites = (tensors for _, tensors in adapter_modules(banked, name, record_of(banked, name)))
    rows = {tensors.site.name: tensors.rows for tensors in sites if tensors.site is not None}
    if find_state(twin) is not None:
        for _, tensors in adapter_modules(twin, FORMS, record_of(twin, FORMS)):
            if tensors.site is not None:
                tensors.rows = rows[tensors.site.name]


def _grafted(plain: nn.Module, sites: Sequence[Site], placed: Placed) -> tuple[nn.Module, dict[str, dict[str, str]]]:
    """Graft these methods with these tensors; the model, and site -> tensor -> state-dict key."""
    sites = [site for site in sites if site.name in placed]
    if not sites:
        return plain, {}
    names: dict[Form, list[str]] = {}
    for name, (form, _) in placed.items():
        names.setdefault(form, []).append(_weight_name(name))
    main = max(names, key=lambda form: len(names[form]))
    targets = sites_as_targets(sites)
    overrides = {f"re:{'|'.join(dict.fromkeys(names[form]))}": form for form in names if form != main}
    dtypes = {tensor.dtype for _, tensors in placed.values() for tensor in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    spec = Spec(main, targets=targets, overrides=overrides)
    twin = graft_adapter(plain, spec, FORMS, dtype=dtype, initialise=False)
    keys = {}
    with torch.no_grad():
        for _, tensors in adapter_modules(twin, FORMS, record_of(twin, FORMS)):
            if tensors.site is None:
                continue
            site = tensors.site
            stem = ".".join(part for part in (site.owner, "fxgraft", FORMS, site.key) if part)
            for key, value in placed[site.name][1].items():
                tensors.tensors()[key].copy_(value)
            keys[site.name] = {key: f"{stem}.{key}" for key in tensors.tensors()}
    return twin, keys


def _weight_name(site: str) -> str:
    return re.escape(site.rpartition("[")[0] if site.endswith("]") else site)
