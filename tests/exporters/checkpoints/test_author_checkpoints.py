"""Adapters as the methods' authors store them: folders built by hand, outputs against deltas computed by hand."""

import copy
import json

import pytest
import torch
from author_folders import (
    CONFIG,
    FULL,
    SITES,
    WEIGHTS,
    Net,
    P,
    base,
    glora,
    hydralora,
    latent,
    prolora,
    run,
    same_model,
    unilora,
    write,
)
from safetensors.torch import load_file

import fxgraft as fg


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(4, 7, dtype=torch.float64)


def check(net, x, folder, expected, method, name="theirs"):
    """Loads, gives the expected output, leaves the model alone, and survives our own format."""
    before = copy.deepcopy(net.state_dict())
    loaded = fg.load_adapter(net, folder, name=name)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-6, atol=1e-6)
    assert (expected - net(x)).abs().max() > 1e-2
    assert same_model(net, before)
    groups = fg.rewriter.state.record_of(loaded, name).groups
    assert {type(group.method) for group in groups} == {method}
    fg.save_adapter(loaded, folder.parent / "own", name=name)
    again = fg.load_adapter(net, folder.parent / "own")
    assert torch.equal(again(x), loaded(x))
    return loaded


@pytest.mark.parametrize("experts", [2, 3, 11])
def test_hydralora(net, x, tmp_path, experts):
    tensors = load_file(hydralora(tmp_path / "a", experts) / WEIGHTS)

    def layer(name, x):
        t = {k.removeprefix(f"{P}{name}."): v.double() for k, v in tensors.items() if k.startswith(f"{P}{name}.")}
        weights = torch.softmax(x @ t["lora_route.weight"].T, -1)
        y = base(net, name, x)
        for i in range(experts):
            y = y + 1.5 * weights[:, i : i + 1] * (x @ t["lora_A.weight"].T @ t[f"lora_B{i}.weight"].T)
        return y

    check(net, x, tmp_path / "a", run(net, x, layer), fg.HydraLoRA)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (5 / 3, 5 / 3)),
        ({"lora_alpha": 3}, (1, 1)),
        ({"alpha_pattern": {"down": 1}}, (5 / 3, 1 / 3)),
        ({"use_rslora": True}, (5 / 3**0.5, 5 / 3**0.5)),
    ],
)
def test_lora_sb_and_lora_xs(net, x, tmp_path, config, scales):
    tensors = load_file(latent(tmp_path / "a", **config) / WEIGHTS)

    def layer(name, x):
        A, B = (tensors[f"{P}{name}.lora_{letter}.weight"].double() for letter in "AB")
        R = tensors[f"{P}{name}.default_lora_latent_mapping.weight"].double()
        return base(net, name, x) + scales[list(SITES).index(name)] * (x @ A.T @ R.T @ B.T)

    loaded = check(net, x, tmp_path / "a", run(net, x, layer), fg.LoRAXS)
    assert {n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad} == {"R"}


@pytest.mark.parametrize(
    ("r", "u", "m", "n", "empty"),
    [(5, 2, 3, 4, False), (6, 0, 2, 3, False), (6, 0, 2, 3, True), (4, 4, 3, 2, False), (4, 4, 3, 2, True),
     (5, 1, 5, 2, False)],
)  # fmt: skip
def test_prolora(net, x, tmp_path, r, u, m, n, empty):
    tensors, q = load_file(prolora(tmp_path / "a", r, u, m, n, empty) / WEIGHTS), r - u

    def layer(name, x):
        out, width = SITES[name]
        A, B = torch.zeros(0, width).double(), torch.zeros(out, 0).double()
        if q:
            A0, B0 = (tensors[f"{P}{name}.lora_{letter}.default.weight"].double() for letter in "AB")
            A = torch.cat([torch.roll(A0, -k * max(q // m, 1), 0) for k in range(m)], 1)[:, :width]
            B = torch.cat([torch.roll(B0, -k * max(q // n, 1), 1) for k in range(n)], 0)[:out]
        if u:
            A = torch.cat([A, tensors[f"{P}{name}.lora_A_vec.default"].double()])
            B = torch.cat([B, tensors[f"{P}{name}.lora_B_vec.default"].double().T], 1)
        return base(net, name, x) + 8 / r * (x @ A.T @ B.T)

    check(net, x, tmp_path / "a", run(net, x, layer), fg.PRoLoRA)


def test_unilora_first_code(net, x, tmp_path):
    tensors = load_file(unilora(tmp_path / "a") / WEIGHTS)
    bank, used = tensors["vector_bank"].double(), [0] * 20
    for key, index in tensors.items():
        if "project_params" in key:
            for entry in index.flatten().tolist():
                used[entry] += 1
    assert used[19] == 0 and len(set(used)) > 3
    norm = torch.tensor([1 / n**0.5 if n else 0.0 for n in used], dtype=torch.float64)

    def layer(name, x):
        A, B = ((bank * norm)[tensors[f"{name}.project_params_{letter}"]] for letter in "AB")
        return base(net, name, x) + x @ A @ B

    loaded = check(net, x, tmp_path / "a", run(net, x, layer), fg.UniLoRA)
    again = fg.load_adapter(net, tmp_path / "own")
    state = fg.adapter_state(again)
    assert torch.equal(state["layers.up.index_a"].long(), tensors["layers.up.project_params_A"].T)
    torch.testing.assert_close(fg.merge(again)(x), loaded(x), rtol=1e-6, atol=1e-6)
    loaded(x).sum().backward()
    gradient = loaded.fxgraft_shared.theirs.theta.grad
    assert torch.isfinite(gradient).all() and gradient[19] == 0 and gradient[:18].abs().sum() > 0
    copied = copy.deepcopy(loaded)
    fg.swap(copied, {**fg.adapter_state(loaded, "theirs"), "theta": torch.zeros(20, dtype=torch.float64)}, "theirs")
    torch.testing.assert_close(copied(x), net(x))


PATHS = [
    FULL,
    {"A": "LoRA_2", "B": "LoRA_3", "C": "LoRA_1", "D": "constant", "E": "constant"},
    {"A": "vector", "B": "vector", "C": "vector", "D": "none", "E": "vector"},
    {"A": "constant", "B": "constant", "C": "none", "D": "vector", "E": "none"},
    {"A": "none", "B": "LoRA_3", "C": "none", "D": "none", "E": "constant"},
    {"A": "LoRA_1", "B": "none", "C": "LoRA_3", "D": "none", "E": "none"},
]


@pytest.mark.parametrize("up", range(len(PATHS)))
def test_glora(net, x, tmp_path, up):
    paths = {"layers.up": PATHS[up], "layers.down": PATHS[(up + 2) % len(PATHS)]}
    tensors = load_file(glora(tmp_path / "a", *paths.values()) / WEIGHTS)

    def support(name, letter, shape):
        choice = paths[name][letter]
        t = {k.rpartition(".")[2]: v.double() for k, v in tensors.items() if k.startswith(f"{name}.")}
        down = t[letter] if letter in "DE" else t[f"{letter}d"]
        if choice == "none":
            return torch.zeros(shape).double()
        if choice == "constant":
            return down.flatten()[0].expand(shape)
        if choice == "vector":
            return down if letter in "DE" else down[:, :1].expand(shape)
        k = int(choice.split("_")[1])
        return down[:, :k] @ t[f"{letter}u"][:k]

    def layer(name, x):
        W, b = net.get_submodule(name).weight, net.get_submodule(name).bias
        out, width = SITES[name]
        b = torch.zeros(out).double() if b is None else b
        new = W + W * support(name, "A", W.shape) + support(name, "B", W.shape)
        shift = b * support(name, "D", (out,)) + support(name, "E", (out,))
        return x @ new.T + b + shift + (W @ support(name, "C", (width, 1)))[:, 0]

    loaded = check(net, x, tmp_path / "a", run(net, x, layer), fg.GLoRA)
    torch.testing.assert_close(fg.merge(loaded)(x), run(net, x, layer), rtol=1e-6, atol=1e-6)
    if PATHS[up]["A"] == "LoRA_2":  # beside a B of rank 3: the third rank of A is empty on both sides, and stays so
        state = fg.adapter_state(loaded, "theirs")
        assert not state["layers.up.Ad"][:, 2:].any() and not state["layers.up.Au"][2:].any()
        assert state["layers.up.Ad"].shape == (11, 3)


def test_glora_that_stores_only_what_its_path_reads(net, x, tmp_path):
    folder = glora(tmp_path / "a", PATHS[3], PATHS[2])
    whole = fg.load_adapter(net, folder)(x)
    needed = {"up": ("Ad", "Bd", "D"), "down": ("Ad", "Bd", "Cd", "E")}
    tensors = load_file(folder / WEIGHTS)
    kept = {k: t for k, t in tensors.items() if k.split(".")[2] in needed[k.split(".")[1]]}
    assert len(kept) == 7
    write(folder, json.loads((folder / CONFIG).read_text()), kept)
    assert torch.equal(fg.load_adapter(net, folder)(x), whole)


@pytest.mark.parametrize("make", [hydralora, latent, prolora])
def test_a_head_that_was_trained_too(net, x, tmp_path, make):
    folder = make(tmp_path / "a")
    without = fg.load_adapter(net, folder)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    head = {"weight": torch.randn(3, 6), "bias": torch.randn(3)}
    write(folder, {**config, "modules_to_save": ["head"]}, {**tensors, **{f"{P}head.{k}": t for k, t in head.items()}})
    loaded = fg.load_adapter(net, folder)
    hidden = without.layers["down"](torch.tanh(without.layers["up"](x)))
    expected = hidden @ head["weight"].double().T + head["bias"].double()
    torch.testing.assert_close(loaded(x), expected)
    assert not torch.allclose(expected, without(x))


def test_second_adapter_and_half_precision(net, x, tmp_path):
    folder = latent(tmp_path / "a")
    both = fg.load_adapter(fg.rewrite(net, fg.Spec(fg.LoRA(2), ["head"])), folder, name="b")
    fg.set_active(both, ["b"])
    assert torch.equal(both(x), fg.load_adapter(net, folder)(x))
    tensors = {k: t.to(torch.bfloat16) for k, t in load_file(folder / WEIGHTS).items()}
    write(folder, json.loads((folder / CONFIG).read_text()), tensors)
    half = fg.load_adapter(net.float(), folder)
    assert {t.dtype for t in fg.adapter_state(half).values()} == {torch.float32}
