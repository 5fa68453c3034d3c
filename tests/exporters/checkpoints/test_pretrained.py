"""`save_pretrained` of adapted models, and transformers' Trainer, which saves, resumes and loads its best with it."""

import copy
import json
import os
import pickle

import pytest
import torch
from methods import METHODS, graft
from safetensors.torch import load_file, save_file
from small_models import MLP, perturb
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fxgraft as fg

pytestmark = pytest.mark.filterwarnings("ignore:fxgraft, save_pretrained")
SPEC = fg.Spec(fg.LoRA(rank=2), ["q_proj", "v_proj"])


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        row = torch.randint(3, 90, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": row, "labels": row}


def trainer(model, folder, **options):
    given = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "eval_steps": 2,
        "logging_steps": 100,
        "disable_tqdm": True,
        "seed": 3,
    }
    return Trainer(model, TrainingArguments(**{**given, **options}), train_dataset=Rows(), eval_dataset=Rows())


# -- save_pretrained -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_saved_opens_on_the_base(llama, ids, tmp_path, method):
    adapted = perturb(graft(llama, fg.Spec(method, ["q_proj"], train=["lm_head"])))
    adapted.save_pretrained(tmp_path)
    loaded = fg.load_adapter(llama, tmp_path)
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert not torch.equal(loaded(ids).logits, llama(ids).logits)
    assert {"config.json", "generation_config.json", "model.safetensors", "default"} <= set(os.listdir(tmp_path))


def test_the_base_is_not_in_the_folder_and_a_warning_says_so(llama, tmp_path):
    adapted = fg.rewrite(llama, SPEC)
    with pytest.warns(UserWarning, match=r"fxgraft, save_pretrained: .*not the base model.*load_adapter"):
        adapted.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {
        name for name, p in adapted.named_parameters() if p.requires_grad
    }


def test_the_class_keeps_its_own_method_and_so_do_base_and_merged_models(llama, ids, tmp_path):
    adapted = perturb(fg.rewrite(llama, SPEC))
    assert type(adapted) is type(llama) and "save_pretrained" not in llama.__dict__
    merged = fg.merge(adapted)
    assert "save_pretrained" not in merged.__dict__
    merged.save_pretrained(tmp_path)
    again = type(llama).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    fg.remove(adapted, "default")
    assert all("save_pretrained" not in module.__dict__ for module in adapted.modules())


def test_copies_and_pickles_save_their_own_values(llama, ids, tmp_path):
    adapted = perturb(fg.rewrite(llama, SPEC))
    twins = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted)), fg.rewrite(adapted, SPEC, "b")]
    for i, twin in enumerate(twins):
        perturb(twin)
        twin.save_pretrained(tmp_path / str(i))
        fg.set_active(twin, ["default"])
        assert torch.equal(fg.load_adapter(llama, tmp_path / str(i))(ids).logits, twin(ids).logits)
        assert not torch.equal(twin(ids).logits, adapted(ids).logits) or i == 2


def test_several_adapters_each_have_a_folder(llama, ids, tmp_path):
    both = perturb(fg.rewrite(fg.rewrite(llama, SPEC, "a"), SPEC, "b"))
    both.save_pretrained(tmp_path)
    with pytest.raises(fg.CheckpointError, match="holds 2 adapters, 'a', 'b', and none is called 'default'"):
        fg.load_adapter(llama, tmp_path)
    for name in "ab":
        fg.set_active(both, [name])
        assert torch.equal(fg.load_adapter(llama, tmp_path, name)(ids).logits, both(ids).logits)


def test_other_processes_write_nothing(llama, tmp_path):
    fg.rewrite(llama, SPEC).save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_a_gathered_state_dict_is_what_is_saved(llama, ids, tmp_path):
    adapted = fg.rewrite(llama, SPEC)
    elsewhere = perturb(copy.deepcopy(adapted))
    adapted.save_pretrained(tmp_path, state_dict=elsewhere.state_dict(), max_shard_size="5MB", safe_serialization=True)
    assert torch.equal(fg.load_adapter(llama, tmp_path)(ids).logits, elsewhere(ids).logits)
    adapted.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(adapted(ids).logits, elsewhere(ids).logits)


def test_a_distributed_checkpoint_is_refused(llama, tmp_path):
    with pytest.raises(fg.CheckpointError, match="distributed_checkpoint"):
        fg.rewrite(llama, SPEC).save_pretrained(tmp_path / "a", distributed_checkpoint=True)
    assert not (tmp_path / "a").exists()


def test_the_base_models_own_folder_keeps_its_weights(llama, ids, tmp_path):
    llama.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    adapted = perturb(fg.rewrite(llama, SPEC))
    with pytest.warns(UserWarning, match="'model.safetensors' in that folder is of another model"):
        adapted.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    opened = fg.load_adapter(type(llama).from_pretrained(tmp_path).eval(), tmp_path)
    assert torch.equal(opened(ids).logits, adapted(ids).logits)


def test_a_trainers_old_checkpoint_is_replaced(llama, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    fg.rewrite(llama, SPEC).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_base_weights_that_train_too_are_kept_and_named(llama, tmp_path):
    adapted = fg.rewrite(llama, SPEC)
    adapted.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"'model.norm.weight' of the base require grad and are in no adapter folder"):
        adapted.save_pretrained(tmp_path)
    assert "model.norm.weight" in load_file(tmp_path / "model.safetensors")


def test_a_part_of_an_adapted_model_saves_its_base_and_warns(llama, ids, tmp_path):
    adapted = perturb(fg.rewrite(llama, SPEC))
    with pytest.warns(UserWarning, match="LlamaModel is a part of an adapted model"):
        adapted.model.save_pretrained(tmp_path)
    again = type(llama.model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, llama.model(ids).last_hidden_state)


class Home(nn.Module):
    """A class with a `save_pretrained` that is not transformers'."""

    def __init__(self):
        super().__init__()
        self.net = MLP()

    def forward(self, x):
        return self.net(x)

    def save_pretrained(self, path):
        torch.save(self.state_dict(), path / "own.pt")
        return "written"


def test_another_librarys_save_pretrained_gets_the_adapter_beside_its_files(tmp_path):
    base = Home().eval()
    adapted = perturb(fg.rewrite(base, fg.Spec(fg.LoRA(2), ["up"])))
    with pytest.warns(UserWarning, match="the class's own files hold the base model"):
        assert adapted.save_pretrained(tmp_path) == "written"
    x = torch.randn(2, 7)
    assert (tmp_path / "own.pt").is_file() and torch.equal(fg.load_adapter(base, tmp_path)(x), adapted(x))


def test_running_statistics_come_back(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 2, "layer_type": "basic"}
    base = ResNetForImageClassification(ResNetConfig(num_channels=3, **sizes))
    adapted = fg.rewrite(base, fg.Spec(fg.LoRA(1), ["classifier.1"])).train()
    for _ in range(3):
        adapted(torch.randn(4, 3, 32, 32) + 1)
    adapted.eval().save_pretrained(tmp_path)
    other = fg.rewrite(base, fg.Spec(fg.LoRA(1), ["classifier.1"])).eval()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x).logits, adapted(x).logits)


# -- the Trainer ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [fg.LoRA(2), fg.UniLoRA(2, 64)], ids=lambda m: m.key)
def test_trainer_saves_resumes_and_loads(llama, ids, tmp_path, method):
    base = copy.deepcopy(llama.state_dict())
    spec = fg.Spec(method, ["q_proj", "v_proj"])
    adapted = fg.rewrite(llama, spec)
    first = copy.deepcopy(adapted)
    whole = trainer(adapted, tmp_path / "a")
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    adapted.eval()
    assert torch.equal(fg.load_adapter(llama, tmp_path / "final")(ids).logits, adapted(ids).logits)
    early = fg.load_adapter(llama, tmp_path / "a" / "checkpoint-2")(ids).logits
    assert not torch.equal(early, adapted(ids).logits) and not torch.equal(early, llama(ids).logits)

    resumed = trainer(first, tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 6
    torch.testing.assert_close(first.eval()(ids).logits, adapted(ids).logits, rtol=0, atol=0)
    assert all(torch.equal(t, llama.state_dict()[n]) for n, t in base.items())


@pytest.mark.parametrize("other", [(fg.Spec(fg.LoRA(2), ["k_proj"]), "default"), (SPEC, "b")], ids=["sites", "name"])
def test_resuming_with_another_adapter_is_refused(llama, tmp_path, other):
    """The Trainer itself would log the keys and train from the start."""
    trainer(fg.rewrite(llama, SPEC), tmp_path, max_steps=2).train()
    with pytest.raises(fg.AdapterError, match=r"8 tensor\(s\) of adapters that the LlamaForCausalLM does not have"):
        trainer(fg.rewrite(llama, *other), tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_what_is_checked_when_a_state_is_loaded(llama, ids, tmp_path):
    adapted = perturb(fg.rewrite(llama, SPEC))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(fg.rewrite(fg.rewrite(llama, SPEC), SPEC, "b"))))
    twin.load_state_dict(adapted.state_dict(), strict=False)  # fewer adapters than the model has
    twin.load_state_dict(llama.state_dict(), strict=False)  # none
    with pytest.raises(fg.AdapterError, match="has 8 tensor"):
        fg.load_adapter(llama, _saved(adapted, tmp_path), "c").load_state_dict(adapted.state_dict(), strict=False)
    fg.remove(adapted, "default")
    assert not adapted._load_state_dict_pre_hooks and not llama._load_state_dict_pre_hooks
    adapted.load_state_dict(twin.state_dict(), strict=False)  # a plain model's own affair
    assert not fg.merge(twin)._load_state_dict_pre_hooks


def _saved(adapted, folder):
    adapted.save_pretrained(folder)
    return folder


class GetsWorse(TrainerCallback):
    """The first evaluation is the best one."""

    def __init__(self):
        self.count = 0

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.count += 1
        metrics["eval_loss"] = float(self.count)


def test_trainer_loads_its_best_model(llama, ids, tmp_path):
    adapted = fg.rewrite(llama, SPEC)
    run = trainer(adapted, tmp_path, eval_strategy="steps", load_best_model_at_end=True)
    run.add_callback(GetsWorse())
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = fg.load_adapter(llama, tmp_path / "checkpoint-2")(ids).logits
    last = fg.load_adapter(llama, tmp_path / "checkpoint-6")(ids).logits
    assert torch.equal(adapted.eval()(ids).logits, best) and not torch.equal(best, last)


def test_a_checkpoint_has_the_size_of_the_adapter(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 4000,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    adapted = fg.rewrite(base, SPEC)
    trainer(adapted, tmp_path, max_steps=2).train()
    whole = sum(p.numel() * p.element_size() for p in base.parameters())
    assert size(tmp_path / "checkpoint-2") < whole / 40  # weights twice, two moments, and transformers' small files
    config = json.loads((tmp_path / "checkpoint-2" / "default" / "adapter_config.json").read_text())
    assert config["format"] == "fxgraft"


OPTIONS = {
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_trainers_options(llama, ids, tmp_path, options):
    adapted = fg.rewrite(llama, SPEC)
    before = copy.deepcopy(fg.adapter_state(adapted))
    run = trainer(adapted, tmp_path, max_steps=4, **options)
    run.train()
    assert all(not torch.equal(t, before[n]) for n, t in fg.adapter_state(adapted).items())
    loaded = fg.load_adapter(llama, tmp_path / "checkpoint-4")
    plain = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    assert plain is adapted and torch.equal(loaded(ids).logits, plain(ids).logits)
    torch.testing.assert_close(fg.merge(adapted)(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_resumes(llama, ids, tmp_path):
    """The Trainer saves and loads the state of `torch.compile`'s wrapper, whose names begin with `_orig_mod`."""
    adapted, fresh = fg.rewrite(llama, SPEC), fg.rewrite(llama, SPEC)
    options = {"remove_unused_columns": False, "max_steps": 2}
    trainer(torch.compile(adapted, backend="eager"), tmp_path, **options).train()
    loaded = fg.load_adapter(llama, tmp_path / "checkpoint-2")
    assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)
    trainer(torch.compile(fresh, backend="eager"), tmp_path, **options).train(str(tmp_path / "checkpoint-2"))
    assert torch.equal(fresh.eval()(ids).logits, adapted(ids).logits)
    assert not torch.equal(fresh(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("how", ["torch_compile=True", pytest.param("model.compile", marks=pytest.mark.slow)])
def test_a_compiled_training(llama, ids, tmp_path, how):
    """What a compiled training saves has no trace of that in its names."""
    adapted, options = fg.rewrite(llama, SPEC), {}
    if how == "model.compile":
        adapted.compile(backend="fxgraft")
    else:  # accelerate has a list of backends, and ours is not in it
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    run = trainer(adapted, tmp_path, max_steps=4, load_best_model_at_end=True, eval_strategy="steps", **options)
    run.train()
    loaded = fg.load_adapter(llama, run.state.best_model_checkpoint)
    assert not torch.equal(loaded(ids).logits, llama(ids).logits)
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)
