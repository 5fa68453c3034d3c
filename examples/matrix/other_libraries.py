"""Tiny models of timm, torchvision, diffusers, sentence-transformers and torch, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import BATCH, IMAGE, TOKENS, VOCABULARY
from .tiny_transformers import from_config


def _timm(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **sizes)
        return made

    return build


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    made: nn.Module = MlpMixer(img_size=IMAGE, patch_size=8, embed_dim=32, num_blocks=2, num_classes=5)
    return made


def picture(size: int = IMAGE) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {"x": torch.randn(BATCH, 3, size, size)}


_VIT = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (_timm("vit_tiny_patch16_224", **_VIT), IMAGE),
    "beit": (_timm("beit_base_patch16_224", **_VIT), IMAGE),
    "eva02": (_timm("eva02_tiny_patch14_224", **_VIT), IMAGE),
    "swin": (_timm("swin_tiny_patch4_window7_224", img_size=IMAGE, embed_dim=16, depths=(1, 1), num_heads=(2, 4),
                   window_size=4), IMAGE),
    "mixer": (_mixer, IMAGE),
    "xcit": (_timm("xcit_nano_12_p16_224", **(_VIT | {"patch_size": 16})), IMAGE),
    "convnext": (_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)), IMAGE),
    "mobilenetv3": (_timm("mobilenetv3_small_050"), IMAGE),
    "efficientnet": (_timm("efficientnet_lite0"), IMAGE),
    "regnet": (_timm("regnetx_002"), IMAGE),
    "deit3": (_timm("deit3_small_patch16_224", **_VIT), IMAGE),
    "cait": (_timm("cait_xxs24_224", **_VIT), IMAGE),
}  # fmt: skip


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import mobilenet_v3_small, resnet18
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt
        from torchvision.models.swin_transformer import SwinTransformer
        from torchvision.models.vision_transformer import VisionTransformer

        made: nn.Module = {
            "vit": lambda: VisionTransformer(IMAGE, 8, 2, 4, 32, 64, num_classes=5),
            "swin": lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5),
            "resnet18": lambda: resnet18(num_classes=5),
            "convnext": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=5),
            "mobilenet_v3": lambda: mobilenet_v3_small(num_classes=5, width_mult=0.5),
        }[name]()
        return made

    return build


def from_diffusers(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        blocks = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
        sizes: dict[str, dict[str, Any]] = {
            "UNet2DModel": {**blocks, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
            "UNet2DConditionModel": {**blocks, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                                     "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
                                     "cross_attention_dim": 32},
            "DiTTransformer2DModel": {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4,
                                      "out_channels": 4, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
            "SD3Transformer2DModel": {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4,
                                      "out_channels": 4, "num_layers": 2, "sample_size": 8, "joint_attention_dim": 32,
                                      "caption_projection_dim": 32, "pooled_projection_dim": 16,
                                      "pos_embed_max_size": 8},
        }  # fmt: skip
        made: nn.Module = getattr(diffusers, name)(**sizes[name])
        return made

    return build


def noise(channels: int, **more: tuple[int, ...]) -> Callable[[nn.Module], dict[str, Any]]:
    def inputs(model: nn.Module) -> dict[str, Any]:
        name = "hidden_states" if "Transformer" in type(model).__name__ else "sample"
        made: dict[str, Any] = {name: torch.randn(BATCH, channels, 8, 8), "timestep": torch.tensor([3, 5])}
        made |= {key: torch.randn(BATCH, *shape) for key, shape in more.items()}
        return made | ({"class_labels": torch.tensor([1, 2])} if type(model).__name__.startswith("DiT") else {})

    return inputs


class Pooled(nn.Module):
    """A sentence encoder as sentence-transformers puts it together: transformer, mean over tokens, norm."""

    def __init__(self) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

        self.bert = from_config("bert", "AutoModel")()
        self.pool, self.dense, self.norm = Pooling(32), Dense(32, 16), Normalize()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        features = self.pool({"token_embeddings": tokens, "attention_mask": attention_mask})
        embedding: torch.Tensor = self.norm(self.dense(features))["sentence_embedding"]
        return embedding


class Named(nn.Module):
    """A model whose inputs are `x`, and its target where it has one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        out = self.inner(x) if y is None else self.inner(x, y)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embed(input_ids))
        scores: torch.Tensor = self.head(torch.relu(self.mix(hidden)))
        return scores


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return scores


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 5))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return Named(nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 5)))


def sequence(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {name: torch.randn(BATCH, TOKENS, 32) for name in names}
