"""fg.verify: what export_onnx checked, repeated from the file, and every damage it must see."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.backends.artifact.random_inputs import describe_inputs, draw
from fxgraft.backends.artifact.signature import automatic_axes, bind
from fxgraft.exporters.adapterfiles import graph_manifest as manifest
from fxgraft.exporters.onnx.checks import record, seal

X = torch.linspace(-1, 1, 24).reshape(4, 6)
HYDRA = fg.HydraLoRA(rank=2, experts=3)
GLORA = fg.GLoRA(rank=2, path=fg.GLoRAPath("lora", "vector", "lora", "constant", "vector"))


def graft(base, method, train=("head",), seed=1):
    return models.stir(fg.rewrite(base, fg.Spec(method, targets=["up", "down"], train=list(train))), seed)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A classifier in every mode: {label: (file, model)}."""
    folder = tmp_path_factory.mktemp("verify")
    base = models.classifier()
    lora = graft(base, fg.LoRA(rank=2))
    made = {
        "merged": (lora, {}),
        "swappable": (lora, {"adapters": "swappable"}),
        "hydralora": (graft(base, HYDRA), {"adapters": "swappable"}),
        "glora": (graft(base, GLORA), {"adapters": "swappable"}),
        "own": (graft(base, fg.UniLoRA(rank=2, vector_length=30)), {"adapters": "swappable", "expanded": False}),
        "bank": (lora, {"adapters": "bank", "capacity": 4}),
        "external": (lora, {"external_data": True}),
        "base": (base, {}),
    }
    for label, (model, options) in made.items():
        fg.export_onnx(model, folder / f"{label}.onnx", (X,), **options)
    return folder, {label: (folder / f"{label}.onnx", model) for label, (model, _) in made.items()}


@pytest.fixture
def copied(written, tmp_path):
    """Any of the graphs where it may be damaged."""
    folder, _ = written

    def copy(label: str):
        for file in folder.iterdir():
            if file.name == f"{label}.onnx" or (label == "external" and file.suffix == ".weights"):
                (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path / f"{label}.onnx"

    return copy


@pytest.mark.parametrize("label", ["merged", "swappable", "hydralora", "glora", "own", "bank", "external", "base"])
def test_every_mode_is_verified(written, label):
    _, graphs = written
    file, model = graphs[label]
    before = file.read_bytes()
    alone = fg.verify(file)
    assert alone.checks[:2] == ("every byte is as exported", "onnx.checker accepts it") and not alone.parity
    assert alone.checks[2].startswith("gives what it gave at the export (")
    assert (label in ("swappable", "hydralora")) == any("zeros is no adapter" in check for check in alone.checks)
    assert (label == "bank") == any("mixed batch" in check for check in alone.checks)
    told = alone.manifest
    assert told["adapters"] == {"hydralora": "swappable", "glora": "swappable", "own": "swappable"}.get(
        label, "merged" if label in ("external", "base") else label
    )
    assert told["tolerance"] == 5e-5 and set(told["versions"]) >= {"torch", "onnx", "onnxruntime"}
    assert all(check.relative < models.TOLERANCE for check in alone.exported) and len(alone.exported) >= 3
    with_torch = fg.verify(file, model, seed=7)
    assert with_torch.parity and all(check.relative < models.TOLERANCE for check in with_torch.parity)
    assert {check.sizes for check in with_torch.parity} == {"x 7x6", "x 1x6"}  # the export had 4, 1 and 5
    assert "agrees with torch on unseen inputs (seed 7)" in str(with_torch)
    assert file.read_bytes() == before


def test_a_sequence_model(tmp_path):
    adapted = models.graft(models.bert(), ["query"], train=("classifier",))
    fg.export_onnx(adapted, tmp_path / "m.onnx", models.tokens(3, 7), adapters="swappable")
    again = fg.verify(tmp_path / "m.onnx", adapted)
    assert {check.sizes for check in again.parity} >= {"input_ids 6x5, attention_mask 6x5"}
    spec = fg.Spec.from_dict(again.manifest["specs"]["default"])
    assert spec.method == fg.LoRA(rank=4, alpha=8)


def test_the_record_holds_no_input(written):
    folder, _ = written
    content = (folder / "merged.onnx").read_bytes()
    assert X.numpy().tobytes() not in content
    values = json.loads({p.key: p.value for p in onnx.load(folder / "merged.onnx").metadata_props}[record.RECORD])
    assert values["inputs"]["x"]["kind"] == "normal" and "values" not in values["inputs"]["x"]


@pytest.mark.parametrize("place", [0, 40, -2000, -300, -5])
def test_one_changed_byte_is_seen(copied, place):
    file = copied("merged")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(fg.VerifyError, match=r"merged\.onnx"):
        fg.verify(file)


def test_damaged_and_foreign_files(copied, tmp_path):
    file = copied("merged")
    content = file.read_bytes()
    for changed, said in (
        (content[:-10], "cut short|no seal|damaged"),
        (content[: len(content) // 2], "damaged or cut short|no seal"),
        (b"", "no seal|no graph"),
        (b"not an onnx file at all", "no ONNX file"),
        (content + b"\\x00", "no ONNX file|not what was exported|damaged"),
    ):
        file.write_bytes(changed)
        with pytest.raises(fg.VerifyError, match=said):
            fg.verify(file)
    with pytest.raises(fg.VerifyError, match="there is no graph"):
        fg.verify(tmp_path / "nothing.onnx")
    # A graph another tool read and wrote again, though nothing in it changed.
    file.write_bytes(content)
    onnx.save(onnx.load(file), file)
    onnx.helper.set_model_props(model := onnx.load(file), {"producer": "somebody"})
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(fg.VerifyError, match="has no seal"):
        fg.verify(tmp_path / "foreign.onnx")


def test_external_weights(copied, tmp_path):
    file = copied("external")
    fg.verify(file)
    data = next(tmp_path.glob("*.weights"))
    content = bytearray(data.read_bytes())
    content[3] ^= 1
    data.write_bytes(content)
    with pytest.raises(fg.VerifyError, match=r"'\w+\.weights' beside .* does not hold the weights"):
        fg.verify(file)
    data.unlink()
    with pytest.raises(fg.VerifyError, match=r"has its weights in '\w+\.weights' beside it, which is not there"):
        fg.verify(file)


def reseal(file, change):
    """The graph changed and sealed as if it had been exported so."""
    model = onnx.load(file)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    change(model, entries)
    entries.pop(seal.SEAL)
    onnx.helper.set_model_props(model, {})
    onnx.save(model, file)
    seal.seal(file, entries)


def test_other_numbers_than_at_the_export(copied):
    file = copied("merged")

    def scale(model, _):
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("up.weight"))
        changed = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))

    reseal(file, scale)
    with pytest.raises(fg.VerifyError, match=r"no longer gives what it gave at the export.*output '(scores|hidden)'"):
        fg.verify(file)


def test_an_adapter_input_the_graph_does_not_use(copied):
    file = copied("swappable")

    def cut(model, _):
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if node.op_type == "Add" and "xA" not in name and node.name.startswith(("up/", "down/")):
                    producer = next((n for n in model.graph.node if name in n.output), None)
                    if producer is not None and producer.name.endswith("/B"):
                        node.input[index] = node.input[1 - index]
                        node.op_type = "Max"  # of one value twice: the base's

    reseal(file, cut)
    with pytest.raises(fg.VerifyError, match="a random adapter changes no output"):
        fg.verify(file)


def test_another_model_than_the_exported_one(written, copied):
    _, graphs = written
    file, model = graphs["swappable"]
    other = graft(models.classifier(seed=3), fg.LoRA(rank=2))
    with pytest.raises(fg.VerifyError, match="other base weights or sites"):
        fg.verify(file, other)
    with pytest.raises(fg.VerifyError, match="the graph is not the model's: output"):
        fg.verify(graphs["merged"][0], other)
    with pytest.raises(fg.VerifyError, match="give the adapted model"):
        fg.verify(file, "model")
    with pytest.raises(fg.VerifyError, match="has the tenants"):
        fg.verify(graphs["bank"][0], fg.bank(models.classifier(), {"other": model}))


def test_a_newer_format(copied):
    file = copied("merged")

    def newer(_, entries):
        entries[manifest.KEY] = json.dumps({**json.loads(entries[manifest.KEY]), "format": 99})

    reseal(file, newer)
    with pytest.raises(fg.VerifyError, match="written in another format"):
        fg.verify(file)


def test_draws_are_the_same_from_their_description():
    class Model(torch.nn.Module):
        def forward(self, x, input_ids, mask):
            return x

    given = (torch.randn(3, 4), torch.randint(0, 5000, (3, 9)), torch.ones(3, 9, dtype=torch.bool))
    example = bind(Model(), given)
    described = json.loads(json.dumps(describe_inputs(example)))
    axes = automatic_axes(example)
    made = draw(described, axes, {"batch": 50, "sequence": 6}, seed=3)
    again = draw(describe_inputs(example), axes, {"batch": 50, "sequence": 6}, seed=3)
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {
        "x": ((50, 4), torch.float32), "input_ids": ((50, 6), torch.int64), "mask": ((50, 6), torch.bool),
    }  # fmt: skip
    other = draw(described, axes, {"batch": 50, "sequence": 6}, seed=4)
    assert not torch.equal(made["x"], other["x"])
    assert set(made["input_ids"].flatten().tolist()) <= set(given[1].flatten().tolist())
