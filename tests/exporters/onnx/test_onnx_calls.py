"""What goes into a model and comes out, in every form Python has: a graph has tensors under the model's names."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_models as models
import pytest
import torch
from torch import nn

import fxgraft as fg
from fxgraft.exporters.onnx.export import OPSETS

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor | None
    count: int


class Talks(nn.Module):
    """A linear layer whose call and answer have the form `kind`."""

    def __init__(self, kind: str):
        super().__init__()
        self.l, self.kind = nn.Linear(8, 8), kind
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x, more=None, flag=True):
        if self.kind == "writes":
            self.steps.add_(1)
            return self.l(x) + self.steps
        if self.kind == "makes":  # anew at every run, and never another one
            self.steps = torch.full((1,), 2.0)
            return self.l(x) * self.steps
        if self.kind == "in place":
            return self.l(x.add_(1))
        y = self.l(x if self.kind != "dict in" else x["ids"] * x["scale"])
        return {
            "dataclass": lambda: Answer(y, None, x.shape[0]),
            "constants": lambda: {"y": y, "n": 3, "text": "said", "none": None},
            "same": lambda: (y, y, x),
            "names": lambda: {"x": y, "l.weight": y + 1, "l.A": y + 2, "add": y - 1},
            "dict in": lambda: {"ids": x["ids"], "y": y},
        }.get(self.kind, lambda: y)()


def exported(kind, example, folder, adapters="swappable", **options):
    """The adapted model, its export, and a session with the adapter loaded where it takes one."""
    adapted = models.graft(Talks(kind).eval(), ["l"])
    export = fg.export_onnx(adapted, folder / "m.onnx", example, adapters=adapters, **options)
    session = fg.OrtSession(folder / "m.onnx")
    if adapters == "swappable":
        session.load("a", fg.export_ort_adapter(adapted, folder / "a.onnx_adapter"))
    return adapted, export, session


def test_dataclasses_numbers_and_texts(tmp_path):
    adapted, export, session = exported("dataclass", (X,), tmp_path)
    assert list(export.outputs) == ["first"] and "'count' is the" in export.notes[0]
    assert models.difference(session.run({"x": X}, adapter="a")["first"], adapted(X).first) < models.TOLERANCE
    _, export, _ = exported("constants", (X, None, False), tmp_path, "merged")
    assert list(export.outputs) == ["y"] and list(export.inputs) == ["x"]
    assert [note.split(",")[0] for note in export.notes] == [
        "output 'n' is the int 3",
        "output 'text' is the str 'said'",
    ]


def test_a_dict_is_taken_apart_and_its_names_are_the_inputs(tmp_path):
    given = {"ids": X, "scale": torch.full((3, 1), 0.5)}
    adapted, export, session = exported("dict in", (given,), tmp_path)
    assert export.inputs == {"ids": ("batch", 8), "scale": ("batch", 1)}
    assert export.renamed == {"outputs": {"ids": "ids.output"}} and list(export.outputs) == ["ids", "y"]
    got = session.run({"ids": X[:2] + 1, "scale": given["scale"][:2]}, adapter="a")
    want = adapted({"ids": X[:2] + 1, "scale": given["scale"][:2]})
    assert list(got) == ["ids", "y"] and np.array_equal(got["ids"], X[:2] + 1)
    assert models.difference(got["y"], want["y"]) < models.TOLERANCE
    assert fg.verify(tmp_path / "m.onnx", adapted).parity
    adapted, export, session = exported("dict in", (given,), tmp_path, "bank")
    got = session.run({"ids": X, "scale": given["scale"]}, adapter_ids=["default", None, "default"])["y"]
    want = adapted({"ids": X, "scale": given["scale"]})["y"].detach()
    assert models.difference(got[[0, 2]], want[[0, 2]]) < models.TOLERANCE and abs(got[1] - want.numpy()[1]).max() > 0.1


@pytest.mark.parametrize("adapters", ["merged", "swappable", "bank"])
def test_names_that_weights_and_inputs_have_already(tmp_path, adapters):
    adapted, export, session = exported("names", (X,), tmp_path, adapters)
    assert list(export.outputs) == list(session.outputs) == ["x", "l.weight", "l.A", "add"]
    told = export.renamed["outputs"]
    assert told["x"] == "x.output" and ("l.A" in told) == (adapters != "merged") and "add" not in told
    names = [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output]
    assert names == [told.get(name, name) for name in session.outputs]
    how = {"merged": {}, "swappable": {"adapter": "a"}, "bank": {"adapter_ids": ["default"] * 3}}[adapters]
    got = session.run({"x": X}, outputs=["l.A", "x"], **how)
    for name in ("l.A", "x"):
        assert models.difference(got[name], adapted(X)[name]) < models.TOLERANCE
    assert fg.verify(tmp_path / "m.onnx", adapted).checks


def test_a_tensor_given_twice_and_an_input_given_back(tmp_path):
    adapted, _, session = exported("same", (X,), tmp_path)
    got = list(session.run({"x": X}, adapter="a").values())
    assert np.array_equal(got[0], got[1]) and np.array_equal(got[2], X)
    assert models.difference(got[0], adapted(X)[0]) < models.TOLERANCE


def test_what_a_forward_writes(tmp_path):
    adapted, before = models.graft(Talks("writes").eval(), ["l"]), X.clone()
    with pytest.raises(fg.ExportError, match="writes 'steps' at every run: a graph keeps nothing"):
        fg.export_onnx(adapted, tmp_path / "m.onnx", (X,))
    assert adapted.steps == 0 and not list(tmp_path.iterdir())
    adapted, _, session = exported("makes", (X,), tmp_path)
    assert models.difference(session.run({"x": X}, adapter="a")["output"], adapted(X)) < models.TOLERANCE
    adapted, _, session = exported("in place", (X,), tmp_path)
    assert torch.equal(X, before)
    assert models.difference(session.run({"x": X}, adapter="a")["output"], adapted(X.clone())) < models.TOLERANCE


def test_an_export_leaves_modes_alone_while_others_run_the_model(tmp_path):
    adapted = models.graft(Talks("plain"), ["l"]).train()
    fg.export_onnx(adapted, tmp_path / "m.onnx", (X,))
    assert all(module.training for module in adapted.modules())


@pytest.mark.parametrize("opset", [17, 26, True, "20"])
def test_an_opset_that_cannot_be_written(tmp_path, opset):
    adapted = models.graft(Talks("plain").eval(), ["l"])
    with pytest.raises(fg.ExportError, match=r"opset=.* 18 to 25"):
        fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), opset=opset)


def test_the_opset_is_the_one_asked_for(tmp_path):
    for opset in OPSETS:
        adapted, export, session = exported("plain", (X,), tmp_path, opset=opset)
        (stored,) = [one.version for one in onnx.load(tmp_path / "m.onnx").opset_import if one.domain == ""]
        assert export.opset == stored == opset
        assert models.difference(session.run({"x": X}, adapter="a")["output"], adapted(X)) < models.TOLERANCE


def test_exports_of_several_threads(tmp_path):
    made = [models.graft(Talks("plain").eval(), ["l"], seed=seed) for seed in range(3)]
    failed: list[Exception] = []

    def export(number: int) -> None:
        try:
            fg.export_onnx(made[number], tmp_path / f"{number}.onnx", (X,))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=export, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number, adapted in enumerate(made):
        got = fg.OrtSession(tmp_path / f"{number}.onnx").run({"x": X})["output"]
        assert models.difference(got, adapted(X)) < models.TOLERANCE


def test_arguments_of_transformers_models(tmp_path):
    adapted = models.graft(models.bert(), ["query"])
    example = {**models.tokens(2, 6), "labels": None, "return_dict": True, "output_hidden_states": True}
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", example)
    assert list(export.outputs) == ["logits", "hidden_states.0", "hidden_states.1"]
    got = fg.OrtSession(tmp_path / "m.onnx").run(models.tokens(3, 5))["hidden_states.1"]
    want = adapted(**models.tokens(3, 5), output_hidden_states=True).hidden_states[1]
    assert models.difference(got, want) < models.TOLERANCE


def test_a_head_tied_to_the_embedding_stands_once(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=2000, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    adapted = models.graft(LlamaForCausalLM(config).eval(), ["q_proj"])
    table = 2000 * 32 * 4
    size = sum(parameter.nbytes for parameter in adapted.parameters())  # the shared one counts once
    for mode in ("merged", "swappable", "bank"):
        export = fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(2, 6), adapters=mode, cache=mode == "bank")
        assert export.bytes < size + 0.8 * table
        large = [one.name for one in onnx.load(tmp_path / "m.onnx").graph.initializer if np.prod(one.dims) == 2000 * 32]
        assert len(large) == 1
    session = fg.OrtSession(tmp_path / "m.onnx")
    ids = models.tokens(2, 6)["input_ids"]
    got = session.generate(ids, max_new_tokens=3, adapter_ids=["default", None])
    assert np.array_equal(got[0], adapted.generate(ids[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)[0])


def test_a_layer_called_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.kernel = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            # A parameter of three dimensions is transposed, which is no weight's `.T`.
            return self.l(self.l(x).relu()) + x @ self.kernel.transpose(1, 2)[0]

    adapted = models.stir(fg.rewrite(Twice().eval(), fg.Spec(fg.HydraLoRA(rank=2, experts=2), targets=["l"])))
    for mode in ("swappable", "bank"):
        fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters=mode, external_data=True)
        session = fg.OrtSession(tmp_path / "m.onnx")
        if mode == "swappable":
            session.load("a", fg.export_ort_adapter(adapted, tmp_path / "a.onnx_adapter"))
        how = {"adapter": "a"} if mode == "swappable" else {"adapter_ids": ["default"] * 3}
        assert models.difference(session.run({"x": X}, **how)["output"], adapted(X)) < models.TOLERANCE


def test_integers_that_cannot_be_drawn(tmp_path):
    class Counts(nn.Module):
        """As many sevens as there are rows of pixels, as LLaVA has image tokens."""

        def __init__(self):
            super().__init__()
            self.table, self.l = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, ids, pixels):
            mask = ids == 7
            if not torch.compiler.is_compiling() and int(mask.sum()) != pixels.shape[0]:
                raise ValueError("sevens and pixels do not match")
            return self.l(self.table(ids).masked_scatter(mask[..., None], pixels))

    adapted = models.graft(Counts().eval(), ["l"])
    example = {"ids": torch.tensor([[1, 7, 7, 2], [3, 7, 4, 7]]), "pixels": torch.randn(4, 8)}
    export = fg.export_onnx(adapted, tmp_path / "m.onnx", example)
    assert "takes no random integers" in export.notes[-1] and len(export.parity) == 2
    got = fg.OrtSession(tmp_path / "m.onnx", verify=True).run(example)["output"]
    assert models.difference(got, adapted(**example)) < models.TOLERANCE


def test_weights_of_active_adapters(tmp_path):
    both = models.graft(Talks("plain").eval(), ["l"], name="a", seed=1)
    both = models.graft(both, ["l"], name="b", rank=2, seed=2)
    fg.set_active(both, {"a": 0.7, "b": -0.2})
    fg.export_onnx(both, tmp_path / "m.onnx", (X,))
    want = both(X)
    assert models.difference(fg.OrtSession(tmp_path / "m.onnx").run({"x": X})["output"], want) < models.TOLERANCE
    # In a swappable graph the same sum is a run's: its adapters are written as they are, whatever is active.
    fg.export_onnx(both, tmp_path / "m.onnx", (X,), adapters="swappable", name="a")
    session = fg.OrtSession(tmp_path / "m.onnx")
    for name in ("a", "b"):
        session.load(name, fg.export_ort_adapter(both, tmp_path / f"{name}.onnx_adapter", name=name))
    got = session.run({"x": X}, adapter={"a": 0.7, "b": -0.2})["output"]
    assert models.difference(got, want) < models.TOLERANCE
    fg.set_active(both, {"a": 0.7})
    with pytest.raises(fg.ExportError, match=r"'a' is active with a weight of 0\.7"):
        fg.export_onnx(both, tmp_path / "m.onnx", (X,), adapters="swappable")


def test_a_branch_of_the_graph_in_its_first_forward(tmp_path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x):
            y = self.l(x)
            return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))

    adapted = models.graft(Branches().eval(), ["l"])
    fg.export_onnx(adapted, tmp_path / "m.onnx", (X,), dynamic_shapes={})
    session = fg.OrtSession(tmp_path / "m.onnx")
    for x in (X, -X):
        assert models.difference(session.run({"x": x})["output"], adapted(x)) < models.TOLERANCE
