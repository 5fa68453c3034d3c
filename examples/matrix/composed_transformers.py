"""Models of transformers that are put together from several configs, or hear, or forecast; and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .architecture import BATCH, IMAGE, VOCABULARY
from .tiny_transformers import from_config, pixels, tokens


# What is built in a way of its own: sound, pictures with text, numbers over time.
def speech(kind: str, **changes: Any) -> Callable[[], nn.Module]:
    stages = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
              "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}  # fmt: skip
    return from_config(kind, "AutoModelForAudioClassification", **stages, classifier_proj_size=16, **changes)


def _vision(**changes: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | changes


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**_vision(), image_size=IMAGE, patch_size=16)
    text = LlamaConfig(**_vision(), num_key_value_heads=2, vocab_size=VOCABULARY, pad_token_id=0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=100, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def one_picture(places: int, image: int = 100, size: int = IMAGE) -> Callable[[nn.Module], dict[str, Any]]:
    """Text with the place of one picture in every row."""

    def inputs(model: nn.Module) -> dict[str, Any]:
        made = tokens(model)
        made["input_ids"][:, 1 : 1 + places] = image
        return made | pixels(model, size)

    return inputs


def paligemma() -> nn.Module:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(**_vision(), image_size=IMAGE, patch_size=16, projection_dim=32)
    text = GemmaConfig(**_vision(), num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, pad_token_id=0)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=100, projection_dim=32)
    return PaliGemmaForConditionalGeneration(config)


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = _vision(vocab_size=VOCABULARY, max_position_embeddings=64, projection_dim=32, bos_token_id=1, eos_token_id=2)
    vision = _vision(image_size=IMAGE, patch_size=16, projection_dim=32)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = _vision(vocab_size=VOCABULARY, max_position_embeddings=64, projection_size=32)
    return SiglipModel(SiglipConfig(text_config=text, vision_config=_vision(image_size=IMAGE, patch_size=16)))


def blip() -> nn.Module:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = _vision(vocab_size=VOCABULARY, max_position_embeddings=64, encoder_hidden_size=32)
    vision = _vision(image_size=IMAGE, patch_size=16)
    return BlipForImageTextRetrieval(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32)
    )


def vilt() -> nn.Module:
    from transformers import ViltConfig, ViltForQuestionAnswering

    return ViltForQuestionAnswering(
        ViltConfig(**_vision(), vocab_size=VOCABULARY, image_size=IMAGE, patch_size=16, max_position_embeddings=64)
    )


def smolvlm() -> nn.Module:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    text = _vision(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, model_type="llama")
    config = SmolVLMConfig(
        vision_config=_vision(image_size=IMAGE, patch_size=8), text_config=text, image_token_id=100, scale_factor=2,
        pad_token_id=0,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


def tiles(model: nn.Module) -> dict[str, Any]:
    made = tokens(model)
    made["input_ids"][:, 1:5] = 100
    return made | {"pixel_values": torch.randn(BATCH, 1, 3, IMAGE, IMAGE)}


def patchtst() -> nn.Module:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    sizes = {"d_model": 32, "num_attention_heads": 4, "ffn_dim": 64, "num_hidden_layers": 2}
    return PatchTSTForPrediction(
        PatchTSTConfig(**sizes, num_input_channels=3, context_length=32, patch_length=8, patch_stride=8,
                       prediction_length=4)
    )  # fmt: skip


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], embedding_size=8,
                            out_features=["stage4"])  # fmt: skip
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    return DetrForObjectDetection(
        DetrConfig(**sizes, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=5,
                   use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone)
    )  # fmt: skip


def spectrogram(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 32, 16)}
