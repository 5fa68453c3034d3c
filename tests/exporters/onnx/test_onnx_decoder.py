"""export_onnx(cache=True) and OrtSession.generate: the tokens that torch's generate() gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.rewriter.errors import SessionError

NEW = 64


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=128, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama": (models.llama, ["q_proj", "v_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_fc"])}


def prompts(batch: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with padding on the left, of a different length per row."""
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : min(2 * row, length - 1)] = 0
    return ids, mask


def by_torch(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, new: int = NEW, **options) -> np.ndarray:
    """Greedy tokens of `generate()`; without an end unless the options have one."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **{"pad_token_id": 0, **options}
        ).numpy()


@pytest.fixture(scope="module", params=MODELS)
def decoder(request, tmp_path_factory):
    """(folder, base, adapted, exports) of a small decoder."""
    make, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = make()
    adapted = models.graft(base, targets, rank=3)
    example = models.tokens(2, 8)
    made = {
        "base": fg.export_onnx(base, folder / "base.onnx", example, cache=True),
        "merged": fg.export_onnx(adapted, folder / "merged.onnx", example, cache=True),
        "swappable": fg.export_onnx(adapted, folder / "swappable.onnx", example, adapters="swappable", cache=True),
    }
    fg.export_ort_adapter(adapted, folder / "a.onnx_adapter")
    return folder, base, adapted, made


def test_generation_is_torchs_token_by_token(decoder):
    folder, base, adapted, _ = decoder
    ids, mask = prompts()
    plain, changed = by_torch(base, ids, mask), by_torch(adapted, ids, mask)
    assert plain.shape == (3, 6 + NEW) and (plain != changed).mean() > 0.5
    sessions = {name: fg.OrtSession(folder / f"{name}.onnx", threads=1) for name in ("base", "merged", "swappable")}
    sessions["swappable"].load("a", folder / "a.onnx_adapter")
    np.testing.assert_array_equal(sessions["base"].generate(ids, mask), plain)
    np.testing.assert_array_equal(sessions["merged"].generate(ids, mask), changed)
    np.testing.assert_array_equal(sessions["swappable"].generate(ids, mask), plain)
    np.testing.assert_array_equal(sessions["swappable"].generate(ids, mask, adapter="a"), changed)


def test_the_graph_names_its_cache(decoder):
    _, _, _, made = decoder
    for mode, export in made.items():
        layers = sum(name.startswith("past_key_") for name in export.inputs)
        assert list(export.inputs)[:3] == ["input_ids", "attention_mask", "past_key_0"] and layers in (1, 2)
        assert export.inputs["attention_mask"] == ("batch", "past + sequence")
        past, present = export.inputs["past_key_0"], export.outputs["present_value_0"]
        assert past[0] == "batch" and past[2] == "past" and present == (*past[:2], "past + sequence", past[3])
        assert export.outputs["logits"] == ("batch", "sequence", 100)
        # a full cache, an empty one, and one token after a cache
        assert len({check.sizes for check in export.parity}) == 3
        assert any("x0x" in check.sizes for check in export.parity)
        assert any("input_ids 3x1," in check.sizes for check in export.parity)
        assert all(check.relative < models.TOLERANCE for check in export.parity)
        assert bool(export.adapter_inputs) == (mode == "swappable")
        report = fg.check_gpu(export.path)
        assert report.ok, str(report)


def test_verify_knows_the_cache(decoder):
    folder, base, adapted, _ = decoder
    for name, model in (("base", base), ("swappable", adapted)):
        assert all(check.relative < models.TOLERANCE for check in fg.verify(folder / f"{name}.onnx", model).parity)
    with pytest.raises(fg.VerifyError, match="not the model's"):
        fg.verify(folder / "merged.onnx", base)


def test_rows_end_and_are_filled(decoder):
    folder, base, _, _ = decoder
    ids, mask = prompts()
    ends = sorted({int(by_torch(base, ids, mask, 8)[0, 9]), int(by_torch(base, ids, mask, 8)[1, 11])})
    want = by_torch(base, ids, mask, 12, eos_token_id=ends, pad_token_id=99)
    session = fg.OrtSession(folder / "base.onnx", threads=1)
    np.testing.assert_array_equal(
        session.generate(ids, mask, max_new_tokens=12, eos_token_id=ends, pad_token_id=99), want
    )
    assert (want[:, -1] == 99).any()
    first = by_torch(base, ids[:1], mask[:1], 5)
    alone = session.generate(ids[:1].numpy(), max_new_tokens=5, eos_token_id=int(first[0, 6]))
    assert alone.shape == (1, 7) and alone.dtype == np.int64  # nothing is computed after every row has ended


def test_bound_generation_is_the_same(decoder):
    folder, *_ = decoder
    ids, mask = prompts()
    bound = fg.OrtSession(folder / "merged.onnx", threads=1, binding=True)
    fed = fg.OrtSession(folder / "merged.onnx", threads=1)
    np.testing.assert_array_equal(bound.generate(ids, mask), fed.generate(ids, mask))


def test_a_bank_generates_for_each_row(tmp_path):
    base = models.llama()
    adapted = models.graft(base, ["q_proj", "v_proj"], name="a", seed=2)
    adapted = models.graft(adapted, ["q_proj", "v_proj"], rank=2, name="b", seed=3)
    fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(3, 8), adapters="bank", cache=True)
    session = fg.OrtSession(tmp_path / "m.onnx", threads=1)
    ids, mask = prompts()
    want = []
    for row, name in enumerate(("b", None, "a")):
        fg.set_active(adapted, [name] if name else [])
        want.append(by_torch(adapted, ids, mask, 16)[row])
    np.testing.assert_array_equal(
        session.generate(ids, mask, max_new_tokens=16, adapter_ids=["b", None, "a"]), np.stack(want)
    )


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float16), ("gpt2", torch.bfloat16)])
def test_half_precision_decoders(tmp_path, kind, dtype):
    make, targets = MODELS[kind]
    adapted = models.graft(make().to(dtype), targets).to(dtype)
    mode = "swappable" if kind == "llama" else "merged"
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(2, 8), adapters=mode, cache=True)
    assert export.tolerance == {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert 0 < max(check.relative for check in export.parity) <= export.tolerance
    report = fg.check_gpu(export.path)
    assert report.ok, str(report)
    if dtype is torch.float16:
        session = fg.OrtSession(export.path, threads=1)
        assert {session.inputs["past_key_0"].dtype, session.outputs["present_key_0"].dtype} == {"float16"}
        assert session.generate(prompts()[0], max_new_tokens=3).shape == (3, 9)


def test_the_model_is_left_as_it_was(tmp_path):
    base = models.llama()
    adapted = models.graft(base, ["q_proj"])
    kind, modes = type(adapted), {name: module.training for name, module in adapted.named_modules()}
    adapted.train()
    state = {key: value.clone() for key, value in adapted.state_dict().items()}
    fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(2, 8), cache=True)
    assert type(adapted) is kind and all(module.training for module in adapted.modules()) and not any(modes.values())
    assert all(torch.equal(value, state[key]) for key, value in adapted.state_dict().items())
    adapted.eval()
    with torch.no_grad():
        assert adapted(**models.tokens(2, 8)).past_key_values is not None


# -- errors --------------------------------------------------------------------------------------------------------
def test_what_cannot_have_a_cache(tmp_path):
    cases = [
        (models.bert(), models.tokens(2, 8), "gives no key-value cache for the example"),
        (models.llama(), {"input_ids": torch.ones(1, 8).long()}, "at least 2 rows of 4 tokens.* is 1 x 8"),
        (models.llama(), {"input_ids": torch.ones(2, 3).long()}, "at least 2 rows of 4 tokens.* is 2 x 3"),
        (models.llama(), {"inputs_embeds": torch.ones(2, 8, 32)}, "'input_ids' is missing or no matrix"),
    ]
    for model, example, said in cases:
        with pytest.raises(fg.FxgraftError, match=said):
            fg.export_onnx(model, tmp_path / "m.onnx", example, cache=True)
    with pytest.raises(fg.FxgraftError, match="leave dynamic_shapes out"):
        fg.export_onnx(models.llama(), tmp_path / "m.onnx", models.tokens(2, 8), cache=True, dynamic_shapes={})
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_decoder_exports_without_a_cache(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    ).eval()
    adapted = models.graft(base, ["q", "v"])
    example = {**models.tokens(2, 7), "decoder_input_ids": torch.randint(0, 100, (2, 5))}
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", example, adapters="swappable")
    assert all(check.relative < models.TOLERANCE for check in export.parity)
    assert fg.check_gpu(export.path).ok, str(fg.check_gpu(export.path))


def test_what_generate_refuses(decoder, tmp_path):
    folder, *_ = decoder
    session = fg.OrtSession(folder / "swappable.onnx", threads=1)
    ids, mask = prompts()
    for inputs, options, said in (
        ((ids, mask.flip(1)), {}, "pad prompts on the left"),
        ((ids, mask[:, 1:]), {}, "they have one shape"),
        ((ids[0],), {}, r"give whole numbers \(batch, sequence\)"),
        ((ids.float(),), {}, "give whole numbers"),
        ((ids,), {"max_new_tokens": 0}, "max_new_tokens=0"),
        ((ids,), {"adapter_ids": ["a"] * 3}, "needs a graph with a bank"),
    ):
        with pytest.raises(SessionError, match=said):
            session.generate(*inputs, **options)
    with pytest.raises(fg.AdapterError, match="no adapter 'b' is loaded"):
        session.generate(ids, adapter="b")
    fg.export_onnx(models.llama(), tmp_path / "m.onnx", models.tokens(2, 6))
    with pytest.raises(SessionError, match="no key-value cache to generate with: export it with cache=True"):
        fg.OrtSession(tmp_path / "m.onnx", threads=1).generate(ids)


# -- a real model --------------------------------------------------------------------------------------------------
@pytest.mark.real
def test_smollm2_generates_what_torch_generates(tmp_path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples"))
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2_dir()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    adapted = fg.rewrite(base, fg.Spec(fg.LoRA(rank=8, alpha=16), targets=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.eval()
    texts = ["The capital of France is", "Once upon a time, in a village by the sea, there"]
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert (mask == 0).any()
    for name, mode, model in (("base", "merged", base), ("merged", "merged", adapted), ("s", "swappable", adapted)):
        export = fg.export_onnx(model, tmp_path / f"{name}.onnx", dict(tokens), adapters=mode, cache=True)
        assert fg.check_gpu(export.path).ok
    fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    plain, changed = by_torch(base, ids, mask), by_torch(adapted, ids, mask)
    assert (plain != changed).any()
    for name, adapter, want in (
        ("base", None, plain),
        ("merged", None, changed),
        ("s", None, plain),
        ("s", "a", changed),
    ):
        session = fg.OrtSession(tmp_path / f"{name}.onnx")
        if adapter:
            session.load("a", tmp_path / "a.onnx_adapter")
        np.testing.assert_array_equal(session.generate(ids, mask, adapter=adapter), want)
