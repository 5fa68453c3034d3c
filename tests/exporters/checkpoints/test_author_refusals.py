"""Damaged folders of the methods' authors: what is missing, too much or out of range is named, nothing changes."""

import copy
import json

import pytest
import torch
from author_folders import CONFIG, FULL, MAKERS, WEIGHTS, Net, P, same_model, write
from safetensors.torch import load_file
from torch import nn

import fxgraft as fg


@pytest.fixture
def net():
    return Net().double().eval()


def drop(*endings):
    def change(config, tensors):
        gone = [k for k in tensors if k.endswith(endings)]
        assert gone
        for key in gone:
            del tensors[key]

    return change


def put(**changes):
    return lambda config, tensors: config.update(changes)


def add(key, shape=(2, 2)):
    return lambda config, tensors: tensors.update({key: torch.ones(shape)})


def path_of_up(**changes):
    return lambda config, tensors: config["paths"]["layers.up"].update(changes)


UP = P + "layers.up."
REFUSED = {
    "hydralora, an expert is missing": ("hydralora", drop("up.lora_B1.weight"), "lacks 1 tensor.*up: lora_B1"),
    "hydralora, no router": ("hydralora", drop("up.lora_route.weight"), "lacks 1 tensor.*up: lora_route"),
    "hydralora, a whole layer": ("hydralora", lambda c, t: [t.pop(k) for k in list(t) if ".up." in k], "'layers.up'"),
    "hydralora, one expert more": ("hydralora", add(UP + "lora_B3.weight", (11, 2)), r"not understood.*lora_B3"),
    "hydralora, fewer experts": ("hydralora", put(lora_nums=2), r"not understood.*lora_B2"),
    "hydralora, one expert": ("hydralora", put(lora_nums=1), "one expert needs no router"),
    "hydralora, no count": ("hydralora", lambda c, t: c.pop("lora_nums"), "'lora_nums' is None"),
    "hydralora, unequal experts": ("hydralora", add(UP + "lora_B1.weight", (10, 2)), r"differ in shape: lora_B1"),
    "hydralora, bias": ("hydralora", put(bias="lora_only"), "bias='lora_only'"),
    "hydralora, fused": ("hydralora", put(enable_lora=[True, False]), r"enable_lora=\[True, False\]"),
    "hydralora, rank": ("hydralora", put(r=3), r"'layers\.down\.A' is \(2, 11\), the model's is \(3, 11\)"),
    "latent, no mapping": ("latent", drop("up.default_lora_latent_mapping.weight"), "up: lora_latent_mapping"),
    "latent, no A": ("latent", drop("up.lora_A.weight"), "up: lora_A"),
    "latent, more": ("latent", add(UP + "lora_magnitude_vector"), "not understood.*magnitude"),
    "latent, dora": ("latent", put(use_dora=True), "use_dora=True"),
    "latent, shape": ("latent", add(UP + "default_lora_latent_mapping.weight", (3, 2)), r"\(3, 2\)"),
    "latent, rank": ("latent", put(r="3"), "'r' is '3'"),
    "prolora, no vector": ("prolora", drop("up.lora_A_vec.default"), "up: lora_A_vec"),
    "prolora, no chunk": ("prolora", drop("up.lora_B.default.weight"), "up: lora_B.weight"),
    "prolora, other chunks": ("prolora", put(reduce_lora_A_x=2), r"A_shared' is \(3, 4\), the model's is \(3, 6\)"),
    "prolora, no chunks said": ("prolora", lambda c, t: c.pop("reduce_lora_B_x"), "'reduce_lora_B_x' is None"),
    "prolora, more unshared than ranks": ("prolora", put(unshared_r=6), "unshared=6"),
    "prolora, values of rank 0": ("prolora", put(unshared_r=5), "unshared_r leaves it no rank"),
    "prolora, rslora": ("prolora", put(use_rslora=True), "use_rslora=True"),
    "prolora, more": ("prolora", add(UP + "lora_C.default.weight"), "not understood.*lora_C"),
    "unilora, no bank": ("unilora", drop("vector_bank"), "lacks vector_bank"),
    "unilora, no indices": ("unilora", drop("project_params_A", "project_params_B"), "lacks every project_params"),
    "unilora, one is missing": ("unilora", drop("up.project_params_B"), "layers.up: project_params_B"),
    "unilora, more": ("unilora", add("layers.up.scale"), "not understood: 'layers.up.scale'"),
    "unilora, config": ("unilora", put(norm="l2"), "norm='l2'"),
    "unilora, length": ("unilora", put(vector_length=19), r"\(20,\), the model's is \(19,\)"),
    "unilora, rank": ("unilora", put(rank=2), r"'layers\.up\.index_a' is \(3, 7\), the model's is \(2, 7\)"),
    "unilora, no rank": ("unilora", lambda c, t: c.pop("rank"), "'rank' is None"),
    "unilora, out of range": (
        "unilora", lambda c, t: t["layers.up.project_params_A"].fill_(20), "from 20 to 20, the vector has .* 0 to 19",
    ),
    "unilora, floats": ("unilora", add("layers.up.project_params_A", (7, 3)), "expected whole numbers"),
    "unilora, flat indices": (
        "unilora", lambda c, t: t.update({"layers.up.project_params_A": torch.zeros(21, dtype=torch.long)}), "matrices",
    ),
    "glora, no paths": ("glora", lambda c, t: c.pop("paths"), "'paths' is None"),
    "glora, no path": ("glora", lambda c, t: c["paths"].pop("layers.up"), "no path for 1 site.*'layers.up'"),
    "glora, no site": ("glora", lambda c, t: c["paths"].update(x=FULL), "lacks the tensors of 1 site.*'x'"),
    "glora, no tensor": ("glora", drop("up.Cu"), "lacks 1 tensor.*'layers.up.Cu'"),
    "glora, more": ("glora", add("layers.up.F"), "not understood: 'layers.up.F'"),
    "glora, config": ("glora", put(scale=2), "scale=2"),
    "glora, choice": ("glora", path_of_up(A="matrix"), "A='matrix', allowed are"),
    "glora, low-rank bias": ("glora", path_of_up(D="LoRA_2"), "D='LoRA_2', allowed are"),
    "glora, constant C": ("glora", path_of_up(C="constant"), "C='constant', allowed are"),
    "glora, our own word": ("glora", path_of_up(A="lora"), "A='lora', allowed are"),
    "glora, rank above the supernet's": ("glora", path_of_up(A="LoRA_4"), "A='LoRA_4'.*rank 3"),
    "glora, rank 0": ("glora", path_of_up(A="LoRA_0"), "A='LoRA_0'"),
    "glora, half a path": ("glora", lambda c, t: c["paths"]["layers.up"].pop("E"), "does not say what each of"),
    "glora, a path of text": ("glora", lambda c, t: c["paths"].update({"layers.up": "A"}), "does not say what each"),
    "glora, shape": ("glora", add("layers.up.Bd", (12, 3)), r"'layers\.up\.Bd' is \(12, 3\)"),
    "no format": ("glora", put(method="other"), r"not known.*'method'.*'layers\.down\.Ad'"),
    "nan": ("glora", lambda c, t: t["layers.up.E"].fill_(float("nan")), "NaN or infinite values in 'layers.up.E'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(net, tmp_path, case):
    maker, change, says = REFUSED[case]
    folder = MAKERS[maker](tmp_path / "a")
    fg.load_adapter(net, folder)  # it is the change that is refused
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    write(folder, config, tensors)
    before = copy.deepcopy(net.state_dict())
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(net, folder)
    assert same_model(net, before)
    assert flags == {n: p.requires_grad for n, p in net.named_parameters()}


@pytest.mark.parametrize("maker", MAKERS)
def test_another_model(tmp_path, maker):
    folder = MAKERS[maker](tmp_path / "a")
    other = nn.ModuleDict({"layers": nn.ModuleDict({"up": nn.Linear(7, 11)})})
    with pytest.raises(fg.CheckpointError, match=r"another model than this ModuleDict.*'layers\.down'"):
        fg.load_adapter(other, folder)
    wider = nn.ModuleDict({"layers": nn.ModuleDict({"up": nn.Linear(7, 12), "down": nn.Linear(12, 6)})})
    with pytest.raises(fg.CheckpointError, match=r"the model's is \("):
        fg.load_adapter(wider, folder)


@pytest.mark.parametrize("maker", MAKERS)
def test_pickles_are_not_read(net, tmp_path, maker):
    folder = MAKERS[maker](tmp_path / "a")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.pt")
    (folder / WEIGHTS).unlink()
    with pytest.raises(fg.CheckpointError, match=r"adapter_model\.pt' is a pickle"):
        fg.load_adapter(net, folder)


def test_an_empty_folder(net, tmp_path):
    folder = write(tmp_path / "a", {"method": "glora", "rank": 3, "paths": {}}, {})
    with pytest.raises(fg.CheckpointError, match="no adapter tensors"):
        fg.load_adapter(net, folder)
