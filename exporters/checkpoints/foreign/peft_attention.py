"""PEFT's LoRA on a whole `nn.MultiheadAttention`: one on the packed projection and one on the output's, of one config.

    X.lora_A, X.lora_B                                          ->  X.in_proj_weight
    X.base_layer.out_proj.lora_A, X.base_layer.out_proj.lora_B  ->  X.out_proj

The output's delta counts twice there (`TIMES`). An `X.out_proj.lora_A` does nothing: PEFT's layer acts when it is
called, and the attention reads its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ....rewriter.capture.multihead_attention import is_attention
from ....rewriter.errors import CheckpointError
from ....rewriter.grafted_class import plain_view
from ....rewriter.sites import Site
from ....rewriter.state import AdapterRecord

PACKED, OUTPUT = "in_proj_weight", "out_proj"
TIMES = 2  # PEFT 0.21 adds the delta of the output projection twice, in its forward and when it merges
COUNTED_TWICE = (
    "PEFT 0.21 adds the delta of an nn.MultiheadAttention's out_proj twice, in {}: here its B is twice what the folder "
    "holds, so that the model computes what it computes there"
)


def takes_whole(module: nn.Module) -> bool:
    """Whether PEFT's LoRA adapts this module as an attention."""
    return is_attention(plain_view(module)) and module._parameters.get(PACKED) is not None


def attention_of(site: Site, modules: Mapping[str, nn.Module]) -> str | None:
    """The path of the attention whose projection a whole site is; None for any other."""
    path = site.owner if site.weight == PACKED else site.host
    module = None if path is None else modules.get(path)
    if not path or not site.whole or module is None or not takes_whole(module):
        return None
    return path if site.weight == PACKED or site.within == OUTPUT else None


def whole_attentions(places: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The places of a folder that are attentions."""
    return [place for place in places if place in modules and takes_whole(modules[place])]


def stored_output(path: str) -> str:
    """Where PEFT has the output projection of an attention."""
    return f"{path}.base_layer.{OUTPUT}"


def our_name(place: str, attentions: Iterable[str]) -> str:
    """The name of our site at a place of a folder."""
    names = {path: f"{path}.{PACKED}" for path in attentions}
    return (names | {stored_output(path): f"{path}.{OUTPUT}" for path in names}).get(place, place)


def stored_name(name: str, attentions: Iterable[str]) -> str:
    """The inverse of `our_name`."""
    path, _, last = name.rpartition(".")
    if path not in attentions:
        return name
    return path if last == PACKED else stored_output(path)


def targets_of(names: Iterable[str], attentions: Iterable[str]) -> list[str]:
    """The modules that PEFT adapts for these sites: an attention brings its output projection along."""
    places = [stored_name(name, attentions) for name in names]
    outputs = {stored_output(path) for path in attentions}
    return [place for place in places if place not in outputs]


def adapted_attentions(record: AdapterRecord, modules: Mapping[str, nn.Module], what: str) -> list[str]:
    """The attentions with an adapter on both projections. Raises where these are of two configs."""
    methods = {site.name: group.method for group in record.groups for site in group.sites}
    found = dict.fromkeys(path for site in record.sites if (path := attention_of(site, modules)) is not None)
    both = [path for path in found if {f"{path}.{PACKED}", f"{path}.{OUTPUT}"} <= methods.keys()]
    for path in both:
        packed, output = methods[f"{path}.{PACKED}"], methods[f"{path}.{OUTPUT}"]
        if packed != output:
            raise CheckpointError(
                f"{what}: PEFT has one rank and alpha for the {PACKED} and the {OUTPUT} of {path!r}, and here they are "
                f"{packed} and {output}: save it with format='fxgraft'"
            )
    return both
