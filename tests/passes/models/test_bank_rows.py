"""Which rows of a layer's input are which sample's: found by trying, right in every form of the bank, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from row_models import (
    BothWays,
    Flattened,
    Mixed,
    Queries,
    Reversed,
    Routed,
    SamplesInside,
    SequenceFirst,
    SharedRows,
    Windows,
    check,
    tenants,
)
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg

RIGHT = [SequenceFirst, SamplesInside, Flattened, Windows, Queries]


@pytest.mark.parametrize("kind", RIGHT)
@torch.no_grad()
def test_every_row_gets_its_samples_adapter(kind):
    model = kind().eval()
    own = tenants(model)
    banked = fg.bank(model, own)
    for shape in ((3, 6, 8), (2, 4, 8), (7, 2, 8), (6, 6, 8), (2, 2, 8)):  # also as many samples as tokens
        check(banked, banked, model, own, {"x": torch.randn(shape)})
    one = torch.randn(1, 6, 8)
    torch.testing.assert_close(banked(one, adapter_ids=fg.adapter_ids(banked, ["t1"])), own["t1"](one))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(banked)))
    check(twin, twin, model, own, {"x": torch.randn(3, 4, 8)})


@pytest.mark.parametrize("kind", [SequenceFirst, SamplesInside, Queries])
@torch.no_grad()
def test_compiled_without_an_eager_call_first(kind):
    model = kind().eval()
    own = tenants(model)
    banked = fg.bank(model, own)
    torch._dynamo.reset()
    counters.clear()
    fast = fg.compile(banked, fullgraph=True, dynamic=True)
    for shape in ((3, 6, 8), (5, 4, 8), (4, 10, 8)):
        check(fast, banked, model, own, {"x": torch.randn(shape)})
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Mixed, r"'q': rows of its input \(3, 6, 8\) depend on several of the 3 samples"),
        (Reversed, "'q': rows of its input"),
        (SharedRows, r"'q': its input \(4, 8\) has the same rows for all 3 samples"),
        (Routed, "'q' gets other rows when only the content of a sample changes"),
        (BothWays, "'q' is called with the samples along dimension 1 and along dimension 0"),
    ],
)
def test_what_cannot_be_told_is_refused(kind, said):
    model = kind().eval()
    own = tenants(model)
    banked, x = fg.bank(model, own), torch.randn(3, 6, 8)
    ids = fg.adapter_ids(banked, ["t0", None, "t1"])
    for run in (banked, fg.compile(banked), fg.compile(banked, fullgraph=True)):
        with pytest.raises(fg.AdapterError, match=said + ".*Serve each tenant on its own"):
            run(x, adapter_ids=ids)
    with pytest.raises(fg.AdapterError, match=said):
        fg.bank(model, own, example_inputs=(x,))
    with torch.no_grad():  # and what needs no telling is right
        torch.testing.assert_close(banked(x[:1], adapter_ids=ids[:1]), own["t0"](x[:1]))
        torch.testing.assert_close(banked(x), model(x))


@torch.no_grad()
def test_samples_along_another_dimension_of_the_inputs():
    """`nn.TransformerEncoder(batch_first=False)`: `(tokens, batch, h)`."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    own = tenants(model, ("linear1", "linear2"))
    x = torch.randn(3, 3, 16)
    with pytest.raises(fg.AdapterError, match="batch_axis=1"):
        banked = fg.bank(model, own)
        banked(x, adapter_ids=fg.adapter_ids(banked, ["t0", None, "t1"]))
    banked = fg.bank(model, own, batch_axis=1, example_inputs=(x,))
    got = banked(x, adapter_ids=fg.adapter_ids(banked, ["t0", None, "t1"]))
    for i, name in enumerate(("t0", None, "t1")):
        torch.testing.assert_close(got[:, i], (own[name] if name else model)(x)[:, i])
    with pytest.raises(fg.AdapterError, match="2 entries and the batch 3 samples"):
        banked(x, adapter_ids=torch.zeros(2, dtype=torch.long))


def test_example_inputs_are_two_samples_or_more():
    model = SequenceFirst().eval()
    own = tenants(model)
    with pytest.raises(fg.AdapterError, match="two or more"):
        fg.bank(model, own, example_inputs=(torch.randn(1, 6, 8),))
    with pytest.raises(fg.AdapterError, match="batch_axis=-1"):
        fg.bank(model, own, batch_axis=-1)


@torch.no_grad()
def test_looking_changes_nothing():
    """The try-outs draw no random numbers of the caller's, and leave buffers and inputs alone."""

    class Counts(SequenceFirst):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x + torch.rand(()))

    model = Counts().eval()
    banked = fg.bank(model, tenants(model))
    x = torch.randn(3, 6, 8)
    kept, ids = x.clone(), fg.adapter_ids(banked, ["t0", None, "t1"])
    torch.manual_seed(5)
    first_call = banked(x, adapter_ids=ids)
    assert float(banked.calls) == 1 and float(model.calls) == 0
    torch.manual_seed(5)
    assert torch.equal(banked(x, adapter_ids=ids), first_call)
    assert torch.equal(x, kept)
