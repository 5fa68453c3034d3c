"""The 150 rows of the matrix."""

from __future__ import annotations

import torch
from torch import nn

from .architecture import BATCH, TOKENS, Architecture
from .composed_transformers import (
    blip,
    clip,
    detr,
    llava,
    one_picture,
    paligemma,
    patchtst,
    siglip,
    smolvlm,
    spectrogram,
    speech,
    tiles,
    vilt,
)
from .other_libraries import (
    TIMM,
    Attends,
    Named,
    Pooled,
    Tagger,
    encoder,
    from_diffusers,
    from_torchvision,
    mlp,
    noise,
    picture,
    sequence,
)
from .tiny_transformers import (
    CAUSAL,
    ENCODERS,
    PICTURES,
    SEQ2SEQ,
    both,
    dbrx,
    filterbanks,
    from_config,
    ids,
    mel,
    pixels,
    tokens,
    wave,
)


def _rows() -> list[Architecture]:
    rows = [
        Architecture("transformers", kind, from_config(kind, "AutoModelForCausalLM", **changes), tokens, True)
        for kind, changes in CAUSAL.items()
    ]
    rows += [Architecture("transformers", "dbrx", dbrx, tokens, True)]
    rows += [
        Architecture("transformers", kind, from_config(kind, "AutoModelForSequenceClassification", **changes), tokens)
        for kind, changes in ENCODERS.items()
    ]
    rows += [
        Architecture("transformers", kind, from_config(kind, "AutoModelForSeq2SeqLM", **changes), both, True)
        for kind, changes in SEQ2SEQ.items()
    ]
    rows += [
        Architecture("transformers", kind, from_config(kind, "AutoModelForImageClassification", **changes), pixels)
        for kind, changes in PICTURES.items()
    ]
    rows += [Architecture("transformers", kind, speech(kind), wave) for kind in ("wav2vec2", "hubert", "wavlm")]
    rows += [
        Architecture("transformers", "whisper", from_config("whisper", "AutoModelForSpeechSeq2Seq"), mel, True),
        Architecture("transformers", "speech_to_text", from_config("speech_to_text", "AutoModelForSpeechSeq2Seq",
                     input_feat_per_channel=16, conv_channels=32), filterbanks, True),
        Architecture("transformers", "audio-spectrogram-transformer", from_config("audio-spectrogram-transformer",
                     "AutoModelForAudioClassification", max_length=32, frequency_stride=8, time_stride=8),
                     spectrogram),
        Architecture("transformers", "llava", llava, one_picture(4), True),
        Architecture("transformers", "paligemma", paligemma, one_picture(4), True),
        Architecture("transformers", "smolvlm", smolvlm, tiles, True),
        Architecture("transformers", "clip (both towers)", clip, one_picture(0)),
        Architecture("transformers", "siglip (both towers)", siglip, lambda m: {**ids(m), **pixels(m)}),
        Architecture("transformers", "blip", blip, one_picture(0)),
        Architecture("transformers", "vilt", vilt, one_picture(0)),
        Architecture("transformers", "patchtst", patchtst, lambda m: {"past_values": torch.randn(BATCH, 32, 3)}),
        Architecture("transformers", "detr", detr, lambda m: pixels(m, 64)),
    ]  # fmt: skip
    rows += [Architecture("timm", name, build, picture(size)) for name, (build, size) in TIMM.items()]
    rows += [
        Architecture("torchvision", name, from_torchvision(name), picture())
        for name in ("vit", "swin", "resnet18", "convnext", "mobilenet_v3")
    ]
    rows += [
        Architecture("diffusers", "UNet2DModel", from_diffusers("UNet2DModel"), noise(3)),
        Architecture("diffusers", "UNet2DConditionModel", from_diffusers("UNet2DConditionModel"),
                     noise(4, encoder_hidden_states=(TOKENS, 32))),
        Architecture("diffusers", "DiTTransformer2DModel", from_diffusers("DiTTransformer2DModel"), noise(4)),
        Architecture("diffusers", "SD3Transformer2DModel", from_diffusers("SD3Transformer2DModel"),
                     noise(4, encoder_hidden_states=(TOKENS, 32), pooled_projections=(16,))),
        Architecture("sentence-transformers", "pooled BERT", Pooled, tokens),
        Architecture("torch", "MLP", lambda: Named(mlp()), lambda m: {"x": torch.randn(BATCH, 32)}),
        Architecture("torch", "TransformerEncoder", encoder, sequence("x")),
        Architecture("torch", "Transformer", lambda: Named(nn.Transformer(32, 4, 1, 1, 64, batch_first=True)),
                     sequence("x", "y")),
        Architecture("torch", "MultiheadAttention", Attends, sequence("x")),
        Architecture("torch", "LSTM tagger", Tagger, ids),
    ]  # fmt: skip
    return rows


ARCHITECTURES: dict[str, Architecture] = {f"{row.library}: {row.name}": row for row in _rows()}
