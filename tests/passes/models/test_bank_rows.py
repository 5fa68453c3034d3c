"""Which rows of a layer's input are which sample's: found by trying, right in every form of the bank, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from small_models import perturb
from torch import nn
from torch._dynamo.utils import counters

import fxgraft as fg


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)


class SequenceFirst(OneLinear):
    def forward(self, x):
        return self.q(x.transpose(0, 1)).transpose(0, 1)


class SamplesInside(OneLinear):
    """Rows `(tokens * batch)`: neighbours are of different samples."""

    def forward(self, x):
        b, t, _ = x.shape
        return self.q(x.transpose(0, 1).reshape(t * b, 8)).view(t, b, 8).transpose(0, 1)


class Flattened(OneLinear):
    def forward(self, x):
        return self.q(x.flatten(0, 1)).view_as(x)


class Windows(OneLinear):
    """`(windows * batch, 2, h)`, as attention over windows that are cut first."""

    def forward(self, x):
        b, t, _ = x.shape
        cut = x.view(b, t // 2, 2, 8).permute(1, 0, 2, 3).reshape(t // 2 * b, 2, 8)
        return self.q(cut).view(t // 2, b, 2, 8).permute(1, 0, 2, 3).reshape(b, t, 8)


class Queries(OneLinear):
    """Learned queries `(queries, batch, h)`: no input changes them."""

    def __init__(self):
        super().__init__()
        self.k, self.learned = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        q, k = self.q(self.learned.unsqueeze(1).expand(4, x.shape[0], 8)), self.k(x)
        return torch.einsum("qbd,btd->bqt", q, k).softmax(-1) @ k


RIGHT = [SequenceFirst, SamplesInside, Flattened, Windows, Queries]


class Mixed(OneLinear):
    def forward(self, x):
        return self.q(x + x.mean(0, keepdim=True))


class SharedRows(Queries):
    def forward(self, x):
        return self.k(x) @ self.q(self.learned).t()


class Reversed(OneLinear):
    """Right for one sample at a time, and nothing says to whom a row goes."""

    def forward(self, x):
        return self.q(x.flip(0)).flip(0)


class Routed(OneLinear):
    """Tokens go to a layer by what they contain."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = rows[:, 0] > 0
        return rows.masked_scatter(chosen.unsqueeze(-1), self.q(rows[chosen])).view_as(x)


class BothWays(OneLinear):
    def forward(self, x):
        return self.q(self.q(x.transpose(0, 1)).transpose(0, 1))


def tenants(model, targets=("q", "k")):
    targets = [target for target in targets if any(name.endswith(target) for name, _ in model.named_modules())]
    spec = fg.Spec(fg.LoRA(rank=2), targets=targets)
    return {f"t{i}": perturb(fg.rewrite(model, spec), 0.3).eval() for i in range(2)}


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def names_of(batch):
    return ["t0", None, "t1", "t0", "t1", None, "t1"][:batch]


def check(run, banked, model, own, inputs, **options):
    """Every sample of a mixed batch is what its tenant gives alone, and nobody else's answer."""
    names = names_of(len(next(iter(inputs.values()))))
    alone = {name: first((own[name] if name else model)(**inputs)) for name in ("t0", "t1", None)}
    got = first(run(**inputs, adapter_ids=fg.adapter_ids(banked, names)))
    for i, name in enumerate(names):
        torch.testing.assert_close(got[i], alone[name][i], rtol=1e-4, atol=1e-5, **options)
        for other in set(alone) - {name}:
            assert (got[i] - alone[other][i]).abs().max() > 1e-3, (i, name, other)


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


# -- models as they are ------------------------------------------------------------------------------------------
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 90,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}


def tokens(batch=3, length=8):
    return torch.randint(3, 90, (batch, length))


def padded():
    return torch.tensor([[0, 0] + [1] * 6, [1] * 8, [0] * 4 + [1] * 4])


def longformer():
    config = transformers.LongformerConfig(**SMALL, attention_window=4, max_position_embeddings=64)
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    inputs["global_attention_mask"] = torch.tensor([[1] + [0] * 7] * 3)
    return transformers.LongformerModel(config), ["query", "value", "query_global"], inputs


def xlnet():
    config = transformers.XLNetConfig(vocab_size=90, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return transformers.XLNetModel(config), ["layer_1", "layer_2"], {"input_ids": tokens()}


def deberta():
    config = transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return transformers.DebertaV2Model(config), ["query_proj", "value_proj"], {"input_ids": tokens()}


def swinv2():
    config = transformers.Swinv2Config(**SWIN)
    return transformers.Swinv2Model(config), ["query", "value", "dense"], {"pixel_values": torch.randn(3, 3, 32, 32)}


def conformer():
    config = transformers.Wav2Vec2ConformerConfig(
        **SMALL,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ConformerModel(config), ["linear_q", "linear_v"], {"input_values": torch.randn(3, 400)}


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    inputs = {"input_ids": tokens(), "attention_mask": padded()}
    return transformers.LlamaForCausalLM(config), ["q_proj", "down_proj"], inputs


def t5_config():
    return transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90, decoder_start_token_id=0
    )


def t5():
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(3, 5)}
    return transformers.T5ForConditionalGeneration(t5_config()), ["q", "v", "wi"], inputs


def perceiver():
    config = transformers.PerceiverConfig(
        num_latents=6,
        d_latents=32,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )
    return transformers.PerceiverModel(config), ["query", "value"], {"inputs": torch.randn(3, 9, 32)}


def mask2former():
    backbone = SWIN | {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**backbone, out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=6,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_attention_heads=4,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return model, ["q_proj", "v_proj", "fc1"], {"pixel_values": torch.randn(3, 3, 32, 32)}


MODELS = [longformer, xlnet, deberta, swinv2, conformer, llama, t5, perceiver, mask2former]


@pytest.mark.parametrize("make", MODELS)
@torch.no_grad()
def test_models(make):
    model, targets, inputs = make()
    model.eval().double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    own = tenants(model, targets)
    banked = fg.bank(model, own, example_inputs=inputs)
    check(banked, banked, model, own, inputs)


@torch.no_grad()
def test_models_with_rows_that_all_samples_share():
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True
    )
    model = transformers.DebertaV2Model(config).eval()
    own = tenants(model, ["query_proj"])
    with pytest.raises(fg.AdapterError, match=r"query_proj': its input .* has the same rows for all 3 samples"):
        fg.bank(model, own, example_inputs={"input_ids": tokens()})


@torch.no_grad()
def test_experts():
    """Attention around experts is fine; the experts get tokens of anybody."""
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90, num_experts=4, decoder_start_token_id=0
    )
    model = transformers.SwitchTransformersModel(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(3, 5)}
    own = tenants(model, ["wi"])
    with pytest.raises(fg.AdapterError, match="gets other rows when only the content"):
        fg.bank(model, own, example_inputs=inputs)
    own = tenants(model, ["q", "v"])
    check(fg.bank(model, own), fg.bank(model, own), model, own, inputs)


@torch.no_grad()
def test_generate_with_an_encoder():
    """`generate` calls the encoder past the model's forward: it gets the ids too, with beams as without."""
    model, targets, _ = t5()
    model.eval()
    own = tenants(model, targets)
    banked = fg.bank(model, own)
    prompt = tokens()
    names = names_of(3)
    for options in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt), **options}
        got = banked.generate(prompt, adapter_ids=fg.adapter_ids(banked, names), **options)
        for i, name in enumerate(names):
            alone = (own[name] if name else model).generate(prompt, **options)
            width = min(got.shape[1], alone.shape[1])
            assert torch.equal(got[i, :width], alone[i, :width])
