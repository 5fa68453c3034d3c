"""The forward of `nn.MultiheadAttention` as a graph: its own asks what it is given, which torch.fx cannot follow.

    q, k, v = F.linear(joined(query, key, value), in_proj_weight, in_proj_bias)   or three products, with weights apart
    context, weights = attend(q, k, v, ...)
    return F.linear(context, out_proj.weight, out_proj.bias), weights

`joined` is the query where all three are one tensor, and otherwise the different ones behind one another along the
sequence; of the product each then takes its rows and columns. Between the projections stands plain attention, the
masks as torch takes them; the fused kernel of the base's evaluation is not in it, as it would pass the adapters by.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_FORWARD = nn.MultiheadAttention.forward  # what it is when fxgraft is imported


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes the forward of `nn.MultiheadAttention`."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is _FORWARD


def _inputs(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The different ones of the three."""
    if key is value:
        return [query] if query is key else [query, key]
    return [query, key, value]


def _sequence(x: Tensor, batch_first: bool) -> int:
    """The dimension of the sequence."""
    return 1 if batch_first and x.dim() == 3 else 0


def joined(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> Tensor:
    """The inputs `(N, L, E)`, `(L, N, E)` or `(L, E)` behind one another, each once."""
    check_shapes(query, key, value, batch_first)
    different = _inputs(query, key, value)
    return query if len(different) == 1 else torch.cat(different, _sequence(query, batch_first))


def parted(y: Tensor, query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the product of what is `joined`, with all three weights: that of each input with its own."""
    q, k, v = y.chunk(3, -1)
    different = _inputs(query, key, value)
    if len(different) == 1:
        return q, k, v
    at = _sequence(query, batch_first)
    targets, sources = query.shape[at], key.shape[at]
    last = v.narrow(at, targets + (sources if len(different) == 3 else 0), value.shape[at])
    return q.narrow(at, 0, targets), k.narrow(at, targets, sources), last


def plus_third(y: Tensor, bias: Tensor | None, third: int) -> Tensor:
    """The product of one input, and its third of the common bias."""
    return y if bias is None else y + bias.chunk(3)[third]


def check_shapes(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> None:
    """Raise `ValueError` where the inputs do not go together."""
    if query.is_nested or key.is_nested or value.is_nested:
        raise ValueError("nn.MultiheadAttention takes nested tensors in its fused evaluation alone, without adapters")
    dims = {query.dim(), key.dim(), value.dim()}
    if dims not in ({2}, {3}):
        raise ValueError(
            f"query, key and value are all (sequence, features) or all with a batch; given were {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"a value for every key: given were {tuple(key.shape)} and {tuple(value.shape)}")
    batch = 0 if batch_first else 1
    if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} are of different batches")


def _added(mask: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores; a boolean one forbids where it is true."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}: give a boolean or a floating one")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _over_heads(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """An attention mask `(L, S)` or `(N * heads, L, S)` as one of four dimensions."""
    n, heads, targets, sources = sizes
    shape = tuple(mask.shape)
    if shape == (targets, sources):
        return mask[None, None]
    if shape == (n * heads, targets, sources):
        return mask.view(n, heads, targets, sources)
    wanted = f"({targets}, {sources}) or ({n * heads}, {targets}, {sources})"
    raise RuntimeError(f"The shape of the attn_mask is {shape}, but should be {wanted}.")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    like: Tensor,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    heads: int,
    zero_attention: bool,
    dropout: float,
    batch_first: bool,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of what is projected, `(N, L, E)`, `(L, N, E)` or `(L, E)`: the context, laid out like q, and the
    weights, if they are asked for, `(N, L, S)`, or `(N, heads, L, S)` where they are not averaged.

    `like` is the query of the call: masks are made in its dtype. Raises as torch does: `RuntimeError` for a causal hint
    without a mask or a mask of another shape.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = q.dim() == 3
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    n, targets, features = q.shape
    padding = _added(key_padding_mask, "key_padding_mask", like.dtype)
    if padding is not None and tuple(padding.shape) != (n, k.shape[1]):
        raise ValueError(f"key_padding_mask is {tuple(padding.shape)}, and there are {n} x {k.shape[1]} keys")
    hinted = is_causal and padding is None and not need_weights
    mask = None if hinted else _added(attn_mask, "attn_mask", like.dtype)
    if mask is not None:
        mask = _over_heads(mask, (n, heads, targets, k.shape[1]))
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(n, -1, -1)], 1), torch.cat([v, bias_v.expand(n, -1, -1)], 1)
    if zero_attention:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    more = int(bias_k is not None) + int(zero_attention)  # keys of no position: nothing hides them
    mask = mask if mask is None or not more else F.pad(mask, (0, more))
    if padding is not None:
        padding = (F.pad(padding, (0, more)) if more else padding)[:, None, None]
        mask = padding if mask is None else mask + padding
    q, k, v = (x.unflatten(-1, (heads, features // heads)).transpose(1, 2) for x in (q, k, v))
    drop = dropout if training else 0.0
    if need_weights:
        scores = torch.matmul(q * math.sqrt(1.0 / (features // heads)), k.transpose(-2, -1))
        scores = scores if mask is None else scores + mask.to(scores.dtype)
        weights = F.softmax(scores, -1)
        weights = F.dropout(weights, drop) if drop else weights
        context = torch.matmul(weights, v)
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        weights = None
        context = F.scaled_dot_product_attention(q, k, v, mask, drop, hinted)
    if not batched:
        return context.squeeze(0).transpose(0, 1).reshape(targets, features), weights
    if batch_first:
        return context.transpose(1, 2).reshape(n, targets, features), weights
    return context.permute(2, 0, 1, 3).reshape(targets, n, features), weights


def attention_graph(module: nn.Module) -> fx.Graph:
    """The graph of a module that `is_attention`. What its attributes say is read at every call."""
    graph, held = fx.Graph(), module._parameters
    given: dict[str, fx.Node] = {}
    for name, parameter in list(inspect.signature(_FORWARD).parameters.items())[1:]:
        given[name] = graph.placeholder(name, default_value=parameter.default)
    inputs = (given["query"], given["key"], given["value"])

    def own(name: str) -> Any:
        present = held.get(name, module) is not None  # what is no parameter's slot is an attribute
        return graph.get_attr(name) if present else None

    batch_first = own("batch_first")
    if held.get("in_proj_weight") is not None:
        x = graph.call_function(joined, (*inputs, batch_first))
        y = graph.call_function(F.linear, (x, own("in_proj_weight"), own("in_proj_bias")))
        both = graph.call_function(parted, (y, *inputs, batch_first))
        projected = [graph.call_function(_item, (both, i)) for i in range(3)]
    else:
        graph.call_function(check_shapes, (*inputs, batch_first))
        projected = []
        for i, (x, name) in enumerate(zip(inputs, "qkv", strict=True)):
            y = graph.call_function(F.linear, (x, own(f"{name}_proj_weight")))
            projected.append(graph.call_function(plus_third, (y, own("in_proj_bias"), i)))
    rest = [given[name] for name in ("need_weights", "average_attn_weights", "is_causal")]
    attributes = [own(name) for name in ("num_heads", "add_zero_attn", "dropout", "batch_first", "training")]
    masks = (given["key_padding_mask"], given["attn_mask"], given["query"])
    both = graph.call_function(attend, (*projected, own("bias_k"), own("bias_v"), *masks, *rest, *attributes))
    out = module._modules["out_proj"]
    bias = None if out is None or out._parameters.get("bias") is None else graph.get_attr("out_proj.bias")
    context = graph.call_function(_item, (both, 0))
    result = graph.call_function(F.linear, (context, graph.get_attr("out_proj.weight"), bias))
    graph.output((result, graph.call_function(_item, (both, 1))))
    return graph


def _item(of: tuple[Any, ...], index: int) -> Any:
    return of[index]
