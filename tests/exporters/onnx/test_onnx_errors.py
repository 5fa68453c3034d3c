"""What export_onnx refuses, what it says, and that it leaves the folder as it was."""

from __future__ import annotations

import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.backends.artifact import staging
from fxgraft.backends.artifact.random_inputs import fresh
from fxgraft.backends.artifact.signature import (
    automatic_axes,
    bind,
    check_sizes,
    given_axes,
    named_tensors,
    other_sizes,
)
from fxgraft.exporters.onnx.export import export_onnx
from fxgraft.exporters.onnx.graph import save_graph
from fxgraft.exporters.ort.session import export_ort_adapter
from fxgraft.rewriter.errors import ExportError, ParityError

X = torch.linspace(-1, 1, 24).reshape(4, 6)


@pytest.fixture
def adapted():
    return models.graft(models.classifier(), ["up", "down"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_example_batch_of_one_is_refused_before_anything_is_written(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)  # would fail in another way if it got that far
    with pytest.raises(ExportError, match=r"'x' has size 1 in dynamic axis 0 \('batch'\).*at least 2"):
        export_onnx(adapted, tmp_path / "m.onnx", (X[:1],))
    with pytest.raises(ExportError, match=r"size 1 in dynamic axis 0 \('rows'\)"):
        export_onnx(adapted, tmp_path / "m.onnx", (X[:1],), dynamic_shapes={"x": {0: "rows"}})
    assert names(tmp_path) == []


def test_a_read_only_folder(adapted, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    closed = models.unwritable(folder)
    try:
        with pytest.raises(ExportError, match=r"cannot write '.*m\.onnx'.*not writable"):
            export_onnx(adapted, closed / "m.onnx", (X,))
        with pytest.raises(ExportError, match=r"cannot write '.*a\.onnx_adapter'.*not writable"):
            export_ort_adapter(adapted, closed / "a.onnx_adapter")
    finally:
        folder.chmod(0o700)
    assert names(folder) == []


def test_a_path_that_is_no_file_to_write(adapted, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match=r"does not end in '\.onnx'"):
        export_onnx(adapted, tmp_path / "model.bin", (X,))
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(adapted, tmp_path / "folder.onnx", (X,))
    with pytest.raises(ExportError, match="does not exist"):
        export_onnx(adapted, tmp_path / "nowhere" / "m.onnx", (X,))
    with pytest.raises(ExportError, match=r"does not end in '\.onnx_adapter'"):
        export_ort_adapter(adapted, tmp_path / "a.onnx")
    assert names(tmp_path) == ["folder.onnx"]


def test_a_failed_parity_leaves_the_previous_file(adapted, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    export_onnx(adapted, path, (X,))
    before = path.read_bytes()
    save = save_graph.save

    def corrupt(model, file, *options):
        value = model.graph.initializers["head.weight"]
        import onnx_ir

        value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.001, name=value.name)
        return save(model, file, *options)

    monkeypatch.setattr(save_graph, "save", corrupt)
    with pytest.raises(ParityError, match=r"output 'scores' \(example, merged; x 4x6\) differs from torch by"):
        export_onnx(adapted, path, (X,))
    assert names(tmp_path) == ["m.onnx"] and path.read_bytes() == before
    # The gate is the tolerance, nothing else.
    assert export_onnx(adapted, path, (X,), tolerance=0.01).parity[0].relative > 1e-4


def test_a_full_disk_leaves_the_previous_files(adapted, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"the previous file")

    moved = []
    replace = staging.os.replace

    def full(source, target):
        if str(target).endswith("m.onnx"):
            raise OSError(28, "No space left on device")
        moved.append(str(target))
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", full)
    with pytest.raises(ExportError, match=r"cannot write .*No space left"):
        export_onnx(adapted, path, (X,), external_data=True)
    assert moved and moved[-1].endswith(".weights")  # the data had been moved, and was taken away again
    assert names(tmp_path) == ["m.onnx"] and path.read_bytes() == b"the previous file"


def test_modes_and_models(adapted, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="'unmerged' is not one of 'merged', 'swappable', 'bank'"):
        export_onnx(adapted, path, (X,), adapters="unmerged")
    with pytest.raises(fg.AdapterError, match="has no adapter"):
        export_onnx(models.classifier(), path, (X,), adapters="swappable")
    with pytest.raises(ExportError, match="give the adapted model"):
        export_onnx("model", path, (X,))
    with pytest.raises(ExportError, match="capacity= and rank= are for a bank"):
        export_onnx(adapted, path, (X,), adapters="swappable", rank=8)
    with pytest.raises(fg.AdapterError, match="'other'"):
        export_onnx(adapted, path, (X,), adapters="swappable", name="other")
    assert names(tmp_path) == []


def test_not_a_number_in_an_adapter(adapted, tmp_path):
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "fxgraft" in n)[0, 0] = float("nan")
    with pytest.raises(fg.FxgraftError, match="NaN or infinite"):
        export_onnx(adapted, tmp_path / "m.onnx", (X,))
    with pytest.raises(ExportError, match=r"NaN in torch"):
        export_onnx(adapted, tmp_path / "m.onnx", (X,), adapters="swappable")
    with pytest.raises(ExportError, match="not finite"):
        export_ort_adapter(adapted, tmp_path / "a.onnx_adapter")
    assert names(tmp_path) == []


def test_example_inputs_that_do_not_fit(adapted, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="tuple of positional arguments, as in"):
        export_onnx(adapted, path, X)
    with pytest.raises(ExportError, match=r"do not fit Classifier\.forward.*unexpected keyword argument 'y'"):
        export_onnx(adapted, path, {"x": X, "y": X})
    with pytest.raises(ExportError, match="'x' is a ndarray"):
        export_onnx(adapted, path, {"x": X.numpy()})
    with pytest.raises(ExportError, match="hold no tensor"):
        export_onnx(adapted, path, {"x": 3})
    with pytest.raises(ExportError, match="does not run on example_inputs: RuntimeError"):
        export_onnx(adapted, path, (torch.randn(4, 7),))
    assert names(tmp_path) == []


def test_dynamic_shapes_that_do_not_fit(adapted, tmp_path):
    path = tmp_path / "m.onnx"
    for shapes, said in (
        ({"z": {0: "batch"}}, "names 'z'; the inputs are 'x'"),
        ({"x": {2: "batch"}}, "axis 2, but the input has 2 dimensions"),
        ({"x": {0: 1.5}}, "give a name such as 'batch'"),
        ("batch", "dynamic_shapes is a dict"),
        (({0: "a"}, {0: "b"}), "2 entries for 1 inputs"),
    ):
        with pytest.raises(ExportError, match=said):
            export_onnx(adapted, path, (X,), dynamic_shapes=shapes)
    with pytest.raises(ExportError, match=r"torch\.export cannot trace"):
        export_onnx(adapted, path, (X,), dynamic_shapes={"x": {1: "features"}})
    assert names(tmp_path) == []


def test_a_model_that_fixes_its_batch(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.up(x) + torch.ones(4, 5)

    adapted = models.graft(Fixed().eval(), ["up"])
    with pytest.raises(ExportError, match=r"(?s)cannot trace the model.*x'\].*specialized it to be a constant \(4\)"):
        export_onnx(adapted, tmp_path / "m.onnx", (X,), dynamic_shapes={"x": {0: "rows"}})
    # Nobody asked for this axis: the graph has the model's one size, and says so.
    with pytest.warns(UserWarning, match=r"fixes axis 0 \('batch'\) of input 'x' to 4"):
        export = export_onnx(adapted, tmp_path / "m.onnx", (X,))
    assert export.inputs == {"x": (4, 6)} and not export.dynamic_axes and "to 4" in export.notes[0]
    with pytest.raises(fg.SessionError, match=r"size 3 in axis 0"):
        fg.OrtSession(tmp_path / "m.onnx").run({"x": X[:3]})


def test_outputs_onnx_has_no_form_for(tmp_path):
    adapted = models.graft(models.llama(), ["q_proj"])
    with pytest.raises(ExportError, match="past_key_values is a DynamicCache"):
        export_onnx(adapted, tmp_path / "m.onnx", {**models.tokens(2, 5), "use_cache": True})
    assert names(tmp_path) == []


# -- the parts that need no export ---------------------------------------------------------------------------------
def test_automatic_axes_and_sizes():
    class Many(torch.nn.Module):
        def forward(self, input_ids, attention_mask, decoder_input_ids, pixels, labels, position):
            return input_ids

    ids = torch.arange(12).reshape(2, 6)
    given = (ids, torch.ones(2, 6), ids, torch.zeros(2, 3, 4, 4), ids[:, :1], torch.arange(6))
    example = bind(Many(), given)
    axes = automatic_axes(example)
    assert axes == {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
        "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
        "pixels": {0: "batch"},
        "labels": {0: "batch"},
        "position": {0: "sequence"},
    }
    check_sizes(example, axes)
    single, bigger = other_sizes(example, axes)
    assert single == {"batch": 1, "sequence": 5, "decoder_sequence": 5}
    assert bigger == {"batch": 3, "sequence": 4, "decoder_sequence": 4}
    made = fresh(example, axes, single, seed=0)
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "input_ids": (1, 5), "attention_mask": (1, 5), "decoder_input_ids": (1, 5),
        "pixels": (1, 3, 4, 4), "labels": (1, 1), "position": (5,),
    }  # fmt: skip
    assert torch.equal(made["position"], torch.arange(5)) and set(made["input_ids"].flatten().tolist()) <= set(
        range(12)
    )


def test_fresh_masks_keep_a_token_in_every_row_at_their_side():
    class Model(torch.nn.Module):
        def forward(self, attention_mask):
            return attention_mask

    for left in (False, True):
        mask = torch.ones(3, 8, dtype=torch.long)
        mask[1, slice(0, 3) if left else slice(5, 8)] = 0
        example = bind(Model(), (mask,))
        made = fresh(example, automatic_axes(example), {"batch": 50, "sequence": 6}, seed=1)["attention_mask"]
        assert made.shape == (50, 6) and made.dtype == torch.long
        assert bool((made[:, -1 if left else 0] == 1).all()) and not bool((made == 1).all())
        steps = made.diff(dim=1)
        assert bool((steps >= 0).all() if left else (steps <= 0).all())


def test_given_axes_keep_bounds_and_names():
    class Model(torch.nn.Module):
        def forward(self, x, flag=True):
            return x

    bounded = torch.export.Dim("rows", max=9)
    axes, dims = given_axes(bind(Model(), (X, False)), {"x": {-2: bounded, 1: "columns"}})
    assert axes == {"x": {0: "rows", 1: "columns"}}
    assert dims["x"][0] is bounded and dims["x"][1] == torch.export.Dim.DYNAMIC
    assert given_axes(bind(Model(), (X,)), {"x": None}) == ({}, {})


def test_output_names():
    one, two = torch.zeros(1), torch.ones(1)
    assert list(named_tensors(one)) == ["output"]
    assert list(named_tensors((one, (two, one)))) == ["output_0", "output_1.0", "output_1.1"]
    assert list(named_tensors({"logits": one, "loss": None, "states": [one, two]})) == [
        "logits",
        "states.0",
        "states.1",
    ]
    with pytest.raises(ExportError, match="output cache is a object"):
        named_tensors({"cache": object()})
