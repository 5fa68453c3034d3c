"""Optimizer groups: every trainable tensor once, in the group it belongs to, and the optimizer does what they say."""

import pytest
import torch
from small_models import perturb
from transformers import Trainer, TrainingArguments

import fxgraft as fg

SPEC = fg.Spec(fg.UniLoRA(2, 64), ["query", "value"], train=["classifier", "bert.encoder.layer.1.output"])


def names(model, group):
    known = {id(p): n for n, p in model.named_parameters()}
    return {known[id(p)] for p in group["params"]}


def test_every_trainable_tensor_once_and_no_frozen_one(bert):
    adapted = fg.rewrite(bert, SPEC)
    adapted.bert.pooler.dense.bias.requires_grad_(True)
    adapted.bert.pooler.dense.weight.requires_grad_(True)
    groups = fg.parameter_groups(adapted, lr=1e-4, weight_decay=0.1, vector_lr=5e-3, head_lr=1e-2)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in adapted.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in groups}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in by_name.items()} == {
        "vector": (5e-3, 0.0),
        "head": (1e-2, 0.1),
        "head_no_decay": (1e-2, 0.0),
        "base": (1e-4, 0.1),
        "base_no_decay": (1e-4, 0.0),
    }
    assert names(adapted, by_name["vector"]) == {"fxgraft_shared.default.theta"}
    assert names(adapted, by_name["base"]) == {"bert.pooler.dense.weight"}
    assert {n.rpartition(".")[2] for n in names(adapted, by_name["head"])} == {"weight"}
    assert any("LayerNorm.weight" in n for n in names(adapted, by_name["head_no_decay"]))


def test_the_vector_is_not_decayed_and_has_its_own_rate(bert, ids):
    adapted = fg.rewrite(bert, SPEC)
    vector = dict(adapted.named_parameters())["fxgraft_shared.default.theta"]
    head = adapted.classifier.fxgraft.default.weight
    before = vector.detach().clone(), head.detach().clone()
    groups = fg.parameter_groups(adapted, lr=1e-3, weight_decay=0.5, vector_lr=0.25)
    optimizer = torch.optim.SGD(groups, lr=1.0)
    for parameter in adapted.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    torch.testing.assert_close(vector, before[0] - 0.25)
    torch.testing.assert_close(head, before[1] - 1e-3 * (1 + 0.5 * before[1]))


def test_of_several_adapters_those_that_are_active(llama):
    both = fg.rewrite(
        fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"]), "a"), fg.Spec(fg.UniLoRA(2, 32), ["v_proj"]), "b"
    )
    assert [g["name"] for g in fg.parameter_groups(both, lr=1.0)] == ["vector"]
    fg.set_active(both, ["a", "b"])
    assert {g["name"]: len(g["params"]) for g in fg.parameter_groups(both)} == {"adapter": 4, "vector": 1}
    assert all("lr" not in g for g in fg.parameter_groups(both))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr=-1\): allowed are finite numbers from 0 up"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -1}, r"weight_decay=-1\): allowed are finite numbers from 0 up"),
        ({"vector_lr": 1e-2}, r"vector_lr=0.01\): it trains 'adapter' tensors only"),
        ({"head_lr": 1e-2}, r"head_lr=0.01\): it trains 'adapter' tensors only"),
    ],
)
def test_what_is_refused(llama, options, message):
    with pytest.raises(fg.AdapterError, match=message):
        fg.parameter_groups(fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"])), **options)


def test_nothing_to_train(llama):
    with pytest.raises(fg.AdapterError, match="has no adapter"):
        fg.parameter_groups(llama)
    adapted = fg.rewrite(llama, fg.Spec(fg.LoRA(2), ["q_proj"]))
    fg.set_active(adapted, [])
    with pytest.raises(fg.AdapterError, match=r"requires grad.*'default'"):
        fg.parameter_groups(adapted)


def test_with_a_trainer(bert, tmp_path):
    adapted = perturb(fg.rewrite(bert, SPEC))
    rows = [{"input_ids": torch.randint(3, 90, (6,)), "labels": torch.tensor(i % 2)} for i in range(4)]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
    groups = fg.parameter_groups(adapted, lr=1e-3, weight_decay=0.1, vector_lr=5e-2)
    run = Trainer(adapted, arguments, train_dataset=rows, optimizers=(torch.optim.AdamW(groups), None))
    run.train()
    assert [(g["name"], g["initial_lr"]) for g in run.optimizer.param_groups] == [(g["name"], g["lr"]) for g in groups]
