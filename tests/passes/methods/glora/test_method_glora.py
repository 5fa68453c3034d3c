"""GLoRA against a float64 oracle, HF PEFT and its merge."""

from __future__ import annotations

import copy
import itertools
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from glora_oracle import (
    BASES,
    IN,
    MAXIMAL,
    OUT,
    RANK,
    REPRESENTATIVE,
    Wrap,
    adapt,
    oracle,
    plain,
    randomise,
    site_tensors,
    wrapped,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxgraft as fg
from fxgraft.passes.methods.glora.glora import TENSORS, GLoRA, GLoRAPath
from fxgraft.passes.methods.glora.path import CHOICES, PATHS
from fxgraft.passes.methods.glora.supernet import fix_paths, set_paths
from fxgraft.rewriter.method import method_from_dict

torch.set_num_threads(1)


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
    assert "rank 5 of 6" in str(fg.explain(adapt(wrapped("linear"), None, rank=6)))


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
