"""The graph that stands for `nn.MultiheadAttention.forward` computes what that computes, whatever it is given."""

import itertools

import pytest
import torch
from torch import fx, nn

from fxgraft.rewriter.capture.multihead_attention import attention_graph

E, HEADS, L, S, N = 8, 2, 4, 5, 3


def inputs_of(kind, batched, batch_first, kdim, vdim):
    def made(length, features):
        shape = (N, length, features) if batch_first else (length, N, features)
        return torch.randn(shape if batched else (length, features))

    query = made(L, E)
    if kind == "self":
        return query, query, query
    key = made(S, kdim)
    return (query, key, key) if kind == "memory" else (query, key, made(S, vdim))


def masks_of(kind, batched, targets, sources):
    """attn_mask, key_padding_mask and the causal hint; the first key is never hidden."""
    square = torch.ones(targets, sources, dtype=torch.bool).triu(1)
    over_heads = torch.rand(N * HEADS if batched else HEADS, targets, sources) > 0.5
    over_heads[..., 0] = False
    padding = torch.rand(*((N, sources) if batched else (sources,))) > 0.6
    padding[..., 0] = False
    low = torch.zeros(targets, sources).masked_fill(square, -3.0)
    return {
        "none": (None, None, False),
        "bool": (square, None, False),
        "heads": (over_heads, None, False),
        "float": (low, torch.zeros(padding.shape).masked_fill(padding, -torch.inf), False),
        "padding": (None, padding, False),
        "both": (square, padding, False),
        "causal": (square, None, True),
        "causal padding": (square, padding, True),
    }[kind]


MASKS = ["none", "bool", "heads", "float", "padding", "both", "causal", "causal padding"]
BUILT = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6},
    {"kdim": 6, "vdim": 10, "bias": False},
    {"vdim": 6, "add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("built", BUILT, ids=str)
def test_every_call_that_torch_takes(built):
    kdim, vdim = built.get("kdim", E), built.get("vdim", E)
    checked = 0
    for batch_first, training in itertools.product((False, True), (False, True)):
        torch.manual_seed(0)
        module = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **built).train(training)
        for parameter in module.parameters():
            parameter.data.normal_()
        graph = fx.GraphModule(module, attention_graph(module)).train(training)
        for kind, batched, mask in itertools.product(("self", "memory", "apart"), (True, False), MASKS):
            if (kind == "self" and (kdim, vdim) != (E, E)) or (kind == "memory" and kdim != vdim):
                continue
            given = inputs_of(kind, batched, batch_first, kdim, vdim)
            attn_mask, padding, causal = masks_of(mask, batched, L, given[1].shape[1 if batch_first and batched else 0])
            for need, average in ((False, True), (True, True), (True, False)):
                options = {"need_weights": need, "average_attn_weights": average, "is_causal": causal}
                options |= {"attn_mask": attn_mask, "key_padding_mask": padding}
                want, want_weights = module(*given, **options)
                got, weights = graph(*given, **options)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                assert (weights is None) == (not need)
                if need:
                    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-5)
                checked += 1
    assert checked >= 192


@pytest.mark.parametrize("built", [{}, {"kdim": 6, "vdim": 10}], ids=str)
def test_gradients(built):
    module = nn.MultiheadAttention(E, HEADS, dropout=0.0, **built).double()
    graph = fx.GraphModule(module, attention_graph(module))
    given = [x.double() for x in inputs_of("apart", True, False, built.get("kdim", E), built.get("vdim", E))]
    for one in given:
        one.requires_grad_(True)
    wanted = [*given, *module.parameters()]
    for own, other in zip(
        torch.autograd.grad(module(*given)[0].square().sum(), wanted),
        torch.autograd.grad(graph(*given)[0].square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(other, own)


def test_dropout_falls_on_the_weights_in_training_alone():
    module = nn.MultiheadAttention(E, HEADS, dropout=0.5)
    graph = fx.GraphModule(module, attention_graph(module))
    x = torch.randn(L, N, E)
    for need in (True, False):
        assert torch.equal(graph.eval()(x, x, x, need_weights=need)[0], graph(x, x, x, need_weights=need)[0])
        assert not torch.equal(graph.train()(x, x, x, need_weights=need)[0], graph(x, x, x, need_weights=need)[0])
    dropped = graph(x, x, x, average_attn_weights=False)[1]
    assert (dropped == 0).any() and (dropped != 0).any()


def test_attributes_are_read_at_every_call():
    module = nn.MultiheadAttention(E, HEADS).eval()
    graph = fx.GraphModule(module, attention_graph(module)).eval()
    x = torch.randn(L, N, E)
    module.num_heads = graph.num_heads = 4
    torch.testing.assert_close(graph(x, x, x)[1], module(x, x, x)[1])
    module.batch_first = graph.batch_first = True
    assert graph(x, x, x)[1].shape == (L, N, N)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ValueError, lambda f, x: f(x, x[:, 0], x[:, 0])),
        (ValueError, lambda f, x: f(x, x[:2], x)),
        (ValueError, lambda f, x: f(x, x[:, :2], x[:, :2])),
        (ValueError, lambda f, x: f(x, x, x, key_padding_mask=torch.zeros(L, N, dtype=torch.bool))),
        (ValueError, lambda f, x: f(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.long))),
        (RuntimeError, lambda f, x: f(x, x, x, attn_mask=torch.zeros(L, 2))),
        (RuntimeError, lambda f, x: f(x, x, x, attn_mask=torch.zeros(N, L, L))),
        (RuntimeError, lambda f, x: f(x, x, x, is_causal=True)),
        (ValueError, lambda f, x: f(*[torch.nested.nested_tensor([x[0], x[1, :2]])] * 3)),
    ],
)
def test_what_torch_refuses_is_refused(error, call):
    module = nn.MultiheadAttention(E, HEADS).train()
    graph = fx.GraphModule(module, attention_graph(module))
    x = torch.randn(L, N, E)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        call(module, x)
    with pytest.raises(error):
        call(graph, x)
