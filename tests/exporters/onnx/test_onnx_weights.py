"""Weights beside the graph: one file per base model, called after its content, written without a second copy."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import onnx
import onnx_models as models
import pytest
import torch

import fxgraft as fg
from fxgraft.exporters.onnx.graph import graph_rewrites


def weights(export: fg.OnnxExport) -> set[str]:
    return {name for name in export.files if name.endswith(".weights")}


def written(base, targets, train, folder, example):
    """The base and its three forms in one folder, all with their weights outside."""
    one = models.graft(base, targets, train=train)
    two = models.graft(models.graft(base, targets, name="x", seed=3, train=train), targets, name="y", train=train)
    forms = {
        "base": (base, "merged"),
        "merged": (one, "merged"),
        "swappable": (one, "swappable"),
        "bank": (two, "bank"),
    }
    return {
        name: fg.export_onnx(model, folder / f"{name}.onnx", example, adapters=mode, external_data=True)
        for name, (model, mode) in forms.items()
    }


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_all_forms_of_a_base_share_its_weights(tmp_path, kind):
    base = models.bert() if kind == "bert" else models.llama()
    targets, train = (["query", "value"], ("classifier",)) if kind == "bert" else (["q_proj", "v_proj"], ())
    made = written(base, targets, train, tmp_path, models.tokens(3, 7))
    (shared,) = weights(made["base"])
    assert all(shared in weights(export) for export in made.values())
    assert len(weights(made["merged"])) == len(weights(made["bank"])) == 2 and weights(made["swappable"]) == {shared}
    assert sum(name.endswith(".weights") for name in os.listdir(tmp_path)) == 3
    # The second file has the merged sites and nothing else.
    (changed,) = weights(made["merged"]) - {shared}
    stored = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(tmp_path / "merged.onnx", load_external_data=False).graph.initializer
    }
    inside = {name for name, place in stored.items() if place.get("location") == changed}
    ends = tuple(f"{path}.weight" for path in [*targets, *train])
    assert inside and all(name.removesuffix(".T").endswith(ends) for name in inside)
    assert all(int(place["offset"]) % 4096 == 0 for place in stored.values() if place)
    for name in {shared, changed}:
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == name.removesuffix(".weights")
        assert os.stat(tmp_path / name).st_nlink == 1
    for name in made:
        assert fg.verify(tmp_path / f"{name}.onnx").checks


def test_a_file_that_is_there_is_not_written_again(tmp_path):
    base, example = models.llama(), models.tokens(3, 7)
    first = fg.export_onnx(base, tmp_path / "a.onnx", example, external_data=True)
    (name,) = weights(first)
    before = os.stat(tmp_path / name)
    second = fg.export_onnx(base, tmp_path / "b.onnx", example, external_data=True)
    after = os.stat(tmp_path / name)
    assert weights(second) == {name} and (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # One that was damaged is, so that its name tells its content.
    content = bytearray((tmp_path / name).read_bytes())
    content[100] ^= 1
    (tmp_path / name).write_bytes(content)
    fg.export_onnx(base, tmp_path / "c.onnx", example, external_data=True)
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == name.removesuffix(".weights")


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    base, example = models.llama(), models.tokens(3, 7)
    fg.export_onnx(base, tmp_path / "a.onnx", example, external_data=True)

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    fg.export_onnx(base, tmp_path / "b.onnx", example, external_data=True)
    for name in ("a", "b"):
        assert fg.verify(tmp_path / f"{name}.onnx", base).parity


def test_a_transposed_weight_is_no_copy():
    """What the graph has as `w.T` reads the memory of the model's own weight."""
    base = models.classifier()
    program = torch.onnx.export(base, (torch.randn(2, 3, 6),), dynamo=True, optimize=False, verbose=False)
    graph_rewrites.name_transposes(program.model)
    turned = {name: value for name, value in program.model.graph.initializers.items() if name.endswith(".T")}
    assert set(turned) == {"up.weight.T", "down.weight.T", "head.weight.T"}
    state = base.state_dict()
    for name, value in turned.items():
        assert value.const_value.raw.data_ptr() == state[name.removesuffix(".T")].data_ptr()
        assert tuple(value.const_value.shape) == tuple(state[name.removesuffix(".T")].t().shape)
    assert not [node for node in program.model.graph if node.op_type == "Transpose"]


_LARGE = """
    import resource, sys, torch
    import fxgraft as fg
    from transformers import LlamaConfig, LlamaForCausalLM

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    folder, hidden, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=4, max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=8), targets=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.eval()
    ids = torch.randint(0, 32000, (2, 8))
    before = peak()
    made = {
        mode: fg.export_onnx(adapted, f"{folder}/{mode}.onnx", {"input_ids": ids}, adapters=mode, cache=True)
        for mode in ("swappable", "merged")
    }
    print("bytes", size, "model", before, "peak", peak(), "seconds", *(round(e.seconds) for e in made.values()))
    for export in made.values():
        print(export)
"""


@pytest.mark.slow
def test_a_model_of_three_gigabytes(tmp_path):
    gc.collect()
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LARGE), str(tmp_path), "2048", "14"],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    said = next(line for line in run.stdout.splitlines() if line.startswith("bytes")).split()
    size, before, peak = (int(said[i]) for i in (1, 3, 5))
    assert size > 2.9e9
    files = {path.name: path.stat().st_size for path in Path(tmp_path).iterdir()}
    big = [name for name, length in files.items() if length >= 2e9]
    assert len(big) == 1 and size <= files[big[0]] < 1.01 * size
    assert sum(files.values()) < 1.2 * size  # two graphs, one base, and the merged sites
    assert all(length < 5e6 for name, length in files.items() if name.endswith(".onnx"))
    # onnxruntime has the weights once for the check; the export itself makes no copy of them
    assert peak - before < 1.35 * size, (size, before, peak)
    session = fg.OrtSession(tmp_path / "swappable.onnx", threads=1)
    assert session.generate([[1, 2, 3]], max_new_tokens=2).shape == (1, 5)
