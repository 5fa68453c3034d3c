"""LoRA as HF PEFT stores it (0.21): `<site>.lora_A.weight (r, in)`, `<site>.lora_B.weight (out, r)`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....passes.methods.lora import LoRA
from ....rewriter.adapter_tensors import AdapterTensors
from ....rewriter.base_names import base_modules
from ....rewriter.errors import CheckpointError, listing
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder
from ..foreign.format import Format, OwnAdapter, Written
from ..foreign.peft_attention import COUNTED_TWICE, TIMES, our_name, stored_name, stored_output, whole_attentions
from ..foreign.peft_convolutions import is_convolution, opened, stored, stored_method
from ..foreign.peft_folder import BIASES, check_config, check_sites, peft_sites
from ..foreign.peft_parameters import WrappedParameter, stored_factors, take_parameters, wrapped_parameters
from ..foreign.peft_targets import attention_outputs, pattern_value
from ..foreign.plain_keys import PREFIX

FIELDS = frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"})


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    check_config(folder, FIELDS | {"target_parameters"}, BIASES["LORA"])
    tables, rest = folder.by_site(folder.tensors, rf"{re.escape(PREFIX)}(?P<site>.+)\.lora_embedding_(?P<name>[AB])")
    sites, train, values = peft_sites(folder, r"(?P<name>lora_[AB])\.weight", rest)
    for site, given in tables.items():
        _check_padding(folder, site, given)
        sites[site] = {f"lora_{letter}": tensor for letter, tensor in given.items()}
    parameters, factors = take_parameters(folder, sites)
    attentions = whole_attentions(sites, folder.modules)
    outputs = {stored_output(path): path for path in attentions}
    if attentions and folder.value("fan_in_fan_out", bool, False):
        raise CheckpointError(
            f"{what}: fan_in_fan_out=True in its config, with which PEFT transposes the deltas of "
            f"nn.MultiheadAttention ({listing(attentions)}) too: train these and the Conv1D layers as two adapters"
        )
    layers = {site: given for site, given in sites.items() if site not in outputs}
    check_sites(folder, layers, ("lora_A", "lora_B"), others=bool(parameters))
    folder.all_there({place: sites.get(place, {}) for place in outputs}, ("lora_A", "lora_B"))
    uncalled, warning = attention_outputs(folder.model), ""
    if inert := [site for site in sites if site in uncalled]:
        if len(inert) == len(sites):
            raise CheckpointError(f"{what} does nothing: nn.MultiheadAttention never calls {listing(inert)}")
        warning = (
            f"nn.MultiheadAttention never calls {listing(inert)}: in PEFT these factors do nothing, and they are left "
            "out here"
        )
    kept = {site: given for site, given in sites.items() if site not in uncalled}
    methods = {}
    for place, given in kept.items():
        site = our_name(place, attentions)
        twice = TIMES if place in outputs else 1
        methods[site] = lora_at(folder, outputs.get(place, place))  # an attention has one config for both
        if is_convolution(layer := folder.modules.get(site)):
            given, methods[site] = opened(layer, given, methods[site], site, what)
        values |= {f"{site}.A": given["lora_A"], f"{site}.B": given["lora_B"] * twice}
    methods |= {site: lora_at(folder, wrapped.full) for site, wrapped in parameters.items()}
    if attentions:
        warning = "; ".join(filter(None, [warning, COUNTED_TWICE.format(listing(attentions))]))
    acting = {f"{path}.out_proj" for path in attentions}
    return ForeignAdapter(methods, values | factors, train, warning, read_by_parent=acting)


def _check_padding(folder: ForeignFolder, site: str, given: Mapping[str, Tensor]) -> None:
    """Raise where an adapter changes the row of an embedding's `padding_idx`, which no training does."""
    padding = getattr(folder.modules.get(site), "padding_idx", None)
    factor = given.get("A")
    if padding is None or factor is None or factor.dim() != 2 or not -factor.shape[1] <= padding < factor.shape[1]:
        return
    if factor[:, padding].any():
        raise CheckpointError(
            f"{folder.what} changes row {padding} of the embedding {site!r}, its padding_idx, which training leaves as "
            "it is and so do adapters here: set padding_idx=None on the embedding first, if that is meant"
        )


def _stored(name: str, letter: str, module: AdapterTensors, times: int) -> tuple[str, Tensor]:
    """Key and tensor of a factor; of an embedding's A without the padding entry, which takes no part here.

    `times` is how often PEFT counts the product.
    """
    tensor = module.tensors()[letter]
    assert module.site is not None
    if not module.site.product.one_hot:
        return f"{PREFIX}{name}.lora_{letter}.weight", tensor / times if letter == "B" and times != 1 else tensor
    padding = getattr(module.site.product, "padding_idx", None)
    if letter == "A" and padding is not None:
        tensor = tensor.detach().clone()
        tensor[:, padding] = 0
    return f"{PREFIX}{name}.lora_embedding_{letter}", tensor


def lora_at(folder: ForeignFolder, site: str) -> LoRA:
    """The LoRA a config describes at one site, `rank_pattern` and `alpha_pattern` applied as PEFT does."""
    rank, alpha = folder.value("r", int, 8), folder.value("lora_alpha", float, 8)
    return LoRA(
        rank=pattern_value(folder.value("rank_pattern", dict, {}), site, rank, folder.what),
        alpha=pattern_value(folder.value("alpha_pattern", dict, {}), site, alpha, folder.what),
        dropout=folder.value("lora_dropout", float, 0.0),
        rslora=folder.value("use_rslora", bool, False),
    )


def write(adapter: OwnAdapter) -> Written:
    attentions, wrapped = adapter.attentions, _parameters(adapter)
    layers = dict(base_modules(adapter.root))
    convolutions = {n: layers[n] for n in adapter.sites if is_convolution(layers.get(n))}
    methods = {stored_name(name, attentions): method for name, method in adapter.methods.items()}
    methods |= {name: stored_method(layer, methods[name]) for name, layer in convolutions.items()}
    for path in attentions:  # one config for both, under its own name
        methods.pop(stored_output(path))
    common = Counter(methods.values()).most_common(1)[0][0]
    ranks, alphas = {}, {}
    for name, method in methods.items():
        # a key of PEFT's patterns that matches this name alone: without `^` it would match it as an ending too
        known_as = wrapped[name].full if name in wrapped else name
        alone, alpha = f"^{re.escape(known_as)}", method.alpha
        if method.rslora != common.rslora:  # PEFT has one use_rslora; where a site differs, its alpha makes up for it
            alpha = method.scale * (method.rank**0.5 if common.rslora else method.rank)
        if method.rank != common.rank:
            ranks[alone] = method.rank
        if alpha != common.alpha:
            alphas[alone] = _number(alpha)
    fields = {
        "peft_type": "LORA",
        "r": common.rank,
        "lora_alpha": _number(common.alpha),
        "lora_dropout": adapter.one((m.dropout for m in methods.values()), "lora_dropout"),
        "use_rslora": common.rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": adapter.on_conv1d,
        "init_lora_weights": True,
    }
    if attentions and fields["fan_in_fan_out"]:
        raise CheckpointError(
            f"{adapter.what}: beside Conv1D layers PEFT transposes the deltas of nn.MultiheadAttention "
            f"({listing(attentions)}). Save it with format='fxgraft'"
        )
    if wrapped:
        fields["target_parameters"] = [parameter.full for parameter in wrapped.values()]
        if fields["lora_dropout"] or fields["fan_in_fan_out"]:
            other = "dropout" if fields["lora_dropout"] else "Conv1D layers"
            raise CheckpointError(
                f"{adapter.what}: PEFT takes no {other} beside parameters, such as {listing(wrapped, 2)}. Save it with "
                "format='fxgraft'"
            )
    outputs = {stored_output(path) for path in attentions}
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.sites.items():
        if name in wrapped:
            factors = stored_factors(wrapped[name], module.tensors()["A"], module.tensors()["B"])
            tensors |= {f"{PREFIX}{key}": tensor for key, tensor in factors.items()}
        elif name in convolutions:
            pair = stored(convolutions[name], module.tensors()["A"], module.tensors()["B"], name, adapter.what)
            tensors |= {f"{PREFIX}{name}.lora_{at}.weight": t for at, t in zip("AB", pair, strict=True)}
        else:
            place = stored_name(name, attentions)
            tensors |= dict(_stored(place, letter, module, TIMES if place in outputs else 1) for letter in "AB")
    return fields, tensors


def _parameters(adapter: OwnAdapter) -> dict[str, WrappedParameter]:
    """The sites that PEFT adapts as parameters."""
    if not adapter.parameters:
        return {}
    names = [f"{adapter.sites[name].site.owner}.{adapter.sites[name].site.weight}" for name in adapter.parameters]  # type: ignore[union-attr]
    modules = dict(base_modules(adapter.root))
    return {found.site: found for found in wrapped_parameters({"target_parameters": names}, modules, adapter.what)}


def _number(given: float) -> Any:
    return int(given) if float(given).is_integer() else given


FORMAT = Format(
    read, names="lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector", peft_type="LORA", method=LoRA, write=write
)
