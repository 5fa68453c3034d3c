"""Uni-LoRA's folders as they are found: the authors' fork of PEFT, their GLUE scripts, uneven vectors."""

import copy
import json

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS
from author_folders import SITES, Net, P, base, run, write
from safetensors.torch import load_file

import fxgraft as fg

peft = pytest.importorskip("peft")


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(4, 7, dtype=torch.float64)


def balanced(d, seed=0):
    """Indices of every site, each entry used equally often up to one, and how often that is."""
    sizes = [(s, letter, shape) for s, (o, i) in SITES.items() for letter, shape in (("A", (3, i)), ("B", (o, 3)))]
    total = sum(a * b for _, _, (a, b) in sizes)
    flat = torch.arange(total)[torch.randperm(total, generator=torch.Generator().manual_seed(seed))] % d
    parts = flat.split([a * b for _, _, (a, b) in sizes])
    return {(s, letter): part.view(shape) for (s, letter, shape), part in zip(sizes, parts, strict=True)}, flat


def fork(folder, d=20, stale=False, dtype=torch.float32, name="", **config):
    indices, flat = balanced(d)
    counts = torch.bincount(flat, minlength=d).double().clamp(min=1)
    looked_up = balanced(d, 1)[0] if stale else indices
    tensors = {f"base_model.unilora_vector_bank{name}": torch.randn(d)}
    for (site, letter), index in indices.items():
        tensors[f"{P}{site}.unilora_logits_{letter}{name}"] = index
        tensors[f"{P}{site}.unilora_norm_{letter}{name}"] = counts[looked_up[site, letter]].rsqrt().to(dtype)
    config = {
        "peft_type": "UNILORA", "r": 3, "vector_length": d, "num_vectors": 256, "topk": 2, "unilora_dropout": 0.0,
        "init_vector_bank_bound": 0.02, "init_logits_std": 0.1, "save_only_topk_weights": False, "bias": "none",
        "fan_in_fan_out": False, "target_modules": ["up", "down"], **config,
    }  # fmt: skip
    return write(folder, config, tensors)


def glue(folder, d=20, stale=False, **more):
    """The first code's state dict: a vector and norms beside every layer."""
    indices, flat = balanced(d)
    counts = torch.bincount(flat, minlength=d).double().clamp(min=1)
    looked_up = balanced(d, 1)[0] if stale else indices
    vector = torch.randn(d)
    tensors = {"roberta.vector_bank": vector.clone()} | {f"{site}.vector_bank": vector.clone() for site in SITES}
    for (site, letter), index in indices.items():
        tensors[f"{site}.project_params_{letter}"] = index.T
        tensors[f"{site}.norm_factor_{letter}"] = counts[looked_up[site, letter]].rsqrt().T.float()
    return write(folder, {"method": "unilora", "rank": 3, "vector_length": d}, {**tensors, **more})


def unilora_oracle(net, x, folder, keys, turned):
    tensors = load_file(folder / WEIGHTS)
    theta = next(t for k, t in tensors.items() if "vector_bank" in k).double()

    def layer(name, x):
        index, norm = keys
        parts = {s: (tensors[index.format(name, s)], tensors[norm.format(name, s)].double()) for s in "AB"}
        A, B = (theta[i.long()] * n for i, n in parts.values())
        return base(net, name, x) + (x @ A @ B if turned else x @ A.T @ B.T)

    return run(net, x, layer)


@pytest.mark.parametrize("name", ["", ".default", ".run1"])
@pytest.mark.parametrize(("stale", "method"), [(False, fg.UniLoRA), (True, fg.LoRA)], ids=["norms", "stale norms"])
@pytest.mark.filterwarnings("ignore:the adapter in")
def test_unilora_fork(net, x, tmp_path, name, stale, method):
    folder = fork(tmp_path / "a", name=name, stale=stale)
    keys = (f"{P}{{}}.unilora_logits_{{}}{name}", f"{P}{{}}.unilora_norm_{{}}{name}")
    expected = unilora_oracle(net, x, folder, keys, turned=False)
    loaded = fg.load_adapter(net, folder)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(fg.rewriter.state.record_of(loaded, "default").groups[0].method, method)
    assert (expected - net(x)).abs().max() > 1e-2


@pytest.mark.parametrize(("stale", "method"), [(False, fg.UniLoRA), (True, fg.LoRA)], ids=["norms", "stale norms"])
@pytest.mark.filterwarnings("ignore:the adapter in")
def test_unilora_glue(net, x, tmp_path, stale, method):
    folder = glue(tmp_path / "a", stale=stale)
    expected = unilora_oracle(net, x, folder, ("{}.project_params_{}", "{}.norm_factor_{}"), turned=True)
    loaded = fg.load_adapter(net, folder)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(fg.rewriter.state.record_of(loaded, "default").groups[0].method, method)


def test_unilora_glue_with_the_whole_model(net, x, tmp_path):
    """The trained head comes along; the base's own weights say nothing."""
    head = {"head.weight": torch.randn(3, 6).double(), "head.bias": net.head.bias.detach().clone()}
    folder = glue(tmp_path / "a", **{"layers.up.weight": net.layers["up"].weight.detach().clone(), **head})
    loaded = fg.load_adapter(net, folder)
    assert fg.rewriter.state.record_of(loaded, "default").train == ("head",)
    plain = fg.load_adapter(net, glue(tmp_path / "b"))
    torch.manual_seed(0)
    hidden = {}
    loaded.layers["down"].register_forward_hook(lambda m, i, o: hidden.update(o=o))
    torch.testing.assert_close(loaded(x), hidden["o"] @ head["head.weight"].T + head["head.bias"])
    assert fg.rewriter.state.record_of(plain, "default").train == ()


@pytest.mark.parametrize("make", [fork, glue])
def test_unilora_with_more_entries_than_places(net, x, tmp_path, make):
    loaded = fg.load_adapter(net, make(tmp_path / "a", d=500))
    assert fg.adapter_state(loaded)["theta"].shape == (500,)
    assert (loaded(x) - net(x)).abs().max() > 1e-2


def change(folder, edit):
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    edit(config, tensors)
    return write(folder, config, tensors)


UNI_REFUSED = {
    "no bank": (fork, lambda c, t: t.pop("base_model.unilora_vector_bank"), "lacks 1 tensor.*unilora_vector_bank"),
    "no norm": (fork, lambda c, t: t.pop(P + "layers.up.unilora_norm_A"), "layers.up: norm_A"),
    "norm of another shape": (
        fork, lambda c, t: t.update({P + "layers.up.unilora_norm_A": torch.ones(3, 6)}), r"norms of .* are \(3, 6\)",
    ),
    "out of range": (fork, lambda c, t: t[P + "layers.up.unilora_logits_A"].fill_(20), "indices from 20 to 20"),
    "top-k weights": (fork, lambda c, t: c.update(save_only_topk_weights=True), "save_only_topk_weights=True"),
    "targets": (fork, lambda c, t: c.update(target_modules=["up"]), "do not name: 'layers.down'"),
    "length": (fork, lambda c, t: c.update(vector_length=19), "19"),
    "more": (fork, lambda c, t: t.update({P + "layers.up.unilora_x": torch.ones(1)}), "not understood"),
    "vectors that differ": (glue, lambda c, t: t["layers.up.vector_bank"].add_(1), "several vectors"),
    "no norm of one": (glue, lambda c, t: t.pop("layers.up.norm_factor_B"), "layers.up: norm_factor_B"),
    "targets of the first code": (glue, lambda c, t: c.update(target_modules=["up"]), "do not name: 'layers.down'"),
    "a weight of another model": (glue, lambda c, t: t.update({"head.weight": torch.ones(4, 6)}), r"\(4, 6\)"),
    "a tensor of nothing": (glue, lambda c, t: t.update({"tail.weight": torch.ones(4, 6)}), "not understood"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNI_REFUSED)
def test_unilora_refused(net, tmp_path, case):
    make, edit, says = UNI_REFUSED[case]
    folder = make(tmp_path / "a")
    fg.load_adapter(net, folder)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(fg.CheckpointError, match=says):
        fg.load_adapter(net, change(folder, edit))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
