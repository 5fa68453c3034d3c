"""export_onnx(cache=True) of decoders whose cache is more than a growing list: windows, recurrences, encoders."""

from __future__ import annotations

import decoders
import numpy as np
import onnx
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.backends.artifact.signature import add_up, with_parts
from fxgraft.exporters.onnx.cache.cache_plan import CachePlan
from fxgraft.exporters.onnx.cache.cached_example import cached_example
from fxgraft.rewriter.errors import SessionError

NEW = 24
CHEAP = {"gemma3", "jamba"}
#: RecurrentGemma keeps its state in its modules; Llama 4 turns positions with complex numbers, which ONNX has not.
REFUSED = {"recurrent_gemma", "llama4"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in decoders.FAMILIES]
)
def test_generation_is_torchs(name, tmp_path):
    if name in REFUSED:
        pytest.skip("refused, see below")
    base, given = decoders.build(name), decoders.source(name)
    adapted = models.graft(base, list(decoders.FAMILIES[name].targets), rank=3)
    plain, changed = (decoders.by_torch(model, given, NEW).numpy() for model in (base, adapted))
    example = {key: value for key, value in given.items() if key != "attention_mask"}
    export = fg.export_onnx(adapted, tmp_path / "s.onnx", example, adapters="swappable", cache=True)
    assert all(check.relative < models.TOLERANCE for check in export.parity)
    fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    session = fg.OrtSession(export.path, threads=1)
    session.load("a", tmp_path / "a.onnx_adapter")
    np.testing.assert_array_equal(session.generate(*given.values(), max_new_tokens=NEW), plain)
    np.testing.assert_array_equal(session.generate(*given.values(), max_new_tokens=NEW, adapter="a"), changed)
    assert (plain != changed).any()


def test_a_window_ends_and_its_export_is_checked_behind_its_end(tmp_path):
    base = decoders.build("mistral", num_hidden_layers=1)
    export = fg.export_onnx(base, tmp_path / "m.onnx", models.tokens(2, 6), cache=True)
    assert export.inputs["past_key_0"] == ("batch", 2, "min(past, 3)", 8)
    assert export.outputs["present_key_0"] == ("batch", 2, "min(past + sequence, 3)", 8)
    assert export.inputs["attention_mask"] == ("batch", "past + sequence")
    said = [check.sizes for check in export.parity]
    # 5 tokens of the past behind a window of 3, an empty cache, and one that the new tokens make longer than it is
    assert "input_ids 2x3, attention_mask 2x8, past_key_0 2x2x3x8" in said[0] and "past_key_0 1x2x0x8" in said[1]
    verified = fg.verify(export.path, base)
    assert any("agrees with torch on unseen inputs" in check for check in verified.checks)
    session = fg.OrtSession(export.path, threads=1)
    given = decoders.source("mistral")
    np.testing.assert_array_equal(
        session.generate(*given.values(), max_new_tokens=8), decoders.by_torch(base, given, 8)
    )


def test_a_window_wider_than_the_model_grows():
    wide = decoders.build("mistral", num_hidden_layers=1, sliding_window=4096)
    plan = cached_example(wide, models.tokens(2, 8)).plan
    assert plan.told_as() == 1 and plan.window == 0


def test_the_plan_is_told_and_read():
    for name in ("gemma2", "jamba", "qwen3_next"):
        plan = cached_example(decoders.build(name), models.tokens(2, 8)).plan
        assert CachePlan.told(plan.told_as()) == plan
        assert plan.stepwise == (name != "gemma2")
    assert CachePlan.told(3) == CachePlan.told(3) and len(CachePlan.told(3).layers) == 3


def test_sizes_that_say_what_they_are():
    sizes = with_parts({"batch": 2, "sequence": 3, "past + sequence": 9, "min(past, 4)": 4})
    assert sizes["past"] == 6
    sizes["past"] = 2
    assert add_up(sizes) == {"batch": 2, "sequence": 3, "past": 2, "past + sequence": 5, "min(past, 4)": 2}
    assert add_up({"past": 7, "past + 1": 0, "min(past + 1, 4)": 0}) == {
        "past": 7,
        "past + 1": 8,
        "min(past + 1, 4)": 4,
    }


def test_both_halves_of_an_encoder_decoder_are_in_one_graph(tmp_path):
    base = decoders.build("t5", num_layers=1)
    given = decoders.source("t5")
    export = fg.export_onnx(base, tmp_path / "m.onnx", {"input_ids": given["input_ids"]}, cache=True)
    assert export.inputs["past_cross_key_0"] == ("batch", 4, "source", 8)
    assert export.outputs["present_cross_value_0"] == ("batch", 4, "source", 8)
    assert export.inputs["decoder_input_ids"] == ("batch", "sequence") and next(iter(export.outputs)) == "logits"
    session = fg.OrtSession(export.path, threads=1)
    want = decoders.by_torch(base, given, 8)
    np.testing.assert_array_equal(session.generate(*given.values(), max_new_tokens=8), want)
    begun = want[:, :3]  # goes on from what is said already
    more = session.generate(*given.values(), decoder_input_ids=begun, max_new_tokens=6)
    np.testing.assert_array_equal(more, want)
    # Nothing that a step gives comes from the encoder: its values may be anything, and the halves can be cut apart.
    graph = onnx.load(export.path).graph
    made = {output: node for node in graph.node for output in node.output}
    found, waiting = set(), [value.name for value in graph.output if "cross" not in value.name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += made[name].input if name in made else ()
    assert "past_cross_key_0" in found and "input_ids" not in found
    assert fg.verify(export.path, base).parity
    for options, said in (
        ({"decoder_input_ids": [[1]]}, r"give whole numbers \(2, sequence\)"),
        ({"max_new_tokens": 0}, "give a whole number from 1 up"),
    ):
        with pytest.raises(SessionError, match=said):
            session.generate(*given.values(), **options)


def test_what_an_encoder_decoder_refuses(tmp_path):
    base = decoders.build("t5", num_layers=1)
    ids = decoders.source("t5")["input_ids"]
    for example, said in (
        ({"input_ids": ids, "inputs_embeds": ids}, "'inputs_embeds' is none of them"),
        ({"input_ids": ids[:1]}, "'input_ids' is missing or too small"),
        ({"input_ids": ids, "decoder_input_ids": ids[:, :3]}, "and 4 tokens, half of them for the cache"),
    ):
        with pytest.raises(fg.ExportError, match=said):
            fg.export_onnx(base, tmp_path / "m.onnx", example, cache=True)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_differs_is_refused(tmp_path):
    """A model that counts its tokens in itself: what it gives with a cache is not what it gives without."""
    model = decoders.build("llama", num_hidden_layers=1)
    own = type(model).forward

    class Forgetful(type(model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
            if past_key_values is not None:  # every step is the first
                position_ids = torch.zeros_like(input_ids)
            return own(self, input_ids, attention_mask, position_ids, past_key_values, **more)

    model.__class__ = Forgetful
    with pytest.raises(fg.ExportError, match="gives other logits with its cache than without, by"):
        fg.export_onnx(model, tmp_path / "m.onnx", models.tokens(2, 8), cache=True)
    assert list(tmp_path.iterdir()) == []


def test_a_state_in_modules_is_refused(tmp_path):
    model = decoders.build("recurrent_gemma")
    with pytest.raises(fg.ExportError, match="It may keep one in its modules, which a graph cannot; export it without"):
        fg.export_onnx(model, tmp_path / "m.onnx", models.tokens(2, 8), cache=True)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_choose_what_they_keep_are_refused(tmp_path):
    from transformers.cache_utils import DynamicLayer

    class ChoosingLayer(DynamicLayer):
        pass

    model = decoders.build("llama", num_hidden_layers=1)
    own = type(model).forward

    class Chooses(type(model)):
        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **more):
            output = own(self, input_ids, attention_mask, past_key_values=past_key_values, **more)
            output["past_key_values"].layers[0].__class__ = ChoosingLayer
            return output

    model.__class__ = Chooses
    with pytest.raises(fg.ExportError, match="layers of ChoosingLayer, which choose by values"):
        fg.export_onnx(model, tmp_path / "m.onnx", models.tokens(2, 8), cache=True)


def test_embeddings_come_before_the_ids(tmp_path):
    """As of a model with images: their features stand among the embeddings of a text, and generation goes on."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**{**decoders.SIZES, "num_hidden_layers": 1})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, image_seq_length=4)
    base = LlavaForConditionalGeneration(config).eval()
    adapted = models.graft(base, [r"re:.*language_model.*(q|v)_proj"], rank=3)
    ids = torch.randint(4, 98, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 1:5] = 99
    mask = torch.ones_like(ids)
    ids[1, 0], mask[1, 0] = 0, 0
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        features = adapted.model.get_image_features(pixel_values=pixels).pooler_output
        embeds = adapted.get_input_embeddings()(ids)
        embeds[:, 1:5] = torch.stack(list(features)) if isinstance(features, (tuple, list)) else features
        want = decoders.by_torch(adapted, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, 12)
    example = {"inputs_embeds": embeds, "input_ids": ids.clamp(max=98)}
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", example, cache=True)
    assert export.inputs["inputs_embeds"] == ("batch", "embedded", 32)
    assert export.inputs["attention_mask"] == ("batch", "past + embedded + sequence")
    session = fg.OrtSession(export.path, threads=1)
    got = session.generate(ids[:, 7:], mask, inputs_embeds=embeds[:, :7], max_new_tokens=12)
    np.testing.assert_array_equal(got[:, 2:], want[:, 9:])
    with pytest.raises(SessionError, match="behind 7 embeddings: it covers both"):
        session.generate(ids[:, 7:], mask[:, 1:], inputs_embeds=embeds[:, :7])


def test_embeddings_that_say_too_little_are_refused(tmp_path):
    embeds, ids = torch.randn(2, 4, 32), models.tokens(2, 8)["input_ids"]
    llama = decoders.build("llama", num_hidden_layers=1)
    planar = decoders.build("llama", num_hidden_layers=1)
    planar.model.get_rope_index = lambda: None
    for model, given, said in (
        (decoders.build("mamba", num_hidden_layers=1), embeds, "MambaForCausalLM has a recurrence and takes one token"),
        (planar, embeds, "counts the positions of an image in a plane, which its embeddings do not tell"),
        (llama, embeds[:1], "of as many rows as 'input_ids' and at least 2 columns; it is"),
    ):
        with pytest.raises(fg.ExportError, match=said):
            fg.export_onnx(model, tmp_path / "m.onnx", {"input_ids": ids, "inputs_embeds": given}, cache=True)
    assert list(tmp_path.iterdir()) == []
