"""Saving and loading: what is written, what is checked, what a damaged or foreign file says."""

import json
import os

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS
from methods import METHODS, graft
from safetensors.torch import load_file, save_file
from small_models import perturb

import fxgraft as fg
from fxgraft.rewriter.state import record_of

SPEC = fg.Spec(fg.LoRA(rank=3, alpha=5), ["query", "dense"], train=["classifier"], overrides={"layer.0.*": fg.LoRA(2)})


@pytest.fixture
def saved(bert, tmp_path):
    adapted = perturb(fg.rewrite(bert, SPEC))
    assert fg.save_adapter(adapted, tmp_path / "a") == tmp_path / "a"
    return adapted, tmp_path / "a"


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_round_trip(bert, ids, saved):
    adapted, folder = saved
    keys = list(bert.state_dict())
    loaded = fg.load_adapter(bert, folder, name="again")
    assert fg.active(loaded) == ["again"] and torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert list(bert.state_dict()) == keys
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n.replace("default", "again") for n, p in adapted.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_saved_loaded_and_swapped(mlp, tmp_path, method):
    spec, x = fg.Spec(method, ["up", "down"], train=["head"]), torch.randn(4, 7)
    one, other = (perturb(graft(mlp, spec), 0.3).eval() for _ in range(2))
    loaded = fg.load_adapter(mlp, fg.save_adapter(one, tmp_path)).eval()
    assert record_of(loaded, "default").spec == spec
    assert torch.equal(loaded(x), one(x)) and not torch.equal(one(x), other(x))
    fg.swap(loaded, fg.adapter_state(other))
    assert torch.equal(loaded(x), other(x))


def test_a_second_adapter_loads_beside_the_first(bert, ids, saved):
    adapted, folder = saved
    both = fg.load_adapter(adapted, folder, name="b")
    fg.set_active(both, ["b"])
    assert torch.equal(both(ids).logits, adapted(ids).logits)


def test_saving_again_replaces_and_leaves_no_litter(saved):
    adapted, folder = saved
    fg.save_adapter(perturb(adapted), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    state = fg.adapter_state(adapted)
    assert all(torch.equal(t, state[n]) for n, t in load_file(folder / WEIGHTS).items())


def test_spec_survives_json(saved):
    spec = fg.Spec.from_dict(json.loads((saved[1] / CONFIG).read_text())["spec"])
    assert spec == SPEC
    parts = fg.Spec(fg.UniLoRA(2, 10), [fg.Target("qkv", 3, (0, 2)), "re:.*x"], exclude="y")
    assert fg.Spec.from_dict(json.loads(json.dumps(parts.to_dict()))) == parts


@pytest.mark.parametrize("bad", [{}, {"method": {"method": "lara"}}, {"method": {"method": "lora", "rnk": 2}}])
def test_unknown_specs(bad):
    with pytest.raises(fg.SpecError):
        fg.Spec.from_dict(bad)


def corrupt(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[0:8] = b"\xff" * 8
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


A = "bert.encoder.layer.1.attention.self.query.A"
DAMAGE = {
    "corrupted": (corrupt, "damaged or not a safetensors file"),
    "truncated": (truncate, "damaged or not a safetensors file"),
    "no tensors": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "not an adapter folder"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "expected an object"),
    "foreign config": (lambda f: (f / CONFIG).write_text('{"a": 1}'), "not known"),
    "newer version": (lambda f: edit(f, lambda c: c.update(format_version=2)), "update fxgraft"),
    "no spec": (lambda f: edit(f, lambda c: c.pop("spec")), "lacks 'spec'"),
    "unknown method": (lambda f: edit(f, lambda c: c["spec"]["method"].update(method="new")), "unknown method 'new'"),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(A)), "lacks 1 tensor"),
    "unknown tensor": (lambda f: change_tensors(f, lambda t: t.update(x=torch.ones(1))), "'x'"),
    "wrong shape": (lambda f: change_tensors(f, lambda t: t.update({A: torch.ones(3, 31)})), r"\(3, 31\)"),
    "wrong dtype": (lambda f: change_tensors(f, lambda t: t.update({A: t[A].int()})), "torch.int32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(bert, ids, saved, damage):
    _, folder = saved
    harm, says = DAMAGE[damage]
    harm(folder)
    keys, before = list(bert.state_dict()), bert(ids).logits
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(bert, folder)
    assert list(bert.state_dict()) == keys and torch.equal(bert(ids).logits, before)


def test_an_adapter_of_another_model(llama, saved):
    with pytest.raises(fg.CheckpointError, match="does not fit this LlamaForCausalLM"):
        fg.load_adapter(llama, saved[1])


def test_an_adapter_of_another_size(bert, saved):
    config = type(bert.config)(**{**bert.config.to_dict(), "intermediate_size": 40})
    with pytest.raises(fg.CheckpointError, match=r"another model.*\(48, 32\) there, \(40, 32\) here"):
        fg.load_adapter(type(bert)(config), saved[1])
    deeper = type(bert.config)(**{**bert.config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(fg.CheckpointError, match=r"unknown there .*layer\.2"):
        fg.load_adapter(type(bert)(deeper), saved[1])


def test_a_float16_adapter_is_widened_on_a_float32_base(bert, ids, tmp_path):
    """Exactly, as PEFT does with a folder of its own; values of another dtype handed over in memory are the user's."""
    adapted = perturb(fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"]), dtype=torch.float16))
    fg.save_adapter(adapted, tmp_path)
    loaded = fg.load_adapter(bert, tmp_path)
    state = fg.adapter_state(adapted)
    assert all(torch.equal(t, state[k].float()) for k, t in fg.adapter_state(loaded).items())
    with pytest.raises(fg.AdapterError, match="cast it first"):
        fg.swap(fg.rewrite(bert, fg.Spec(fg.LoRA(2), ["query"])), state)


@pytest.mark.parametrize("base", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["fxgraft", "peft"])
def test_a_trained_head_takes_the_dtype_of_the_base(llama, tmp_path, base, format):
    adapted = perturb(fg.rewrite(llama.to(torch.bfloat16), fg.Spec(fg.LoRA(2), ["q_proj"], train=["lm_head"])))
    fg.save_adapter(adapted, tmp_path, format=format)
    saved, loaded = fg.adapter_state(adapted), fg.adapter_state(fg.load_adapter(llama.to(base), tmp_path))
    heads = ("lm_head", "model.embed_tokens")  # tied; PEFT's format names both
    assert {t.dtype for k, t in loaded.items() if k.startswith(heads)} == {base}
    assert {t.dtype for k, t in loaded.items() if not k.startswith(heads)} == {torch.float32}
    assert all(torch.equal(loaded[k], t.to(loaded[k].dtype)) for k, t in saved.items())


def test_a_head_that_overflows_in_the_dtype_of_the_base(llama, tmp_path):
    adapted = fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"], train=["lm_head"]))
    with torch.no_grad():
        adapted.lm_head.fxgraft.default.weight[0] = 1e6
    fg.save_adapter(adapted, tmp_path)
    with pytest.raises(fg.CheckpointError, match=r"NaN or infinite values in 'lm_head.weight'"):
        fg.load_adapter(llama.half(), tmp_path)


@pytest.mark.parametrize("format", ["fxgraft", "peft"])
def test_a_vector_belongs_to_its_projection(mlp, tmp_path, format, monkeypatch):
    """Another generator, or layers in another order, give other indices under the same seed."""
    from fxgraft.passes.methods.unilora import unilora

    fg.save_adapter(fg.rewrite(mlp, fg.Spec(fg.UniLoRA(2, 20), ["up", "down"])), tmp_path, format=format)
    fg.load_adapter(mlp, tmp_path)
    drawn = unilora.balanced_indices
    monkeypatch.setattr(unilora, "balanced_indices", lambda *given: drawn(*given)[::-1].copy())
    with pytest.raises(fg.CheckpointError, match="another projection than its config gives here"):
        fg.load_adapter(mlp, tmp_path)


HUGE = {
    "LoRA, rank 2**40": (fg.LoRA(2), {"rank": 2**40}),
    "HydraLoRA, 2**24 experts": (fg.HydraLoRA(2, 3), {"experts": 2**24}),
    "Uni-LoRA, a vector of 2**50": (fg.UniLoRA(2, 20), {"vector_length": 2**50}),
    "Uni-LoRA, rank 2**40": (fg.UniLoRA(2, 20), {"rank": 2**40}),
    "VeRA, rank 2**40": (fg.VeRA(2), {"rank": 2**40}),
    "PRoLoRA, rank 2**40": (fg.PRoLoRA(4, 1, 2, 2), {"rank": 2**40}),
    "LoRA-XS, rank 2**40": (fg.LoRAXS(2), {"rank": 2**40}),
    "GLoRA, rank 2**40": (fg.GLoRA(2), {"rank": 2**40}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HUGE)
def test_sizes_that_only_the_config_claims(mlp, tmp_path, case):
    """Nothing of that size is made: a process of a few gigabytes would not survive it."""
    method, claims = HUGE[case]
    fg.save_adapter(fg.rewrite(mlp, fg.Spec(method, ["up"])), tmp_path)
    edit(tmp_path, lambda c: (c["spec"]["method"].update(claims), c.pop("derived", None)))
    change_tensors(tmp_path, lambda t: None)  # without the record of what it was saved with
    with pytest.raises(fg.CheckpointError):
        fg.load_adapter(mlp, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_on_a_bf16_base_is_kept(llama, ids, tmp_path, dtype):
    llama = llama.to(torch.bfloat16)
    spec = fg.Spec(fg.LoRA(2), ["q_proj"], train=["layers.1.mlp.gate_proj"])
    adapted = perturb(fg.rewrite(llama, spec, dtype=dtype))
    fg.save_adapter(adapted, tmp_path)
    loaded = fg.load_adapter(llama, tmp_path)
    assert {t.dtype for k, t in fg.adapter_state(loaded).items() if "q_proj" in k} == {dtype}
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)


def test_nan_is_not_written(bert, tmp_path):
    adapted = fg.rewrite(bert, SPEC)
    with torch.no_grad():
        adapted.classifier.fxgraft.default.bias[0] = float("nan")
    with pytest.raises(fg.CheckpointError, match=r"NaN or infinite values in 'classifier.bias'"):
        fg.save_adapter(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written(saved, tmp_path, monkeypatch):
    adapted, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(fg.CheckpointError, match="cannot write to"):
        fg.save_adapter(adapted, tmp_path / "file" / "a")


def test_a_read_only_folder_keeps_what_it_had(bert, saved, monkeypatch):
    adapted, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # root may write anywhere, so the refusal of the file system is put in its place
    monkeypatch.setattr("fxgraft.backends.artifact.staging.tempfile.mkdtemp", refuse)
    with pytest.raises(fg.CheckpointError, match=r"cannot write to .*Permission denied"):
        fg.save_adapter(perturb(adapted), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_failure_half_way_keeps_the_old_adapter(saved, monkeypatch):
    adapted, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxgraft.exporters.checkpoints.folder_files.save_file", refuse)
    with pytest.raises(fg.CheckpointError, match="No space left"):
        fg.save_adapter(perturb(adapted), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_unknown_format(saved, tmp_path):
    with pytest.raises(fg.CheckpointError, match="allowed are"):
        fg.save_adapter(saved[0], tmp_path, format="zip")
