"""Damaged files of every format end in one of our errors, or load as the adapter they were.

What fxgraft wrote has a hash, so any other number is a failure. Files of other programs have none: of these the trials
ask that nothing but our errors comes out, that what loads is finite, and that the model is as it was.

`pytest -s -m campaign tests/campaigns/test_damaged_files.py`: 7,000 files; `FXGRAFT_CAMPAIGN_SCALE=2`: 14,000.
"""

import os
import random
import shutil
import warnings

import author_folders as theirs
import pytest
import torch
from damage import WEIGHTS, damage_bytes, damage_folder, damage_place
from safetensors.torch import load_file, save_file
from small_models import perturb

import fxgraft as fg
from fxgraft.exporters.adapterfiles.adapter_format import read_adapter

SCALE = float(os.environ.get("FXGRAFT_CAMPAIGN_SCALE", "1"))
TARGETS = ["up", "down"]
METHODS = {
    "lora": fg.LoRA(2, 3),
    "lora_xs": fg.LoRAXS(2, 3),
    "unilora": fg.UniLoRA(2, 20, init_bound=0.3),
    "prolora": fg.PRoLoRA(4, 1, 2, 2),
    "hydralora": fg.HydraLoRA(2, 3),
    "glora": fg.GLoRA(2, fg.GLoRAPath(A="lora", B="lora", C="none", D="none", E="none")),
}


def base():
    torch.manual_seed(0)
    return theirs.Net().double().eval()


def inputs():
    return torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ours(method, format="fxgraft", head=True):
    def write(folder):
        spec = fg.Spec(METHODS[method], TARGETS, train=["head"] if head else [])
        torch.manual_seed(3)
        fg.save_adapter(perturb(fg.rewrite(base(), spec)), folder, format=format)

    return write


def foreign(maker):
    def write(folder):
        torch.manual_seed(3)
        maker(folder)

    return write


def without_record(write):
    def written(folder):
        write(folder)
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)

    return written


SEALED = {f"native {name}": ours(name) for name in METHODS} | {
    f"peft {name}": ours(name, "peft", head=name != "unilora") for name in ("lora", "unilora", "glora")
}
LOOSE = {f"{name} without its record": without_record(write) for name, write in SEALED.items()} | {
    name: foreign(maker) for name, maker in theirs.MAKERS.items()
}
FOLDERS = SEALED | LOOSE


def load(folder):
    model = base()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    try:
        return fg.load_adapter(model, folder)(inputs())
    finally:
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()), "the model was changed"


def folder_trials(tmp_path, times, seed):
    """How many folders of all formats were refused and how many were right; raises where there is anything else."""
    warnings.simplefilter("ignore")
    whole, expected = {}, {}
    for index, (name, write) in enumerate(FOLDERS.items()):
        whole[name] = tmp_path / f"whole{index}"
        write(whole[name])
        expected[name] = load(whole[name])
    counts, wrong = {"refused": 0, "right": 0}, []
    for trial in range(times):
        rng = random.Random(f"{seed} {trial}")
        name = rng.choice(list(FOLDERS))
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole[name], folder)
        damage_folder(folder, list(whole.values()), rng)
        try:
            found = load(folder)
        except fg.FxgraftError as error:
            assert str(error)
            counts["refused"] += 1
            continue
        except Exception as error:
            wrong.append(f"{seed} {trial} ({name}): {type(error).__name__}: {error}")
            continue
        good = bool(torch.isfinite(found).all())
        if name in SEALED and sealed(folder):
            good &= any(torch.equal(found, y) for y in expected.values())
        counts["right"] += good
        if not good:
            wrong.append(f"{seed} {trial} ({name}): other numbers")
    assert not wrong, "\n".join([f"{len(wrong)} of {times}", *wrong[:30]])
    return counts


def sealed(folder):
    """Whether the tensors still have the record; damage may take it away as a whole, as another program does."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return "fxgraft.content" in (file.metadata() or {})


def adapter_file_trials(tmp_path, times, seed):
    """The same of `.onnx_adapter` files, in the expanded and the structured form."""
    whole = []
    for name, method in METHODS.items():
        if name == "glora":
            continue
        adapted = perturb(fg.rewrite(base().float(), fg.Spec(method, TARGETS, train=["head"])))
        for expanded in (True, False):
            whole.append(tmp_path / f"{name}{expanded}.onnx_adapter")
            if name == "hydralora" and not expanded:
                whole.pop()
                continue
            fg.export_ort_adapter(adapted, whole[-1], expanded=expanded)
    expected = [read_adapter(file) for file in whole]
    counts, wrong = {"refused": 0, "right": 0}, []
    for trial in range(times):
        rng = random.Random(f"{seed} {trial}")
        place = tmp_path / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        index = rng.randrange(len(whole))
        file = shutil.copy(whole[index], place / "a.onnx_adapter")
        (damage_bytes if rng.randrange(20) else damage_place)(file, rng)
        try:
            good = read_adapter(file).digest() == expected[index].digest()
        except fg.FxgraftError:
            counts["refused"] += 1
            continue
        except Exception as error:
            wrong.append(f"{seed} {trial} ({whole[index].name}): {type(error).__name__}: {error}")
            continue
        counts["right"] += good
        if not good:
            wrong.append(f"{seed} {trial} ({whole[index].name}): other numbers")
    assert not wrong, "\n".join([f"{len(wrong)} of {times}", *wrong[:30]])
    return counts


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 9)

    def forward(self, x):
        return torch.relu(self.up(x))


def sealed_file_trials(tmp_path, file, reading, times, seed):
    """The same of one file that knows its hash; `reading` gives what it says."""
    expected = reading(file)
    counts, wrong = {"refused": 0, "right": 0}, []
    for trial in range(times):
        rng = random.Random(f"{seed} {trial}")
        place = tmp_path / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(file.parent, place)  # with the files it refers to
        damaged = place / file.name
        (damage_bytes if rng.randrange(20) else damage_place)(damaged, rng)
        try:
            good = reading(damaged) == expected
        except fg.FxgraftError:
            counts["refused"] += 1
            continue
        except Exception as error:
            wrong.append(f"{seed} {trial}: {type(error).__name__}: {error}")
            continue
        counts["right"] += good
        if not good:
            wrong.append(f"{seed} {trial}: other content")
    assert not wrong, "\n".join([f"{len(wrong)} of {times}", *wrong[:30]])
    return counts


def small():
    torch.manual_seed(0)
    return perturb(fg.rewrite(Small().eval(), fg.Spec(fg.LoRA(2), ["up"])))


def package_trials(tmp_path, times, seed):
    from fxgraft.backends.aot.package_manifest import read

    def reading(file):
        manifest, states = read(file)
        return manifest, {name: {k: t.tolist() for k, t in state.items()} for name, state in states.items()}

    (tmp_path / "whole").mkdir()
    fg.package(small(), tmp_path / "whole" / "model.pt2", (torch.randn(3, 6),))
    return sealed_file_trials(tmp_path, tmp_path / "whole" / "model.pt2", reading, times, seed)


def graph_trials(tmp_path, times, seed):
    from fxgraft.exporters.onnx.checks.seal import check_seal

    (tmp_path / "whole").mkdir()
    file = tmp_path / "whole" / "model.onnx"
    fg.export_onnx(small(), file, (torch.randn(3, 6),), adapters="swappable")
    return sealed_file_trials(tmp_path, file, check_seal, times, seed)


def test_damaged_folders(tmp_path):
    counts = folder_trials(tmp_path, 150, "ci")
    assert counts["refused"] > 80 and counts["right"] > 5


def test_damaged_adapter_files(tmp_path):
    pytest.importorskip("onnxruntime")
    assert adapter_file_trials(tmp_path, 60, "ci")["refused"] > 30


@pytest.mark.campaign
def test_damaged_folders_at_length(tmp_path):
    print("\nfolders:", folder_trials(tmp_path, int(5000 * SCALE), "campaign"))


@pytest.mark.campaign
def test_damaged_adapter_files_at_length(tmp_path):
    pytest.importorskip("onnxruntime")
    print("\n.onnx_adapter:", adapter_file_trials(tmp_path, int(1000 * SCALE), "campaign"))


@pytest.mark.campaign
def test_damaged_packages_at_length(tmp_path):
    print("\n.pt2:", package_trials(tmp_path, int(500 * SCALE), "campaign"))


@pytest.mark.campaign
def test_damaged_graphs_at_length(tmp_path):
    pytest.importorskip("onnxruntime")
    print("\n.onnx:", graph_trials(tmp_path, int(500 * SCALE), "campaign"))
