"""GLoRA against a float64 oracle, HF PEFT, its own supernet and its merge."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import fxgraft as fg
from fxgraft.passes.methods.glora.glora import TENSORS, GLoRA, GLoRAPath
from fxgraft.passes.methods.glora.path import CHOICES, PATHS
from fxgraft.passes.methods.glora.supernet import fix_paths, get_paths, set_paths
from fxgraft.rewriter.method import method_from_dict

torch.set_num_threads(1)
IN, OUT, RANK = 6, 5, 2
MAXIMAL = GLoRAPath("lora", "lora", "lora", "vector", "vector")
REPRESENTATIVE = [
    MAXIMAL,
    GLoRAPath("lora", "vector", "vector", "constant", "none"),
    GLoRAPath("lora", "none", "none", "none", "constant"),
    GLoRAPath("vector", "lora", "vector", "vector", "constant"),
    GLoRAPath("vector", "constant", "none", "none", "none"),
    GLoRAPath("constant", "vector", "lora", "constant", "vector"),
    GLoRAPath("none", "constant", "none", "vector", "none"),
    GLoRAPath("none", "lora", "none", "none", "none"),
]


class MatmulBias(nn.Module):
    """A weight that is read as `x @ W + b`: the bias is added behind the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(IN, OUT)), nn.Parameter(torch.randn(OUT))

    def forward(self, x):
        return x @ self.weight + self.bias


BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "bias-free": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: nn.init.normal_((c := Conv1D(OUT, IN)).bias) is not None and c,
    "matmul": MatmulBias,
}


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def wrapped(base: str, dtype: torch.dtype = torch.float64) -> Wrap:
    torch.manual_seed(0)
    return Wrap(BASES[base]()).to(dtype)


def adapt(model: nn.Module, path: GLoRAPath | None, rank: int = RANK, targets=("layer",), seed: int = 1) -> nn.Module:
    adapted = fg.rewrite(model, fg.Spec(GLoRA(rank=rank, path=path), targets=list(targets)))
    randomise(adapted, seed)
    return adapted


def randomise(adapted: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in fg.adapter_state(adapted).values():
        value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.5)


def plain(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `(out, in)` and bias of a base, float64."""
    weight = layer.weight.detach().double()
    weight = weight if isinstance(layer, nn.Linear) else weight.t()
    return weight, None if layer.bias is None else layer.bias.detach().double()


def oracle(weight, bias, path: GLoRAPath, full: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`W` and `b` by the definition, entry by entry, from the SUPERNET's tensors of one site."""
    out, inner = weight.shape
    t = {name: value.detach().double() for name, value in full.items()}

    def matrix(name: str, rows: int, columns: int) -> torch.Tensor:
        choice = getattr(path, name)
        result = torch.zeros(rows, columns, dtype=torch.float64)
        for i, j in itertools.product(range(rows), range(columns)):
            if choice == "lora":
                result[i, j] = sum(t[name + "d"][i, k] * t[name + "u"][k, j] for k in range(t[name + "d"].shape[1]))
            elif choice == "vector":
                result[i, j] = t[name + "d"][i, 0]
            elif choice == "constant":
                result[i, j] = t[name + "d"][0, 0]
        return result

    def line(name: str) -> torch.Tensor:
        choice = getattr(path, name)
        value = {"vector": lambda i: t[name][i], "constant": lambda i: t[name][0], "none": lambda i: torch.tensor(0.0)}
        return torch.stack([value[choice](i).double() for i in range(out)])

    b0 = torch.zeros(out, dtype=torch.float64) if bias is None else bias
    b = b0 + (0 if bias is None else b0 * line("D")) + line("E") + (weight @ matrix("C", inner, 1))[:, 0]
    return weight + weight * matrix("A", out, inner) + matrix("B", out, inner), b


def site_tensors(adapted: nn.Module, site: str = "layer") -> dict[str, torch.Tensor]:
    return {k.removeprefix(site + "."): v for k, v in fg.adapter_state(adapted).items()}


class Many(nn.Module):
    """One layer per path."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BASES[base]() for _ in PATHS)

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


@pytest.mark.parametrize("base", BASES)
def test_all_paths_match_the_oracle_fixed_supernet_and_merged(base):
    torch.manual_seed(0)
    model = Many(base).double().eval()
    sites = [f"layers.{i}" for i in range(len(PATHS))]
    supernet = adapt(model, None, targets=["all-linear"] if base != "matmul" else ["re:layers\\.\\d+"])
    paths = dict(zip(sites, PATHS, strict=True))
    set_paths(supernet, paths)
    fixed = fix_paths(supernet, paths)
    merged = fg.merge(fixed)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    state = fg.adapter_state(supernet)
    expected = []
    for site, layer, path in zip(sites, model.layers, PATHS, strict=True):
        full = {name: state[f"{site}.{name}"] for name in TENSORS if f"{site}.{name}" in state}
        weight, bias = oracle(*plain(layer), path, full)
        expected.append(x @ weight.t() + bias)
    expected = torch.stack(expected)
    assert (expected - model(x)).abs().amax((1, 2, 3)).count_nonzero() >= 400  # not a comparison of no-ops
    for result in (supernet(x), fixed(x), merged(x)):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    assert not any("fxgraft" in name for name, _ in merged.named_modules())


def test_float32_is_within_1e_5():
    for base, path in itertools.product(BASES, REPRESENTATIVE):
        model = wrapped(base, torch.float32)
        supernet = adapt(model, None)
        fixed = fix_paths(supernet, {"layer": path})
        x = torch.randn(4, IN)
        weight, bias = oracle(*plain(model.layer), path, site_tensors(supernet))
        expected = x.double() @ weight.t() + bias
        assert (fixed(x) - expected).norm() <= 1e-5 * expected.norm(), (base, path)


@pytest.mark.parametrize("path", PATHS[:: len(PATHS) // 12], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_bit_for_bit(base, path):
    model = wrapped(base, torch.float32)
    x = torch.randn(3, IN)
    for config in (GLoRA(rank=RANK, path=path), GLoRA(rank=RANK)):
        adapted = fg.rewrite(model, fg.Spec(config, targets=["layer"]))
        assert torch.equal(adapted(x), model(x))


def test_initial_values():
    adapted = fg.rewrite(Wrap(nn.Linear(300, 200)), fg.Spec(GLoRA(rank=4), targets=["layer"]))
    t = site_tensors(adapted)
    for name in ("Ad", "Bd", "Cd", "D", "E"):
        assert not t[name].any()
    for name, bound in (("Au", (6 / 304) ** 0.5), ("Bu", (6 / 304) ** 0.5), ("Cu", (6 / 5) ** 0.5)):
        assert 0 < t[name].abs().max() <= bound
    assert t["Au"].abs().max() > 0.95 * (6 / 304) ** 0.5


@pytest.mark.parametrize("path", REPRESENTATIVE, ids=str)
@pytest.mark.parametrize("base", ["linear", "Conv1D", "matmul"])
def test_gradients(base, path):
    adapted = adapt(wrapped(base), path)
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    values = [dict(adapted.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(adapted, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values), atol=1e-4)


def test_supernet_gradients_on_and_off_the_path():
    adapted = adapt(wrapped("linear"), None).eval()
    x = torch.randn(4, IN, dtype=torch.float64)
    for path in REPRESENTATIVE:
        fixed = fix_paths(adapted, {"layer": path})
        set_paths(adapted, {"layer": path})
        grads = {}
        for model in (adapted, fixed):
            model.zero_grad()
            model(x).pow(2).sum().backward()
            grads[model] = {n.rpartition(".")[2]: p.grad for n, p in model.named_parameters() if p.requires_grad}
        for name, value in grads[adapted].items():
            expected = torch.zeros_like(value)
            if name in grads[fixed]:
                expected[tuple(slice(n) for n in grads[fixed][name].shape)] = grads[fixed][name]
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_unfrozen_base_weight_gets_its_gradient():
    adapted = adapt(wrapped("linear"), MAXIMAL)
    adapted.layer.weight.requires_grad_(True)
    x = torch.randn(4, IN, dtype=torch.float64)
    adapted(x).pow(2).sum().backward()
    t = site_tensors(adapted)
    weight = adapted.layer.weight.detach().clone().requires_grad_()
    W, b = weight, adapted.layer.bias
    bias = b + b * t["D"] + t["E"] + (W @ t["Cd"] @ t["Cu"])[:, 0]
    F.linear(x, W + W * (t["Ad"] @ t["Au"]) + t["Bd"] @ t["Bu"], bias).pow(2).sum().backward()
    torch.testing.assert_close(adapted.layer.weight.grad, weight.grad)


def test_no_tensor_of_the_weights_size_is_saved_for_backward():
    model = Wrap(nn.Linear(64, 64))
    adapted = adapt(model, GLoRAPath("lora", "lora", "none", "none", "none"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(torch.randn(2, 64))
    own = {model.layer.weight.data_ptr()}
    assert saved and not [t.shape for t in saved if t.numel() >= 64 * 64 and t.data_ptr() not in own]


@pytest.mark.parametrize("path", [None, *REPRESENTATIVE], ids=str)
def test_eager_runs_one_full_product_forward(path):
    adapted = adapt(Wrap(nn.Linear(64, 48)), path, rank=1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapted(torch.randn(100, 64))
    full = 2 * 100 * 64 * 48
    assert full <= counter.get_total_flops() < 1.2 * full


def test_a_low_rank_a_needs_one_weight_gradient_and_others_none():
    full = 2 * 200 * 64 * 64
    for path, products in ((MAXIMAL, 3), (GLoRAPath("vector", "lora", "lora", "vector", "vector"), 2)):
        adapted = adapt(Wrap(nn.Linear(64, 64)), path, rank=1)
        x = torch.randn(200, 64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            adapted(x).sum().backward()
        assert products * full <= counter.get_total_flops() < (products + 0.25) * full


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(IN, 3 * OUT)

    def forward(self, x):
        return self.qkv(x)


@pytest.mark.parametrize("path", [None, *REPRESENTATIVE, GLoRAPath(*["none"] * 5)], ids=str)
def test_parts_of_a_fused_weight(path):
    torch.manual_seed(0)
    model = Fused().double()
    spec = fg.Spec(GLoRA(rank=RANK, path=path), targets=[fg.Target("qkv", parts=3, select=(0, 2))])
    adapted = fg.rewrite(model, spec).eval()
    randomise(adapted)
    x = torch.randn(2, 4, IN, dtype=torch.float64, requires_grad=True)
    path = path or MAXIMAL
    supernet = fg.rewrite(model, fg.Spec(GLoRA(rank=RANK), targets=spec.targets))
    randomise(supernet)
    if adapted is not supernet and fg.adapter_state(adapted).keys() != fg.adapter_state(supernet).keys():
        adapted = fix_paths(supernet, {"qkv[0]": path, "qkv[2]": path})
    expected = model(x).clone()
    for part in (0, 2):
        rows = slice(part * OUT, (part + 1) * OUT)
        weight, bias = oracle(
            model.qkv.weight.detach()[rows], model.qkv.bias.detach()[rows], path, site_tensors(supernet, f"qkv[{part}]")
        )
        expected[..., rows] = x @ weight.t() + bias
    torch.testing.assert_close(adapted(x), expected)
    grad, wanted = (torch.autograd.grad(y.pow(2).sum(), x)[0] for y in (adapted(x), expected))
    torch.testing.assert_close(grad, wanted)
    assert all(p.grad is None for p in adapted.parameters())
    if path != GLoRAPath(*["none"] * 5):
        adapted(x).sum().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        torch.testing.assert_close(fg.merge(adapted if path != MAXIMAL else fix_paths(
            supernet, {"qkv[0]": path, "qkv[2]": path}))(x), expected)  # fmt: skip


@pytest.mark.parametrize("path", [None, MAXIMAL, GLoRAPath("vector", "lora", "none", "constant", "vector")], ids=str)
def test_deltas_of_several_adapters_add_up_in_any_order(path):
    model = wrapped("linear")
    x = torch.randn(3, IN, dtype=torch.float64)
    glora = adapt(model, path).eval()
    both = fg.rewrite(glora, fg.Spec(fg.LoRA(rank=RANK), targets=["layer"]), name="lora").eval()
    for value in fg.adapter_state(both, "lora").values():
        value.normal_()
    delta = glora(x) - model(x)
    fg.set_active(both, ["lora"])
    expected = both(x) + delta
    for order in (["lora", "default"], ["default", "lora"]):
        fg.set_active(both, order)
        torch.testing.assert_close(both(x), expected)


# -- supernet ------------------------------------------------------------------------------------------------------
def drawn(adapted: nn.Module, count: int) -> list[int]:
    """Which paths training forwards took, recognised by their outputs."""
    x = torch.randn(5, IN, dtype=torch.float64)
    outputs = []
    adapted.eval()
    for path in PATHS:
        set_paths(adapted, {"layer": path})
        outputs.append(adapted(x).detach().flatten())
    table = torch.stack(outputs)
    adapted.train()
    with torch.no_grad():
        return [int((table - adapted(x).flatten()).abs().amax(1).argmin()) for _ in range(count)]


def test_training_draws_uniform_paths():
    adapted = adapt(wrapped("linear"), None)
    torch.manual_seed(3)
    found = drawn(adapted, 4000)
    for tensor, choices in CHOICES.items():
        counts = [sum(getattr(PATHS[i], tensor) == choice for i in found) for choice in choices]
        expected = 4000 / len(choices)
        assert sum((c - expected) ** 2 / expected for c in counts) < 16.3, (tensor, counts)  # p = 0.001 at 3 dof
    chi = sum((found.count(i) - 4000 / 432) ** 2 / (4000 / 432) for i in range(432))
    assert 300 < chi < 580  # 431 degrees of freedom: 431 ± 5 sigma
    assert len(set(found)) > 420


def test_draws_are_reproducible_and_fresh_per_site():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, OUT)}).double()
    model["b"].load_state_dict(model["a"].state_dict())

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model["a"], model["b"]

        def forward(self, x):
            return torch.stack([self.a(x), self.b(x)])

    supernet = adapt(Twins(), None, targets=["a", "b"]).train()
    state = fg.adapter_state(supernet)
    fg.swap(supernet, {key: state["a." + key.split(".")[1]].clone() for key in state})
    x = torch.randn(3, IN, dtype=torch.float64)

    def run():
        torch.manual_seed(7)
        return torch.stack([supernet(x) for _ in range(20)])

    first = run()
    assert torch.equal(first, run())
    assert sum(torch.equal(y[0], y[1]) for y in first) <= 2  # the sites draw on their own
    assert len({y[0].sum().item() for y in first}) > 15  # and anew at every forward


def test_gradient_checkpointing_recomputes_the_same_path():
    supernet = adapt(wrapped("linear"), None).train()
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def grads(call):
        wanted = [x, *(p for p in supernet.parameters() if p.requires_grad)]
        result = []
        for seed in range(10):
            torch.manual_seed(seed)
            result += torch.autograd.grad(call(x).pow(2).sum(), wanted)
        return result

    checkpointed = grads(lambda x: torch.utils.checkpoint.checkpoint(supernet, x, use_reentrant=False))
    for one, other in zip(grads(supernet), checkpointed, strict=True):
        assert torch.equal(one, other)


def test_compiled_supernet_is_not_compiled_anew_for_another_path():
    torch._dynamo.reset()
    model = wrapped("linear")
    supernet = adapt(model, None)
    compiled = torch.compile(supernet, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    compiled.train()
    compiled(x).sum().backward()
    frames = counters["stats"]["unique_graphs"]
    outputs = {compiled(x).sum().item() for _ in range(20)}
    assert len(outputs) > 15 and counters["stats"]["unique_graphs"] == frames
    compiled.eval()
    compiled(x)
    frames = counters["stats"]["unique_graphs"]
    for path in PATHS[::40]:
        set_paths(supernet, {"layer": path})
        torch.testing.assert_close(compiled(x), supernet(x))
        weight, bias = oracle(*plain(model.layer), path, site_tensors(supernet))
        torch.testing.assert_close(compiled(x), x @ weight.t() + bias)
    assert counters["stats"]["unique_graphs"] == frames


def test_exports_and_decomposes():
    for path in (MAXIMAL, REPRESENTATIVE[3], REPRESENTATIVE[5], None):
        adapted = adapt(wrapped("linear"), path).eval()
        x = torch.randn(3, IN, dtype=torch.float64)
        program = torch.export.export(adapted, (x,), strict=False)
        ours = [n for n in program.graph.nodes if str(n.target).startswith("fxgraft.")]
        assert len(ours) == 1
        plain_program = program.run_decompositions()
        assert not [n for n in plain_program.graph.nodes if str(n.target).startswith("fxgraft.")]
        torch.testing.assert_close(plain_program.module()(x), adapted(x))


def test_autocast_and_narrow_bases_train():
    for path in (None, *REPRESENTATIVE[:6]):
        adapted = adapt(wrapped("linear", torch.float32), path).train()
        x = torch.randn(4, IN, requires_grad=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = adapted(x)
        y.float().sum().backward()
        torch.manual_seed(0)
        torch.testing.assert_close(y.float(), adapted(x), rtol=0.1, atol=0.2)
        assert x.grad is not None and all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        narrow = adapt(wrapped("linear", torch.bfloat16), path).train()
        y = narrow(x.detach().bfloat16())
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert {p.grad.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}


# -- config, counts, merge -----------------------------------------------------------------------------------------
def test_config_round_trip_and_errors():
    config = GLoRA(rank=3, path=REPRESENTATIVE[1])
    assert method_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert method_from_dict(json.loads(json.dumps(GLoRA().to_dict()))) == GLoRA(rank=4, path=None)
    assert len(set(PATHS)) == 432 and all(PATHS[p.index] == p for p in PATHS) and PATHS[0] == MAXIMAL
    with pytest.raises(fg.SpecError, match="rank=0"):
        GLoRA(rank=0)
    with pytest.raises(fg.SpecError, match="C='constant'"):
        GLoRAPath("lora", "lora", "constant", "none", "none")
    with pytest.raises(fg.SpecError, match="keys"):
        GLoRA(path={"A": "lora"})
    with pytest.raises(fg.SpecError, match="GLoRAPath"):
        GLoRA(path="lora")
    with pytest.warns(UserWarning, match="rank is at most 5"):
        adapt(wrapped("linear"), None, rank=6)


@pytest.mark.parametrize("rank, expected", [(2, 884_832), (4, 1_603_776), (8, 3_041_664)])
def test_vit_b_supernet_maximum(rank, expected):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(768, 2304), nn.Linear(768, 768)
            self.fc1, self.fc2 = nn.Linear(768, 3072), nn.Linear(3072, 768)

        def forward(self, x):
            return self.fc2(self.fc1(self.proj(self.qkv(x)[..., :768])))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with torch.device("meta"):
        model = Blocks()
    for path in (None, MAXIMAL):
        adapted = fg.rewrite(model, fg.Spec(GLoRA(rank=rank, path=path), targets=["qkv", "proj", "fc1", "fc2"]))
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("base", ["linear", "bias-free"])
def test_a_fixed_path_trains_only_what_it_uses(base):
    supernet = adapt(wrapped(base), None)
    bias = base == "linear"
    sizes = {"A": {"lora": RANK * (IN + OUT), "vector": OUT, "constant": 1, "none": 0}}
    sizes |= {"B": sizes["A"], "C": {"lora": RANK * IN + RANK, "vector": IN, "none": 0}}
    sizes |= {"E": {"vector": OUT, "constant": 1, "none": 0}}
    sizes |= {"D": sizes["E"] if bias else dict.fromkeys(sizes["E"], 0)}
    for path in PATHS[::7]:
        fixed = fix_paths(supernet, {"layer": path})
        expected = sum(sizes[tensor][getattr(path, tensor)] for tensor in "ABCDE")
        assert path.parameters(IN, OUT, RANK, bias) == expected
        assert sum(p.numel() for p in fixed.parameters() if p.requires_grad) == expected


def test_merge_gives_a_bias_free_base_its_bias():
    model = wrapped("bias-free", torch.float32)
    adapted = adapt(model, GLoRAPath("none", "none", "vector", "vector", "vector"))
    merged = fg.merge(adapted)
    x = torch.randn(3, IN)
    assert merged.layer.bias is not None and model.layer.bias is None and adapted.layer.bias is None
    torch.testing.assert_close(merged(x), adapted(x))
    assert (merged(x) - model(x)).abs().max() > 0.1
    without = fg.merge(adapt(model, GLoRAPath("lora", "none", "none", "vector", "none")))
    assert without.layer.bias is None


def test_supernets_and_low_rank_conversion_are_refused():
    with pytest.raises(fg.MergeError, match="fix_paths"):
        fg.merge(adapt(wrapped("linear"), None))
    with pytest.raises(fg.MergeError, match="elementwise"):
        GLoRA(path=MAXIMAL).factors({}, {})


def test_copies_keep_their_own_paths():
    supernet = adapt(wrapped("linear"), None)
    twins = [fg.rewrite(supernet, fg.Spec(fg.LoRA(rank=1), targets=["layer"]), name="other"), copy.deepcopy(supernet)]
    set_paths(supernet, {"layer": PATHS[17]})
    assert get_paths(supernet) == {"layer": PATHS[17]}
    assert [get_paths(twin) for twin in twins] == [{"layer": MAXIMAL}] * 2


# -- HF PEFT -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ab", CHOICES["A"])
@pytest.mark.parametrize("c, de", [("lora", "vector"), ("vector", "constant"), ("none", "none")])
def test_agrees_with_peft(ab, c, de):
    """On a base with a bias. On a bias-free one PEFT drops C, D and E; here E + W0 C become its bias."""
    peft = pytest.importorskip("peft", "0.21")
    model = wrapped("linear", torch.float32)
    adapted = adapt(model, GLoRAPath(ab, ab, c, de, de))
    config = peft.GloraConfig(r=RANK, config_A_B=ab, config_C=c, config_D_E=de, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    layer = theirs.base_model.model.layer
    for name, value in site_tensors(adapted).items():
        holder = getattr(layer, f"glora_{name[0]}")["default"]
        target = getattr(holder, f"X{name[1:]}", None) if name[1:] and hasattr(holder, "Xd") else holder.X
        target.data.copy_(value.reshape(target.shape))
    x = torch.randn(2, 3, IN)
    expected = theirs(x)
    if (ab, c, de) != ("none", "none", "none"):
        assert (expected - model(x)).abs().max() > 0.01
    assert (adapted(x) - expected).norm() <= 1e-5 * expected.norm()
