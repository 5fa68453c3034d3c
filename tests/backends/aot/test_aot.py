"""Packages: the model without its Python, adapters swapped with every check, damage found before code runs.

A package takes AOTInductor 10 to 40 s, so a few are made once and shared; nothing writes to them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, estimate
from onnx_models import bert, stir, tokens
from torch import nn

import fxgraft as fg
from fxgraft.backends.aot import package as aot
from fxgraft.backends.aot import package_manifest as aot_manifest
from fxgraft.passes.graph import pipelines
from fxgraft.rewriter.errors import ExportError, ParityError
from fxgraft.rewriter.program import Pass, PassResult, Pipeline

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class Plain(nn.Module):
    """No adapter; a tuple, a list and None come out."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 11)

    def forward(self, x: torch.Tensor, scale: float = 1.0, shift: torch.Tensor | None = None) -> tuple[Any, ...]:
        hidden = torch.relu(self.up(x)) * scale
        return hidden, None, [hidden.sum(-1), x + 1]


class Many(nn.Module):
    """A linear for every method, in a row."""

    NAMES = (*METHODS, "unilora too")  # which shares the vector

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(12, 12, bias=name != "prolora") for name in self.NAMES})
        self.head = nn.Linear(12, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers.values():
            x = self.dropout(F.gelu(layer(x)))
        return {"scores": self.head(x)}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The block leaves every tensor, flag and mode of a model as it was."""

    def look() -> list[Any]:
        modes = [module.training for module in model.modules()]
        return [modes, [p.requires_grad for p in model.parameters()], fg.active(model)]

    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = look()
    yield
    assert look() == before
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="session")
def two(folder) -> tuple[Path, nn.Module]:
    """BERT with two active adapters, fresh: B and the head's bias are zeros, which a compiler likes to fold away."""
    model = bert()
    nn.init.zeros_(model.classifier.bias)
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(rank=4), ["query", "value"], train=["classifier"]))
    adapted = fg.rewrite(adapted, fg.Spec(fg.UniLoRA(rank=2, vector_length=60, init_bound=0.5), ["dense"]), name="b")
    fg.set_active(adapted, ["default", "b"])
    adapted.train()
    with unchanged(adapted):
        fg.package(adapted, folder / "two.pt2", tokens(3, 8))
    assert sorted(file.name for file in folder.iterdir() if file.name.startswith((".", "two"))) == ["two.pt2"]
    return folder / "two.pt2", adapted.eval()


@pytest.fixture(scope="session")
def many(folder) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = Many()
    layers = {f"*.{name}*" if name == "unilora" else f"*.{name}": method for name, method in METHODS.items()}
    spec = fg.Spec(METHODS["lora"], ["re:layers\\..*"], train=["head"], overrides=layers)
    update = estimate(model, fg.Spec(METHODS["lora_sb"], ["lora_sb"]))
    adapted = stir(fg.rewrite(model, spec, update=update))
    fg.set_paths(adapted, {"layers.supernet": fg.GLoRAPath(A="vector", B="none", C="lora", D="none", E="constant")})
    fg.package(adapted, folder / "many.pt2", (torch.randn(3, 12),))
    return folder / "many.pt2", adapted


@pytest.fixture(scope="session")
def plain(folder) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = Plain()
    batch = torch.export.Dim("batch", min=2, max=6)
    fg.package(model, folder / "plain.pt2", (torch.randn(4, 6), 0.5), dynamic_shapes={"x": {0: batch}})
    return folder / "plain.pt2", model


def run(model: nn.Module, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs)


# -- calls ---------------------------------------------------------------------------------------------------------
def test_calls_like_the_model_at_any_size(two):
    path, adapted = two
    package = fg.load_package(path)
    for sizes in ((3, 8), (1, 5), (5, 32), (2, 1)):
        inputs = tokens(*sizes)
        want = run(adapted, **inputs).logits
        out = package(**inputs)
        torch.testing.assert_close(out.logits, want, **CLOSE)
        assert out["logits"] is out.logits is out[0] and list(out) == ["logits"] and out.to_tuple()[0] is out[0]
        assert torch.equal(package(*inputs.values(), None).logits, out.logits)
    strided = torch.stack([inputs["input_ids"]] * 2, dim=-1)[..., 0]
    assert torch.equal(package(strided, inputs["attention_mask"]).logits, out.logits)


def test_torch_itself_loads_it(two):
    path, adapted = two
    inputs = tokens(2, 6)
    out = torch._inductor.aoti_load_package(str(path))(**inputs)
    assert type(out) is dict
    torch.testing.assert_close(out["logits"], run(adapted, **inputs).logits, **CLOSE)


def test_a_package_of_real_sizes_runs_where_fxgraft_is_not(tmp_path):
    """At these sizes `fg.compile` takes an operator of ours, which a process without fxgraft does not have."""
    torch.manual_seed(0)
    adapted = stir(fg.rewrite(nn.Sequential(nn.Linear(768, 3072)), fg.Spec(fg.LoRA(rank=4), ["0"])))
    x = torch.randn(64, 768)
    compiled = pipelines.inference(fg.capture(adapted, (x,))).program
    assert any("onto" in node.name for node in compiled.graph.nodes)
    path = tmp_path / "m.pt2"
    fg.package(adapted, path, (x,))
    torch.save(x, tmp_path / "x.pt")
    code = f"""
        import sys, torch
        out = torch._inductor.aoti_load_package({str(path)!r})(input=torch.load({str(tmp_path / "x.pt")!r}))
        assert not any(name.startswith("fxgraft") for name in sys.modules)
        torch.save(dict(out), {str(tmp_path / "y.pt")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt")["output"], run(adapted, input=x), **CLOSE)


def test_runs_without_the_models_python_and_without_a_compiler(two, tmp_path):
    path, adapted = two
    inputs = tokens(4, 7)
    state = {key: tensor + 0.1 for key, tensor in fg.adapter_state(adapted).items()}
    torch.save((inputs, state), tmp_path / "inputs.pt")
    code = f"""
        import sys
        sys.modules["transformers"] = None  # any import of it raises
        import torch, fxgraft as fg
        inputs, state = torch.load({str(tmp_path / "inputs.pt")!r})
        package = fg.load_package({str(path)!r})
        first = package(**inputs).logits
        package.swap(state, "default")
        torch.save((first, package(**inputs).logits), {str(tmp_path / "outputs.pt")!r})
    """
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "/missing"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(first, run(adapted, **inputs).logits, **CLOSE)
    twin = fg.rewrite(adapted, fg.Spec(fg.LoRA(rank=1), ["query"]), name="unused")
    fg.swap(twin, state)
    fg.set_active(twin, ["default", "b"])
    torch.testing.assert_close(second, run(twin, **inputs).logits, **CLOSE)
    assert not torch.allclose(first, second, **CLOSE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.pop("attention_mask"), "'attention_mask' is missing"),
        (lambda i: i.update(position_ids=i["input_ids"]), "'position_ids' was not among the example inputs"),
        (lambda i: i.update(input_ids=i["input_ids"].int()), "'input_ids' is torch.int32, not torch.int64"),
        (lambda i: i.update(input_ids=[[1, 2]]), "'input_ids' is a list, not a tensor"),
        (lambda i: i.update(input_ids=i["input_ids"][0]), "'input_ids' has 1 dimensions, not 2"),
        (lambda i: i.update(attention_mask=i["attention_mask"][:1]), "size 1 in 'batch', 'input_ids' has 3"),
        (lambda i: i.update(tokens(2, 33)), "size 33 in 'sequence', which goes from 1 to 32"),
        (lambda i: i.update(input_ids=i["input_ids"].to("meta")), "'input_ids' is on meta, not on cpu"),
    ],
)
def test_wrong_inputs(two, change: Callable[[Any], Any], text):
    package = fg.load_package(two[0])
    inputs = tokens(3, 8)
    change(inputs)
    with pytest.raises(fg.PackageError, match="wrong inputs") as caught:
        package(**inputs)
    assert text in str(caught.value) and "input_ids int64 (batch x sequence)" in str(caught.value)


def test_too_many_and_repeated_arguments(plain):
    package = fg.load_package(plain[0])
    x = torch.ones(3, 6)
    with pytest.raises(fg.PackageError, match="'x' given by position and by name"):
        package(x, x=x)
    with pytest.raises(fg.PackageError, match="4 positional arguments"):
        package(x, 0.5, None, None)
    with pytest.raises(fg.PackageError, match=r"'scale' was packaged as 0\.5 and cannot be 2\.0"):
        package(x, 2.0)


def test_a_plain_model_and_the_form_of_its_output(plain):
    path, model = plain
    package = fg.load_package(path)
    x = torch.randn(5, 6)
    got, want = package(x, 0.5, None), run(model, x=x, scale=0.5)
    assert type(got) is tuple and got[1] is None and type(got[2]) is list
    torch.testing.assert_close([got[0], *got[2]], [want[0], *want[2]], **CLOSE)
    assert package.adapters == [] and package.manifest["axes"] == {"batch": {"min": 2, "max": 6}}
    for size in (1, 7):
        with pytest.raises(fg.PackageError, match=f"size {size} in 'batch', which goes from 2 to 6"):
            package(torch.ones(size, 6))
    with pytest.raises(fg.AdapterError, match="no adapter"):
        package.swap({})


# -- swaps ---------------------------------------------------------------------------------------------------------
def test_swap_by_name_and_back(two):
    path, adapted = two
    package, inputs = fg.load_package(path), tokens(4, 9)
    before = package(**inputs).logits
    packaged = {name: package.adapter_state(name) for name in package.adapters}
    assert {n: set(s) for n, s in packaged.items()} == {n: set(fg.adapter_state(adapted, n)) for n in ("default", "b")}
    twin = fg.rewrite(adapted, fg.Spec(fg.LoRA(rank=1), ["query"]), name="unused")
    fg.set_active(twin, ["default", "b"])
    stir(twin)
    for name in ("default", "b"):
        old = package(**inputs).logits
        package.swap(fg.adapter_state(twin, name), name)
        assert not torch.allclose(package(**inputs).logits, old, **CLOSE)
    torch.testing.assert_close(package(**inputs).logits, run(twin, **inputs).logits, **CLOSE)
    assert all(torch.equal(t, package.adapter_state("b")[k]) for k, t in fg.adapter_state(twin, "b").items())
    for name, state in packaged.items():
        package.swap(state, name)
    assert torch.equal(package(**inputs).logits, before)


def test_swap_takes_any_memory_layout(two):
    path, _ = two
    package, inputs = fg.load_package(path), tokens(2, 6)
    state = {key: torch.randn_like(tensor) for key, tensor in package.adapter_state("default").items()}
    package.swap(state, "default")
    want = package(**inputs).logits
    # The runtime copies whole storages and takes strides as they come: views must not reach it.
    transposed = {key: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for key, tensor in state.items()}
    views = {key: torch.stack([torch.full_like(t, 7.0), t])[1] for key, t in state.items()}
    for other in (transposed, views, {key: tensor.requires_grad_() for key, tensor in state.items()}):
        package.swap({key: torch.zeros_like(tensor) for key, tensor in state.items()}, "default")
        package.swap(other, "default")
        assert torch.equal(package(**inputs).logits, want)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda s, k: s.pop(k), ["missing '{k}'"]),
        (lambda s, k: s.update({f"{k}x": s[k]}), ["unknown '{k}x'", "close are '{k}'"]),
        (lambda s, k: s.update({k: s[k].t().contiguous()}), ["'{k}' has shape (32, 4), not (4, 32)"]),
        (lambda s, k: s.update({k: s[k].half()}), ["'{k}' is torch.float16, not torch.float32"]),
        (lambda s, k: s[k].fill_(float("nan")), ["'{k}' has NaN or infinite values"]),
        (lambda s, k: s.update({k: s[k].to("meta")}), ["'{k}' is a torch.strided tensor on meta"]),
        (lambda s, k: s.update({k: s[k].to_sparse()}), ["'{k}' is a torch.sparse_coo tensor"]),
        (lambda s, k: s.update({k: None}), ["'{k}' is NoneType"]),
        (
            lambda s, k: (s.update({k: s[k][:1], "new": s[k]}), s.pop("classifier.bias")),
            ["3 problem(s)", "missing 'classifier.bias'", "unknown 'new'", "'{k}' has shape (1, 32)"],
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(two, change: Callable[[Any, str], Any], texts):
    package, inputs = fg.load_package(two[0]), tokens(2, 5)
    before, state = package(**inputs).logits, package.adapter_state("default")
    state = {key: tensor + 1 for key, tensor in state.items()}
    key = next(key for key in state if key.endswith("query.A"))
    change(state, key)
    with pytest.raises(fg.AdapterError, match="does not fit adapter 'default', which is unchanged") as caught:
        package.swap(state, "default")
    assert all(text.format(k=key) in str(caught.value) for text in texts), str(caught.value)
    assert torch.equal(package(**inputs).logits, before)


def test_swap_wants_a_name_and_a_dict(two):
    package = fg.load_package(two[0])
    with pytest.raises(fg.AdapterError, match="2 adapters: say which with name=, one of 'default', 'b'"):
        package.swap({})
    with pytest.raises(fg.AdapterError, match="no adapter 'c' in this package; it has 'default', 'b'"):
        package.adapter_state("c")
    with pytest.raises(fg.AdapterError, match="it is a list; give a dict"):
        package.swap([], "b")


def test_every_method_swaps(many):
    path, adapted = many
    package, x = fg.load_package(path), torch.randn(5, 12)
    torch.testing.assert_close(package(x).scores, run(adapted, x=x)["scores"], **CLOSE)
    assert {e["role"] for e in package.manifest["adapters"]["default"]["tensors"].values()} == {
        "trainable",
        "frozen",
        "head",
    }
    generator = torch.Generator().manual_seed(3)
    state = package.adapter_state()
    moved = {}
    for site in (*Many.NAMES, "head"):
        # One site at a time: each must reach the compiled code, frozen factors too. UniLoRA's vector is shared.
        key = "theta" if site.startswith("unilora") else f".{site}." if site != "head" else "head."
        part = {
            k: t + 0.3 * torch.randn(t.shape, generator=generator)
            for k, t in state.items()
            if key in k or k.startswith(key)
        }
        assert part, site
        moved |= part
        old = package(x).scores
        package.swap({**state, **moved})
        assert not torch.allclose(package(x).scores, old, rtol=0, atol=1e-4), site
    fg.swap(adapted, {**state, **moved})
    torch.testing.assert_close(package(x).scores, run(adapted, x=x)["scores"], **CLOSE)
    fg.swap(adapted, state)


def test_calls_and_swaps_from_threads_take_turns(many):
    package, x = fg.load_package(many[0]), torch.randn(2, 12)
    states = [package.adapter_state(), {k: t * 0.5 for k, t in package.adapter_state().items()}]
    wanted = []
    for state in states:
        package.swap(state)
        wanted.append(package(x).scores)
    strange: list[torch.Tensor] = []

    def call() -> None:
        for _ in range(200):
            out = package(x).scores
            if not any(torch.equal(out, want) for want in wanted):
                strange.append(out)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for state in states:
            package.swap(state)
    assert not strange


# -- files ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_native_code(monkeypatch):
    def load(*args: Any) -> None:
        raise AssertionError("native code was loaded")

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", load)


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a package whose manifest says something else."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith(aot_manifest.MANIFEST):
                manifest = json.loads(data)
                change(manifest)
                data = json.dumps(manifest).encode()
            new.writestr(info, data)
    return target


def test_the_manifest(two):
    path, adapted = two
    manifest = fg.load_package(path).manifest
    assert manifest["format"] == 1 and manifest["model"] == "BertForSequenceClassification"
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["machine"]["device"] == "cpu"
    assert manifest["content"].startswith("sha256:") and len(manifest["parity"]) == 5
    adapters = manifest["adapters"]
    assert [a["method"] for a in adapters.values()] == ["lora", "unilora"] and list(adapters) == ["default", "b"]
    spec = fg.Spec.from_dict(adapters["b"]["spec"])
    assert spec.method == fg.UniLoRA(rank=2, vector_length=60, init_bound=0.5)
    theta = adapters["b"]["tensors"]["theta"]
    assert theta["shape"] == [60] and theta["role"] == "trainable" and theta["constant"] in adapted.state_dict()


def test_damage_is_found_before_native_code_runs(two, tmp_path, no_native_code):
    data = two[0].read_bytes()
    file = tmp_path / "damaged.pt2"
    for length in (0, 1, 30, len(data) // 3, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(fg.PackageError, match=r"damaged|no \.pt2 package"):
            fg.load_package(file)
    manifest, states = aot_manifest.read(two[0])
    draw = random.Random(0)
    # In the weights and code, and in the archive's directory at the end, where a flip may also hit a time stamp.
    places = [draw.randrange(len(data)) for _ in range(40)] + [
        draw.randrange(len(data) - 3000, len(data)) for _ in range(60)
    ]
    found = 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            same, tensors = aot_manifest.read(file)
        except fg.PackageError:
            found += 1
        else:
            assert same == manifest and all(torch.equal(t, states["b"][k]) for k, t in tensors["b"].items())
    assert found > 70


def test_foreign_files(tmp_path, no_native_code):
    with pytest.raises(fg.PackageError, match="there is no package"):
        fg.load_package(tmp_path / "missing.pt2")
    with pytest.raises(fg.PackageError, match="there is no package"):
        fg.load_package(tmp_path)
    (tmp_path / "text.pt2").write_text("not a package")
    with pytest.raises(fg.PackageError, match=r"is no \.pt2 package: give a file that fg\.package wrote"):
        fg.load_package(tmp_path / "text.pt2")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt2")
    with pytest.raises(fg.PackageError, match=r"was not written by fg\.package"):
        fg.load_package(tmp_path / "weights.pt2")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(format=2), "has format 2, this fxgraft reads format 1"),
        (lambda m: m["machine"].update(torch="2.9.1"), "made with torch 2.9.1, here is"),
        (lambda m: m["machine"].update(platform="plan9"), "made for platform plan9"),
        (lambda m: m["machine"].update(machine="vax"), "made for machine vax"),
        (lambda m: m["machine"]["cpu"].update(avx99=True), "a CPU with avx99, which this one does not have"),
        (lambda m: m.update(content="sha256:0"), "does not match the hash"),
    ],
)
def test_packages_made_for_another_machine_or_changed(plain, tmp_path, no_native_code, change, text):
    with pytest.raises(fg.PackageError) as caught:
        fg.load_package(edited(plain[0], tmp_path / "edited.pt2", change))
    assert text in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_package_for_a_gpu_needs_one(plain, tmp_path, no_native_code):
    file = edited(plain[0], tmp_path / "gpu.pt2", lambda m: m["machine"].update(device="cuda", gpu=[9, 0]))
    with pytest.raises(fg.PackageError, match="runs on a CUDA GPU, and torch finds none here"):
        fg.load_package(file)


# -- packaging that fails ------------------------------------------------------------------------------------------
def test_a_package_that_differs_from_torch_does_not_appear(plain, tmp_path, monkeypatch):
    target = tmp_path / "model.pt2"
    target.write_text("what was there")
    monkeypatch.setattr(aot, "_compile", lambda graph, example, options, file: shutil.copy(plain[0], file))
    torch.manual_seed(1)
    with pytest.raises(ParityError, match="differs from torch"):
        fg.package(Plain(), target, (torch.randn(4, 6), 0.5))
    assert target.read_text() == "what was there" and list(tmp_path.iterdir()) == [target]


class Freeze(Pass):
    """A wrong pass: every B becomes a constant of its own."""

    def run(self, program):
        gm = program.graph_module
        nodes = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target.endswith(".B")]
        for index, node in enumerate(nodes):
            gm.register_buffer(f"frozen{index}", gm.get_parameter(node.target).detach().clone())
            node.target = f"frozen{index}"
        return PassResult(program, bool(nodes), len(nodes))


def test_a_swap_that_would_do_nothing_is_found_when_packaging(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "packaged", Pipeline("wrong", (Freeze(),)))
    adapted = stir(fg.rewrite(Plain(), fg.Spec(fg.LoRA(rank=2), ["up"])))
    with pytest.raises(ParityError, match="other values in 'default'"):
        fg.package(adapted, tmp_path / "model.pt2", (torch.randn(4, 6),))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_packaged(mlp, tmp_path):
    x = (torch.randn(4, 7),)
    adapted = fg.rewrite(mlp, fg.Spec(fg.LoRA(rank=2), ["up"]))
    file = tmp_path / "model.pt2"
    with pytest.raises(ExportError, match=r"give the model, an nn\.Module"):
        fg.package(lambda x: x, file, x)
    with pytest.raises(ExportError, match=r"does not end in '\.pt2'"):
        fg.package(adapted, tmp_path / "model.zip", x)
    with pytest.raises(ExportError, match="does not exist"):
        fg.package(adapted, tmp_path / "missing" / "model.pt2", x)
    with pytest.raises(ExportError, match="'freezing' itself"):
        fg.package(adapted, file, x, options={"freezing": True})
    with pytest.raises(ExportError, match="size 1 in dynamic axis 0"):
        fg.package(adapted, file, (torch.randn(1, 7),))
    with pytest.raises(fg.AdapterError, match="no adapter 'b' in this model"):
        fg.package(adapted, file, x, name="b")
    with pytest.raises(fg.AdapterError, match="has no adapter"):
        fg.package(mlp, file, x, name="default")
    with pytest.raises(ExportError, match="does not run on example_inputs"):
        fg.package(adapted, file, (torch.randn(4, 6),))
    fg.adapter_state(adapted)["up.A"].fill_(float("inf"))
    with pytest.raises(fg.AdapterError, match=r"NaN or infinite values in 'up\.A'"):
        fg.package(adapted, file, x)
    assert not list(tmp_path.iterdir())


def test_inputs_through_a_catch_all(tmp_path):
    class Loose(nn.Module):
        def forward(self, x, **rest):
            return x + rest["y"]

    with pytest.raises(ExportError, match=r"takes 'y' through \*\*rest"):
        fg.package(Loose(), tmp_path / "model.pt2", {"x": torch.ones(2), "y": torch.ones(2)})
