"""torch.nn's fused layers compute their children's weights without calling them: never with an adapter inside."""

import copy
import pickle

import pytest
import torch
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)


class Model(nn.Module):
    """Encoder layers inside a model, and one of them alone."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inner = nn.ModuleDict({"stack": nn.TransformerEncoder(layer, 2), "alone": copy.deepcopy(layer)})

    def forward(self, x, mask=None):
        x = self.inner["stack"](x, src_key_padding_mask=mask)
        return self.inner["alone"](x, src_key_padding_mask=mask)


def slow(model, x, mask=None):
    """The same without the fused paths: they are for inference only."""
    with torch.enable_grad():
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        return twin(x, mask).detach()


@pytest.fixture
def inputs():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    return torch.randn(3, 5, 8), mask


SPECS = {
    "linear1": fg.Spec(LORA, ["linear1"]),
    "one layer": fg.Spec(LORA, ["stack.layers.0.linear2"]),
    "attention": fg.Spec(LORA, ["in_proj_weight", "out_proj"]),
    "one attention": fg.Spec(LORA, ["stack.layers.1.self_attn.in_proj_weight", "alone.self_attn.out_proj"]),
    "trained": fg.Spec(LORA, ["alone.linear1"], train=["stack.layers.1.self_attn", "stack.layers.0.norm1"]),
    "trained out_proj": fg.Spec(LORA, ["alone.linear1"], train=["out_proj"]),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("masked", [False, True])
def test_adapters_inside_fused_layers(spec, masked, inputs):
    x, mask = inputs[0], inputs[1] if masked else None
    model = Model().eval()
    attributes = [dict(m.__dict__) for m in model.modules()]
    adapted = perturb(fg.rewrite(model, spec))
    merged = fg.merge(adapted)
    want = slow(merged, x, mask)
    keep = slice(None) if mask is None else ~mask
    assert not torch.allclose(want[keep], slow(model, x, mask)[keep], atol=1e-3)
    for twin in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        with torch.no_grad():
            torch.testing.assert_close(twin(x, mask)[keep], want[keep])
            with fg.disabled(twin):
                torch.testing.assert_close(twin(x, mask)[keep], model(x, mask)[keep])
            torch.testing.assert_close(twin(x, mask)[keep], want[keep])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(adapted, backend="eager")(x, mask)[keep], want[keep])
        torch.testing.assert_close(merged(x, mask)[keep], want[keep])
    assert [set(m.__dict__) for m in model.modules()] == [set(a) for a in attributes]
    assert [m.__dict__.get("activation_relu_or_gelu") for m in model.modules()] == [
        a.get("activation_relu_or_gelu") for a in attributes
    ]
    fg.remove(adapted, "default")
    assert [m.__dict__.get("activation_relu_or_gelu") for m in adapted.modules()] == [
        a.get("activation_relu_or_gelu") for a in attributes
    ]


def test_switching_between_adapters_in_other_layers(inputs):
    x, _ = inputs
    model = Model().eval()
    first = perturb(fg.rewrite(model, fg.Spec(LORA, ["stack.layers.0.linear1"])))
    both = perturb(fg.rewrite(first, fg.Spec(LORA, ["alone.linear2"]), name="b"))
    with torch.no_grad():
        for names in (["default"], ["b"], ["default", "b"], []):
            fg.set_active(both, names)
            want = slow(fg.merge(both), x) if names else model(x)
            torch.testing.assert_close(both(x), want)


def test_a_transformer_with_decoder(inputs):
    x, _ = inputs
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["linear1", "linear2", "in_proj_weight", "out_proj"])))
    with torch.no_grad():
        torch.testing.assert_close(adapted(x, x), fg.merge(adapted)(x, x))
        assert not torch.allclose(adapted(x, x), model(x, x), atol=1e-3)
