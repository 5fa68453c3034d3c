"""Adapters as the methods' authors store them: folders built by hand, outputs against deltas computed by hand."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxgraft as fg

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
P = "base_model.model."


class Net(nn.Module):
    """Rectangular; `down` has no bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"up": nn.Linear(7, 11), "down": nn.Linear(11, 6, bias=False)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layers["down"](torch.tanh(self.layers["up"](x))))


SITES = {"layers.up": (11, 7), "layers.down": (6, 11)}  # out, in


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(4, 7, dtype=torch.float64)


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)
    return folder


def run(net, x, layer, head=None):
    """The network with `layer(name, x)` in place of its two linears."""
    hidden = layer("layers.down", torch.tanh(layer("layers.up", x)))
    return (head or net.head)(hidden)


def base(net, name, x):
    return net.get_submodule(name)(x)


def same_model(net, before):
    now = net.state_dict()
    return list(before) == list(now) and all(torch.equal(t, before[k]) for k, t in now.items())


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


# -- the folders ---------------------------------------------------------------------------------------------------
FORK = {"peft_type": "LORA", "target_modules": ["up", "down"], "lora_dropout": 0.0, "bias": "none", "task_type": None}


def hydralora(folder, experts=3):
    tensors = {}
    for site, (out, width) in SITES.items():
        tensors[f"{P}{site}.lora_route.weight"] = torch.randn(experts, width)
        tensors[f"{P}{site}.lora_A.weight"] = torch.randn(2, width)
        for i in range(experts):
            tensors[f"{P}{site}.lora_B{i}.weight"] = torch.randn(out, 2)
    config = {**FORK, "r": 2, "lora_alpha": 3, "lora_nums": experts, "merge_weights": False, "blc_alpha": 0.1}
    return write(folder, config, tensors)


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


def latent(folder, **config):
    tensors = {}
    for site, (out, width) in SITES.items():
        tensors[f"{P}{site}.lora_A.weight"] = torch.randn(3, width)
        tensors[f"{P}{site}.lora_B.weight"] = torch.randn(out, 3)
        tensors[f"{P}{site}.default_lora_latent_mapping.weight"] = torch.randn(3, 3)
    return write(folder, {**FORK, "r": 3, "lora_alpha": 5, **config}, tensors)


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


def prolora(folder, r=5, u=2, m=3, n=4, empty=False, **config):
    q, tensors = r - u, {}
    for site, (out, width) in SITES.items():
        if q or empty:
            tensors[f"{P}{site}.lora_A.default.weight"] = torch.randn(q, -(-width // m))
            tensors[f"{P}{site}.lora_B.default.weight"] = torch.randn(-(-out // n), q)
        if u or empty:
            tensors[f"{P}{site}.lora_A_vec.default"] = torch.randn(u, width)
            tensors[f"{P}{site}.lora_B_vec.default"] = torch.randn(u, out)
    config = {**FORK, "r": r, "lora_alpha": 8, "unshared_r": u, "reduce_lora_A_x": m, "reduce_lora_B_x": n, **config}
    return write(folder, config, tensors)


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


def unilora(folder, d=20):
    tensors = {"vector_bank": torch.randn(d)}
    for site, (out, width) in SITES.items():
        # uneven on purpose, and the last entry is used by nobody
        tensors[f"{site}.project_params_A"] = torch.randint(0, d - 1, (width, 3)) // 2 * 2
        tensors[f"{site}.project_params_B"] = torch.randint(0, d - 1, (3, out))
    return write(folder, {"method": "unilora", "rank": 3, "vector_length": d}, tensors)


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


FULL = {"A": "LoRA_3", "B": "LoRA_3", "C": "LoRA_3", "D": "vector", "E": "vector"}
PATHS = [
    FULL,
    {"A": "LoRA_2", "B": "LoRA_3", "C": "LoRA_1", "D": "constant", "E": "constant"},
    {"A": "vector", "B": "vector", "C": "vector", "D": "none", "E": "vector"},
    {"A": "constant", "B": "constant", "C": "none", "D": "vector", "E": "none"},
    {"A": "none", "B": "LoRA_3", "C": "none", "D": "none", "E": "constant"},
    {"A": "LoRA_1", "B": "none", "C": "LoRA_3", "D": "none", "E": "none"},
]


def glora(folder, up=FULL, down=FULL):
    tensors = {}
    for site, (out, width) in SITES.items():
        shapes = {"Ad": (out, 3), "Au": (3, width), "Bd": (out, 3), "Bu": (3, width)}
        shapes |= {"Cd": (width, 3), "Cu": (3, 1), "D": (out,), "E": (out,)}
        tensors |= {f"{site}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return write(folder, {"method": "glora", "rank": 3, "paths": {"layers.up": up, "layers.down": down}}, tensors)


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


# -- refusals ------------------------------------------------------------------------------------------------------
MAKERS = {"hydralora": hydralora, "latent": latent, "prolora": prolora, "unilora": unilora, "glora": glora}


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
