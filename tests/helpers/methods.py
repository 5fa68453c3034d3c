"""The methods that tests run over: a line in `METHODS` gives a method all of its coverage.

The configs fit every small model of the tests (layers of 3 to 48 features). What a method can do is asked of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import fxgraft as fg
from fxgraft.passes.methods.lora_sb.lora_sb import UpdateEstimate, pack_signs
from fxgraft.rewriter.forms import forms_of
from fxgraft.rewriter.method import Method
from fxgraft.rewriter.products.stacked_matrices import all_matrices
from fxgraft.rewriter.state import record_of

METHODS: dict[str, Method] = {
    "lora": fg.LoRA(rank=2),
    "lora_xs": fg.LoRAXS(rank=3),
    "lora_sb": fg.LoRASB(rank=3),
    "unilora": fg.UniLoRA(rank=2, vector_length=20, init_bound=0.5),
    "prolora": fg.PRoLoRA(rank=4, unshared=1, a_chunks=2, b_chunks=3),
    "hydralora": fg.HydraLoRA(rank=2, experts=3),
    "glora": fg.GLoRA(rank=2, path=fg.GLoRAPath("lora", "vector", "lora", "vector", "vector")),
    "glora rows": fg.GLoRA(rank=2, path=fg.GLoRAPath("vector", "lora", "none", "none", "none")),
    "supernet": fg.GLoRA(rank=2),
    "vera": fg.VeRA(rank=4, d_initial=0.5),
}


def supernet(method: Method) -> bool:
    """Whether it holds all paths, draws one at every training step, and is no function that could be merged."""
    return isinstance(method, fg.GLoRA) and method.path is None


#: one function of its tensors, in training too
FIXED = {name: m for name, m in METHODS.items() if not supernet(m)}
#: whose adapters are a product `B A` at every site
LOW_RANK = {name: m for name, m in METHODS.items() if m.not_low_rank is None}
MERGEABLE = {name: m for name, m in FIXED.items() if m.unmergeable is None}
#: several of whose adapters one model can hold, for every sample its own
BANKED = {name: m for name, m in METHODS.items() if forms_of(m)}


_SITE = record_of(fg.rewrite(torch.nn.Linear(3, 3), fg.Spec(fg.LoRA(1))), "default").sites[0]
#: that change no bias, and so fit a product that has none
BIAS_FREE = {name: m for name, m in METHODS.items() if not m.adds_bias(_SITE)}


def needs_estimate(method: Method) -> bool:
    """Whether it starts from an estimate of the first update."""
    return isinstance(method, fg.LoRASB)


def graft(model: Any, spec: fg.Spec, name: str = "default", **options: Any) -> Any:
    """`fg.rewrite`; a method that starts from an estimate of the first update is given one of random signs."""
    if needs_estimate(spec.method):
        options["update"] = estimate(model, spec)
    return fg.rewrite(model, spec, name=name, **options)


def estimate(model: Any, spec: fg.Spec) -> UpdateEstimate:
    """An update of random signs for the sites of a spec."""
    model = model.module(check_guards=False) if isinstance(model, torch.export.ExportedProgram) else model
    like = fg.rewrite(model, dataclasses.replace(spec, method=fg.LoRA(rank=1), train=()), name="like")
    shapes = {s.name: (s.out_features, s.in_features) for s in all_matrices(record_of(like, "like").sites)}
    drawn = torch.Generator().manual_seed(0)
    packed = {site: pack_signs(torch.randn(shape, generator=drawn)) for site, shape in shapes.items()}
    return UpdateEstimate(0.05, packed, shapes, 1, {"cpu": 0}, 0)
