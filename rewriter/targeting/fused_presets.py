"""How architectures cut their fused weights, read from the module that splits the product.

A preset belongs to the class whose forward does the splitting: a subclass with a forward of its own has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError
from ..grafted_class import base_class
from ..parts import Cut
from .weight_products import Candidate

Names = tuple[tuple[str, ...], ...]
Sizes = Callable[["Facts", int], Cut]

_Q, _K, _V = ("q_proj", "query", "q", "to_q"), ("k_proj", "key", "k", "to_k"), ("v_proj", "value", "v", "to_v")
_GATE, _UP = ("gate_proj", "gate"), ("up_proj", "up")


class Facts:
    """What a module and its config say of themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *names: str) -> Any:
        """The first of these that the module or its config has."""
        for holder in (self.module, getattr(self.module, "config", None)):
            for name in names:
                if (found := getattr(holder, name, None)) is not None:
                    return found
        raise LookupError(f"{type(self.module).__name__} and its config have no {' or '.join(names)}")


@dataclass(frozen=True)
class Preset:
    """How one kind of module cuts one of its weights.

    Args:
        names: of the parts, in their order, or how they follow from the module.
        sizes: the cut of so many features.
    """

    names: Names | Callable[[Facts], Names]
    sizes: Sizes


@dataclass(frozen=True)
class Fused:
    """A weight whose parts have names: the preset and the module that it reads."""

    names: Names
    sizes: Sizes
    facts: Facts

    @property
    def usual(self) -> tuple[str, ...]:
        return tuple(names[0] for names in self.names)

    def number(self, name: str) -> int | None:
        return next((i for i, names in enumerate(self.names) if name in names), None)

    def fits(self, weight: str, produced: int) -> bool:
        try:
            self.cut(weight, produced)
        except TargetError:
            return False
        return True

    def cut(self, weight: str, produced: int) -> Cut:
        """The cut of the weight's produced features.

        Raises:
            TargetError: the preset does not fit them; the text has the numbers.
        """
        kind = base_class(self.facts.module).__name__
        way = f"give fg.Target({weight!r}, parts=..., select=...) with the parts as they are"
        try:
            cut = self.sizes(self.facts, produced)
        except (LookupError, ZeroDivisionError) as error:
            raise TargetError(f"{weight!r}: how {kind} cuts it cannot be read: {error}; {way}") from error
        if cut.produced != produced or min(cut.sizes) < 1:
            raise TargetError(
                f"{weight!r} produces {produced} features, and {kind} would cut {cut.produced}, {cut} "
                f"({', '.join(self.usual)}); {way}"
            )
        return Cut(cut.sizes, cut.groups, self.names)


# -- how they lie ------------------------------------------------------------------------------------------------
def _equal(parts: int) -> Sizes:
    return lambda facts, produced: Cut((produced // parts,) * parts)


def _head(facts: Facts) -> tuple[int, int]:
    """The number of heads and the size of one."""
    heads = int(facts("num_attention_heads", "num_heads", "n_head"))
    own = getattr(facts.module, "head_dim", None) or getattr(facts.module, "attention_head_size", None)
    return heads, int(own or facts("hidden_size", "embed_dim") // heads)


def _per_head(facts: Facts, produced: int) -> Cut:
    """`(heads, q k v, size)`."""
    heads, size = _head(facts)
    return Cut((size,) * 3, heads)


def _grouped_query(facts: Facts, produced: int) -> Cut:
    """All queries, then the keys of fewer heads, then the values."""
    heads, size = _head(facts)
    shared = facts("num_key_value_heads") * size
    return Cut((heads * size, shared, shared))


def _falcon(facts: Facts, produced: int) -> Cut:
    heads, size = _head(facts)
    if facts("new_decoder_architecture"):
        groups = facts("num_kv_heads")
        return Cut((heads // groups * size, size, size), groups)
    return Cut((heads * size, size, size)) if facts("multi_query") else Cut((size,) * 3, heads)


def _bigcode(facts: Facts, produced: int) -> Cut:
    if not facts("multi_query"):
        return _per_head(facts, produced)
    return Cut((facts("embed_dim"), facts("kv_dim"), facts("kv_dim")))


def _codegen(facts: Facts, produced: int) -> Cut:
    """Four blocks, as it was trained on four devices, each with its heads' q, v and k."""
    return Cut((facts("embed_dim") // 4,) * 3, 4)


def _exaone_vision(facts: Facts, produced: int) -> Cut:
    return Cut((facts("q_dim"), facts("kv_dim"), facts("kv_dim")))


def _key_per_head(facts: Facts, produced: int) -> Cut:
    """`(heads, q k v)` with values of another size."""
    return Cut((facts("key_dim"), facts("key_dim"), facts("val_dim")), facts("num_heads"))


def _gpt2_names(facts: Facts) -> Names:
    return (_K, _V) if facts("is_cross_attention") else (_Q, _K, _V)


def _gpt2(facts: Facts, produced: int) -> Cut:
    parts = len(_gpt2_names(facts))
    return Cut((facts("embed_dim"),) * parts)


# -- whose they are ----------------------------------------------------------------------------------------------
_THIRDS, _GROUPED = Preset((_Q, _K, _V), _equal(3)), Preset((_Q, _K, _V), _grouped_query)
_HEADS, _HALVES = Preset((_Q, _K, _V), _per_head), Preset((_K, _V), _equal(2))
_GATED = Preset((_GATE, _UP), _equal(2))
_VALUE_SIZED = Preset((_Q, _K, _V), _key_per_head)

_PRESETS: dict[tuple[str, str, str], Preset] = {}  # package, class and weight


def _add(package: str, weight: str, preset: Preset, classes: Iterable[str]) -> None:
    _PRESETS.update({(package, kind, weight): preset for kind in classes})


_T, _TIMM = "transformers", "timm"
_add(_T, "query_key_value", _HEADS, ["GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention",
                                     "PersimmonAttention"])  # fmt: skip
_add(_T, "query_key_value", Preset((_Q, _K, _V), _falcon), ["FalconAttention"])
_add(_T, "in_proj", _HEADS, ["DisentangledSelfAttention"])
_add(_T, "qkv_proj", _HEADS, ["MiniMaxLightningAttention"])
_add(_T, "qkv_proj", _GROUPED, ["Phi3Attention", "Phi4MultimodalAttention"])
_add(_T, "qkv_proj", Preset((_Q, _V, _K), _codegen), ["CodeGenAttention"])
_add(_T, "Wqkv", _GROUPED, ["DbrxAttention"])
_add(_T, "Wqkv", _THIRDS, ["MptAttention", "ModernBertAttention"])
_add(_T, "c_attn", Preset(_gpt2_names, _gpt2), ["GPT2Attention", "DecisionTransformerGPT2Attention"])
_add(_T, "c_attn", Preset((_Q, _K, _V), _bigcode), ["GPTBigCodeAttention"])
_add(_T, "c_attn", _THIRDS, ["Attention"])  # the first GPT's
_add(_T, "att_proj", _THIRDS, ["BarkSelfAttention"])
_add(_T, "qkv_linear", _THIRDS, ["LayoutLMv2SelfAttention"])
_add(_T, "qkv", Preset((_Q, _K, _V), _exaone_vision), ["Exaone4_5_VisionAttention"])
_add(_T, "qkv", _THIRDS, [
    "BlipAttention", "Blip2Attention", "InstructBlipAttention", "InstructBlipVideoAttention", "VisionAttention",
    "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention",
    "Qwen3OmniMoeVisionAttention", "Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention",
    "Ernie4_5_VLMoeVisionAttention", "Glm4vVisionAttention", "Glm4vMoeVisionAttention", "GlmOcrVisionAttention",
    "GlmImageVisionAttention", "SamVisionAttention", "SamVisionSdpaAttention", "SamHQVisionAttention",
    "SamHQVisionSdpaAttention", "Sam2MultiScaleAttention", "GotOcr2VisionAttention", "SegGptAttention",
    "VitDetAttention", "TimesformerSelfAttention", "MgpstrAttention", "HieraMaskUnitAttention",
    "Florence2VisionWindowAttention", "Florence2VisionChannelAttention",
])  # fmt: skip
_add(_T, "gate_up_proj", _GATED, ["Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Glm4vTextMLP", "GlmOcrTextMLP",
                                  "GlmImageTextMLP", "DiaMLP", "Zamba2MLP"])  # fmt: skip
_add(_T, "gate_up_proj", Preset((_UP, _GATE), _equal(2)), ["Phi4MultimodalAudioMLP"])
_add(_T, "input_linear", _GATED, ["GraniteMoeSharedMLP", "GraniteMoeHybridMLP", "GraniteMoeSWAMLP"])
_add(_T, "Wi", Preset((("input",), ("gate",)), _equal(2)), ["ModernBertMLP", "ModernBertDecoderMLP"])
_add(_T, "to_kv", _HALVES, ["GraniteSpeechConformerAttention", "GraniteSpeechPlusConformerAttention",
                            "EvollaSequenceCompressorAttention"])  # fmt: skip
_add(_TIMM, "qkv", _THIRDS, [
    "Attention", "AttentionRope", "AttentionPool2d", "RotAttentionPool2d", "DiffAttention", "TalkingHeadAttn",
    "FactorAttnConvRelPosEnc", "MHSA", "ChannelAttention", "ChannelAttentionV2", "WindowAttention",
    "WindowMultiHeadAttention", "CrossCovarianceAttn", "EvaAttention", "MaskUnitAttention", "MultiScaleAttention",
    "LocallyGroupedAttn", "RelPosAttention", "XCA",
])  # fmt: skip
_add(_TIMM, "kv", _HALVES, ["Attention", "GlobalSubSampleAttn", "ClassAttention", "AttentionPoolLatent"])
_add("torchvision", "qkv", _THIRDS, ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
_add("torchvision", "to_qkv", _THIRDS, ["RelativePositionalMultiHeadAttention"])
_add("torch", "in_proj_weight", _THIRDS, ["MultiheadAttention"])
#: classes of one name that cut otherwise than the ones above
_ELSEWHERE = {
    ("timm.models.efficientformer", "Attention", "qkv"): _VALUE_SIZED,
    ("timm.models.tiny_vit", "Attention", "qkv"): _VALUE_SIZED,
}


def fused(modules: Mapping[str, nn.Module], candidate: Candidate) -> Fused | None:
    """What is known of how a weight is cut; None for nothing."""
    if candidate.attribute == "weight":
        path, _, weight = candidate.owner.rpartition(".")
        if not weight:
            return None
    else:
        path, weight = candidate.owner, candidate.attribute
    module = modules[path]
    kind = next(c for c in base_class(module).__mro__ if "forward" in c.__dict__ or c is nn.Module)
    preset = _ELSEWHERE.get((kind.__module__, kind.__name__, weight)) or _PRESETS.get(
        (kind.__module__.partition(".")[0], kind.__name__, weight)
    )
    if preset is None:
        return None
    facts = Facts(module)
    return Fused(preset.names(facts) if callable(preset.names) else preset.names, preset.sizes, facts)
