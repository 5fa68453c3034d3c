"""Models whose layers see the rows of a batch in an order of their own."""

from __future__ import annotations

import torch
import transformers
from small_models import perturb
from torch import nn

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
