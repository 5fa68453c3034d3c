"""Several active adapters with weights: `y = base(x) + sum of w_i delta_i(x)`, everywhere an adapted model goes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from methods import MERGEABLE, METHODS, graft
from small_models import noisy
from torch import nn

import fxgraft as fg

WEIGHTS = {"a": 0.7, "b": -0.2}
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def close(got: torch.Tensor, want: torch.Tensor, method: str = "") -> None:
    """Equal to rounding; Uni-LoRA's scales are float32 in a float64 model too."""
    rtol, atol = (1e-6, 1e-7) if method == "unilora" else (1e-9, 1e-10)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 8), nn.Linear(8, 3)).to(dtype).eval()


def two(method: fg.LoRA, base: nn.Module | None = None, targets=("0", "2"), second: fg.LoRA | None = None) -> nn.Module:  # type: ignore[no-untyped-def]
    model = noisy(graft(base or mlp(), fg.Spec(method, targets=targets), name="a"), "a", 1)
    return noisy(fg.rewrite(model, fg.Spec(second or fg.LoRA(rank=3), targets=targets), name="b"), "b", 2)


def layers(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """The adapted layers with these adapters active, each on its own."""
    twin = copy.deepcopy(model)
    fg.set_active(twin, names)
    return [twin[0], twin[2]]


def reference(model: nn.Module, weights: dict[str, float], x: torch.Tensor) -> torch.Tensor:
    """The sum written out: each adapter's own delta at the input that the layer has."""
    base = layers(model, [])
    alone = {name: layers(model, [name]) for name in weights}
    for index, layer in enumerate(base):
        y = layer(x)
        x = y + sum(weight * (alone[name][index](x) - y) for name, weight in weights.items())
        x = x.tanh() if index == 0 else x
    return model[3](x)


@pytest.mark.parametrize("method", METHODS)
def test_the_weighted_sum(method: str) -> None:
    model = two(METHODS[method])
    for weights in (WEIGHTS, {"b": 2.0, "a": 1.0}, {"a": -3.0}, {"a": 1.0, "b": 0.5}):
        fg.set_active(model, weights)
        assert fg.active_weights(model) == weights and fg.active(model) == list(weights)
        want = reference(model, weights, X)
        close(model(X), want, method)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), model(X)) and fg.active_weights(twin) == weights
        if method not in MERGEABLE:
            continue
        for merged in (fg.merge(model), fg.merge(model, weights), fg.merge(model, weights=weights),
                       fg.merge(model, list(weights), weights=list(weights.values()))):  # fmt: skip
            close(merged(X), want, method)
            assert type(merged[0]) is nn.Linear
    fg.set_active(model, ["a", "b"], weights=[0.7, -0.2])
    assert fg.active_weights(model) == WEIGHTS and "a x 0.7, b x -0.2" in str(fg.explain(model))
    fg.set_active(model, ["a"])
    assert fg.active_weights(model) == {"a": 1.0}
    close(model(X), reference(model, {"a": 1.0}, X), method)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_weighted_sum(method: str) -> None:
    model = two(METHODS[method])
    fg.set_active(model, WEIGHTS)
    reached = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(model(X).square().sum(), parameter, allow_unused=True)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                dict(twin.named_parameters())[name].add_(direction, alpha=step)
            values.append(reference(twin, WEIGHTS, X).square().sum().item())
        slope = (values[0] - values[1]) / 2e-5
        got = 0.0 if gradient is None else float((gradient * direction).sum())
        assert got == pytest.approx(slope, rel=1e-4, abs=1e-4), name
        reached += abs(slope) > 1e-3
    assert reached >= 4


@pytest.mark.parametrize("method", ["lora", "unilora", "hydralora", "glora", "supernet"])
def test_another_weight_compiles_nothing(method: str) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(gm, inputs):  # type: ignore[no-untyped-def]
        graphs.append(gm)
        return gm

    model = two(METHODS[method])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for weights in (WEIGHTS, {"a": 0.25, "b": 3.0}, {"a": -1.0, "b": 1.5}):
        fg.set_active(compiled, weights)
        close(compiled(X), reference(model, weights, X), method)
    assert len(graphs) == 1
    with fg.disabled(compiled):
        close(compiled(X), mlp()(X))
    assert len(graphs) == 2


def test_by_inductor_in_bfloat16_and_with_parts() -> None:
    torch._dynamo.reset()
    base = mlp(torch.float32)
    model = two(fg.LoRA(rank=2), base, targets=(fg.Target("0", 2, (1,)), "2"))
    x = X.float()
    fg.set_active(model, WEIGHTS)
    with torch.no_grad():
        want = reference(model, WEIGHTS, x)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fg.compile(model)(x), want, rtol=1e-4, atol=1e-5)
        half = copy.deepcopy(model).bfloat16()
        assert half(x.bfloat16()).dtype is torch.bfloat16
        torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), want, rtol=0.05, atol=0.05)


def test_a_trained_head_goes_between() -> None:
    base = mlp()
    model = noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets=["re:0"], train=["re:3"]), name="a"), "a", 1)
    assert isinstance(model[3], nn.Linear)
    for weight in (0.3, -1.0, 1.0):
        fg.set_active(model, {"a": weight})
        hidden = model[2](model[1](model[0](X)))
        head = fg.adapter_state(model, "a")
        between = [base[3].weight + weight * (head["3.weight"] - base[3].weight),
                   base[3].bias + weight * (head["3.bias"] - base[3].bias)]  # fmt: skip
        want = nn.functional.linear(hidden, *between)
        close(model(X), want)
        close(fg.merge(model)(X), want)
        close(torch.compile(model, backend="eager")(X), want)
        model(X).sum().backward()
        assert dict(model.named_parameters())["3.fxgraft.a.weight"].grad is not None
        with fg.disabled(model):
            assert torch.equal(model(X), base(X))
    nested = nn.Sequential(nn.Linear(10, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).double()
    deep = fg.rewrite(nested, fg.Spec(fg.LoRA(rank=2), targets=["re:0"], train=["re:1"]), name="a")
    want = deep(X)
    with pytest.raises(fg.AdapterError, match="no exact meaning"):
        fg.set_active(deep, {"a": 0.5})
    with pytest.raises(fg.MergeError, match="no exact meaning"):
        fg.merge(deep, {"a": 0.5})
    assert torch.equal(deep(X), want) and fg.active_weights(deep) == {"a": 1.0}


def test_merge_without_a_state_of_its_own() -> None:
    model = two(fg.LoRA(rank=2))
    for wrong in ({"a": 0.0}, {"a": float("nan")}, {"c": 1.0}):
        with pytest.raises(fg.FxgraftError):
            fg.merge(model, weights=wrong)
    with pytest.raises(fg.AdapterError, match="1 weights for 2"):
        fg.merge(model, ["a", "b"], weights=[1.0])
    fg.set_active(model, WEIGHTS)
    alone = fg.merge(model, ["a"])  # named: as it is, whatever weight it is active with
    close(alone(X), reference(model, {"a": 1.0}, X))


def test_exported_graphs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("onnxruntime")
    model, x = two(fg.LoRA(rank=2), mlp(torch.float32)), X.float()
    fg.set_active(model, WEIGHTS)
    want = reference(model, WEIGHTS, x)
    fg.export_onnx(model, tmp_path / "merged.onnx", (x,), adapters="merged")
    (got,) = fg.OrtSession(tmp_path / "merged.onnx").run({"input": x.numpy()}).values()
    torch.testing.assert_close(torch.as_tensor(got), want, rtol=1e-4, atol=1e-5)
    fg.set_active(model, {"a": 0.5})
    with pytest.raises(fg.FxgraftError, match=r"weight of 0\.5"):
        fg.export_onnx(model, tmp_path / "s.onnx", (x,), adapters="swappable")
    assert not (tmp_path / "s.onnx").exists()
    fg.export_onnx(model, tmp_path / "s.onnx", (x,), adapters="swappable", name="a")
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), reference(model, {"a": 0.5}, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(fg.AdapterError, match="weight"):
        fg.bank(model, {"t": model})
