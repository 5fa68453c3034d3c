"""Models whose attention takes the weights of its layers: all linears are reached, and merging says the same."""

import pytest
import torch
from methods import FIXED, graft
from small_models import perturb

import fxgraft as fg


def wavlm():
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8],
        conv_stride=[5, 4], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4,
    )  # fmt: skip
    return transformers.WavLMModel(config), (torch.randn(2, 600),), {"q_proj", "k_proj", "v_proj", "out_proj"}


def siglip():
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    return transformers.SiglipVisionModel(config), (torch.randn(2, 3, 16, 16),), {"in_proj_weight", "out_proj"}


def vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.vision_transformer.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=3
    )
    torch.nn.init.normal_(model.heads.head.weight)
    return model, (torch.randn(2, 3, 16, 16),), {"in_proj_weight", "out_proj"}


def swin(version):
    torchvision = pytest.importorskip("torchvision")
    swins = torchvision.models.swin_transformer
    block = swins.SwinTransformerBlock if version == 1 else swins.SwinTransformerBlockV2
    merging = swins.PatchMerging if version == 1 else swins.PatchMergingV2
    model = swins.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=[3, 3], num_classes=3,
        stochastic_depth_prob=0.0, block=block, downsample_layer=merging,
    )  # fmt: skip
    return model, (torch.randn(2, 3, 16, 16),), {"qkv", "proj"}


def timm_model(name, **config):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, depth=2, embed_dim=32, num_heads=2, num_classes=3, **config)
    torch.nn.init.normal_(model.head.weight)
    return model, (torch.randn(2, 3, 32, 32),), {"qkv", "attn.proj"}


def clip_pool():
    resnet = pytest.importorskip("open_clip.modified_resnet")
    return resnet.AttentionPool2d(2, 16, 2, 8), (torch.randn(3, 16, 2, 2),), {"q_proj", "k_proj", "v_proj", "c_proj"}


def clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16, "head_width": 32}
    text = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 8}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return model, (torch.randn(2, 3, 16, 16), torch.randint(0, 50, (2, 8))), {"in_proj_weight", "out_proj"}


MODELS = {
    "wavlm": wavlm,
    "siglip": siglip,
    "torchvision vit": vit,
    "torchvision swin": lambda: swin(1),
    "torchvision swin v2": lambda: swin(2),
    "timm beit": lambda: timm_model("beit_base_patch16_224", img_size=32, patch_size=16),
    "timm eva02": lambda: timm_model("eva02_tiny_patch14_224", img_size=32, patch_size=16),
    "clip's pool": clip_pool,
    "open_clip": clip,
}


def wide(model, given):
    """In float64: what is merged and what is not differ by rounding."""
    return model.eval().double(), tuple(x.double() if x.is_floating_point() else x for x in given)


def first(output):
    """Some tensor of an output, that all of the model goes into."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict) and "pooler_output" in output:
        return output["pooler_output"]
    return (output if isinstance(output, tuple) else tuple(output.values()))[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_of_it_is_reached(name):
    torch.manual_seed(0)
    model, given, wanted = MODELS[name]()
    model, given = wide(model, given)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=1))), 0.2)
    sites = [row.site for row in fg.explain(adapted).rows]
    assert all(any(site == name or site.endswith(f".{name}") for site in sites) for name in wanted)
    before, after = first(model(*given)), first(adapted(*given))
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(first(fg.merge(adapted)(*given)), after)
    with fg.disabled(adapted), torch.no_grad():
        torch.testing.assert_close(first(adapted(*given)), before)
    adapted.train()
    first(adapted(*given)).square().sum().backward()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    if name not in ("open_clip",):  # its first output is of the pictures
        assert not idle


@pytest.mark.parametrize("method", FIXED.values(), ids=FIXED)
@pytest.mark.parametrize("name", ["timm beit", "torchvision swin v2", "wavlm"])
def test_methods_there(name, method):
    torch.manual_seed(0)
    model, given, wanted = MODELS[name]()
    model, given = wide(model, given)
    spec = fg.Spec(method, sorted(wanted))
    try:
        adapted = perturb(graft(model, spec))
    except fg.SpecError as error:
        assert "bias" in str(error) or "divide" in str(error) or "smaller" in str(error)
        return
    after = first(adapted(*given))
    assert not torch.allclose(first(model(*given)), after, atol=1e-4)
    if not method.unmergeable:
        torch.testing.assert_close(first(fg.merge(adapted)(*given)), after)


def test_the_way_a_forward_goes_decides():
    """BEiT's qkv is called, or read, as an attribute says; the adapter goes along."""
    model, given = wide(*MODELS["timm beit"]()[:2])
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=1), ["qkv"])))
    want = adapted(*given)
    for block in adapted.blocks:
        with pytest.raises(fg.FxgraftError, match="qkv"):
            block.attn.qkv_bias_separate = True
        assert block.attn.qkv_bias_separate is False
    torch.testing.assert_close(adapted(*given), want)
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    called = fg.rewrite(model, fg.Spec(fg.LoRA(rank=1), ["qkv"]))
    fg.swap(called, fg.adapter_state(adapted))
    torch.testing.assert_close(called(*given), want)
