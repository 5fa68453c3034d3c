"""Functions that multiply with weights they are given, taken apart where a forward calls them, so that products show.

    F.multi_head_attention_forward(q, k, v, ..., W, b, ...)        WavLM, the pools of CLIP's ResNets
        ->  linear, linear, linear (or one, of the packed weight), attend, linear
    torchvision's shifted_window_attention(x, W_qkv, W_proj, ...)  Swin, v1 and v2
        ->  windows_of, linear, attend_windows, linear, from_windows
    F.linear(x, W, b) of a bias that is made of others             timm's BEiT and EVA02
        ->  F.linear(x, W) + b

What is not understood of a call stays as it is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..analysis.weight_views import origin
from .multihead_attention import attend, joined, parted, plus_third
from .shifted_windows import attend_windows, from_windows, windows_of, without_key


def open_known(graph: fx.Graph) -> None:
    """Take the calls of such functions apart, in place."""
    for node in list(graph.nodes):
        opening = _opening(node.target) if node.op == "call_function" else None
        if opening is None:
            continue
        with graph.inserting_before(node):
            result = opening(graph, node)
        if result is not None:
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _opening(target: Any) -> Callable[[fx.Graph, fx.Node], fx.Node | None] | None:
    if target is F.linear:
        return _linear
    if target is F.multi_head_attention_forward:
        return _attention
    named = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    return _shifted_windows if named == ("torchvision.models.swin_transformer", "shifted_window_attention") else None


def _bound(node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return bound.arguments


def _linear(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = [*node.args, *node.kwargs.values()]
    names = ["input", "weight", "bias"][: len(node.args)] + list(node.kwargs)
    bound = dict(zip(names, given, strict=False))
    if not isinstance(bound.get("bias"), fx.Node) or origin(bound["bias"]) is not None:
        return None
    product = graph.call_function(F.linear, (bound["input"], bound["weight"]))
    return graph.call_function(torch.add, (product, bound["bias"]))


def _biased(graph: fx.Graph, x: Any, weight: Any, bias: Any) -> fx.Node:
    """A product; a bias that is made of others is added behind it."""
    if bias is None or origin(bias) is not None:
        return graph.call_function(F.linear, (x, weight, bias))
    return graph.call_function(torch.add, (graph.call_function(F.linear, (x, weight)), bias))


def _attention(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = _bound(node)
    if given["static_k"] is not None or given["static_v"] is not None:
        return None
    if not isinstance(given["use_separate_proj_weight"], bool) or not isinstance(given["query"], fx.Node):
        return None
    inputs, bias = (given["query"], given["key"], given["value"]), given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        products = (
            graph.call_function(F.linear, (x, given[f"{name}_proj_weight"]))
            for x, name in zip(inputs, "qkv", strict=True)
        )
        projected = [graph.call_function(plus_third, (y, bias, i)) for i, y in enumerate(products)]
    else:
        x = graph.call_function(joined, (*inputs, False))
        y = _biased(graph, x, given["in_proj_weight"], bias)
        both = graph.call_function(parted, (y, *inputs, False))
        projected = [graph.call_function(operator.getitem, (both, i)) for i in range(3)]
    names = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "query", "need_weights", "average_attn_weights",
             "is_causal", "num_heads", "add_zero_attn", "dropout_p")  # fmt: skip
    both = graph.call_function(attend, (*projected, *(given[name] for name in names), False, given["training"]))
    context = graph.call_function(operator.getitem, (both, 0))
    result = _biased(graph, context, given["out_proj_weight"], given["out_proj_bias"])
    return graph.call_function(_pair, (result, graph.call_function(operator.getitem, (both, 1))))


def _pair(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return first, second


def _shifted_windows(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    given = _bound(node)
    x, window, shift = given["input"], given["window_size"], given["shift_size"]
    windows = graph.call_function(windows_of, (x, window, shift))
    if given["logit_scale"] is not None and given["qkv_bias"] is not None:
        bias = graph.call_function(without_key, (given["qkv_bias"],))
    else:
        bias = given["qkv_bias"]
    qkv = _biased(graph, windows, given["qkv_weight"], bias)
    arguments = (qkv, x, given["relative_position_bias"], window, shift, given["num_heads"])
    context = graph.call_function(
        attend_windows, (*arguments, given["attention_dropout"], given["logit_scale"], given["training"])
    )
    y = _biased(graph, context, given["proj_weight"], given["proj_bias"])
    dropped = graph.call_function(F.dropout, (y, given["dropout"], given["training"]))
    return graph.call_function(from_windows, (dropped, x, window, shift))
