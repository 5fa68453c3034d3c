"""`fg.swap`: values come with the method they were trained under; what would be another adapter is refused."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import fxgraft as fg


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12))


def adapted(method: fg.LoRA, base: nn.Module | None = None, name: str = "default", seed: int = 1, **spec) -> nn.Module:  # type: ignore[no-untyped-def]
    result = fg.rewrite(base or model(), fg.Spec(method, **{"targets": ["0", "2"], **spec}), name=name)
    return noisy(result, name, seed)


def noisy(result: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in fg.adapter_state(result, name).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return result


PAIRS = {
    "alpha": (fg.LoRA(rank=2, alpha=4), fg.LoRA(rank=2, alpha=16)),
    "rslora": (fg.LoRA(rank=2, alpha=4), fg.LoRA(rank=2, alpha=4, rslora=True)),
    "rank": (fg.LoRA(rank=2), fg.LoRA(rank=3)),
    "lora_xs": (fg.LoRAXS(rank=2, alpha=4), fg.LoRAXS(rank=2, alpha=8)),
    "seed": (fg.UniLoRA(rank=2, vector_length=20, seed=1), fg.UniLoRA(rank=2, vector_length=20, seed=2)),
    "sampler": (fg.UniLoRA(rank=2, vector_length=20), fg.UniLoRA(rank=2, vector_length=20, sampler="uniform")),
    "chunks": (fg.PRoLoRA(rank=4, a_chunks=2, b_chunks=2), fg.PRoLoRA(rank=4, a_chunks=3, b_chunks=2)),
    "unshared": (fg.PRoLoRA(rank=4, a_chunks=2, b_chunks=2), fg.PRoLoRA(rank=4, a_chunks=2, b_chunks=2, alpha=2)),
    "experts": (fg.HydraLoRA(rank=2, alpha=4), fg.HydraLoRA(rank=2, alpha=8)),
    "path": (
        fg.GLoRA(rank=2, path=fg.GLoRAPath("vector", "none", "none", "none", "vector")),
        fg.GLoRA(rank=2, path=fg.GLoRAPath("none", "vector", "none", "none", "vector")),
    ),
    "kind": (fg.LoRAXS(rank=2, alpha=2), fg.LoRA(rank=2, alpha=2)),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_a_state_of_another_method_is_refused_and_nothing_is_written(case: str) -> None:
    mine, other = PAIRS[case]
    base = model()
    a, b = adapted(mine, base), adapted(other, base, seed=2)
    x, before = torch.randn(3, 12), {k: v.clone() for k, v in fg.adapter_state(a).items()}
    want = a(x)
    for value in (fg.adapter_state(b), b):
        with pytest.raises(fg.AdapterError, match="the state for adapter 'default' is of"):
            fg.swap(a, value)
    assert all(torch.equal(v, before[k]) for k, v in fg.adapter_state(a).items())
    assert torch.equal(a(x), want)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        (fg.LoRA(rank=4, alpha=8), fg.LoRA(rank=4, alpha=4, rslora=True, dropout=0.5)),  # both scale by 2
        (fg.UniLoRA(rank=2, vector_length=20, init_bound=0.1), fg.UniLoRA(rank=2, vector_length=20, dropout=0.1)),
        (fg.HydraLoRA(rank=2), fg.HydraLoRA(rank=2, dropout=0.1, per_expert_dropout=True)),
        (
            fg.GLoRA(rank=2, path=fg.GLoRAPath("vector", "none", "none", "none", "vector")),
            fg.GLoRA(rank=3, path=fg.GLoRAPath("vector", "none", "none", "none", "vector")),
        ),
    ],
)
def test_what_counts_in_training_only_does_not_matter(mine: fg.LoRA, other: fg.LoRA) -> None:
    base = model()
    a, b, x = adapted(mine, base).eval(), adapted(other, base, seed=2).eval(), torch.randn(3, 12)
    assert not torch.allclose(a(x), b(x))
    fg.swap(a, fg.adapter_state(b))
    assert torch.allclose(a(x), b(x), atol=1e-6)


def test_a_projection_is_of_its_sites() -> None:
    """Uni-LoRA's vector fits any model by its shape."""
    method = fg.UniLoRA(rank=2, vector_length=20)
    a = adapted(method)
    with pytest.raises(fg.AdapterError, match=r"without the site\(s\) '2'"):
        fg.swap(a, adapted(method, targets=["0"]))
    with pytest.raises(fg.AdapterError, match="'0' is 8 x 10 there"):
        fg.swap(a, adapted(method, nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 12))))
    turned = fg.AdapterState(fg.adapter_state(a), dict(reversed(fg.adapter_state(a).methods.items())))
    with pytest.raises(fg.AdapterError, match="another order"):
        fg.swap(a, turned)


def test_a_state_keeps_its_method_through_copies_and_files() -> None:
    a = adapted(fg.LoRA(rank=2, alpha=4), overrides={"2": fg.LoRA(rank=3, alpha=9)})
    state = fg.adapter_state(a)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for twin in (copy.copy(state), copy.deepcopy(state), state.copy(), torch.load(file)):
        assert isinstance(twin, fg.AdapterState) and twin.methods == state.methods
        assert twin.keys() == state.keys() and all(torch.equal(twin[k], state[k]) for k in state)
    assert type(dict(state)) is dict and type({**state}) is dict
    fg.swap(a, {k: v * 2 for k, v in state.items()})  # plain values are taken at their word


def test_a_file_of_a_state_opens_wherever_its_module_has_moved() -> None:
    """A pickle names `_rebuild` by its module, which was this one when the first files were written."""
    a = adapted(fg.LoRA(rank=2, alpha=4))
    state = fg.adapter_state(a)
    rebuild, arguments = state.__reduce__()
    assert (rebuild.__module__, rebuild.__qualname__) == ("fxgraft.rewriter.adapterstate", "_rebuild")
    assert arguments[1]["0"] == [{"method": "lora", **dataclasses.asdict(fg.LoRA(rank=2, alpha=4))}, 8, 12, 0]
    file = io.BytesIO()
    torch.save(state, file)
    assert b"fxgraft.rewriter.adapterstate" in file.getvalue()
    for weights_only in (True, False):
        file.seek(0)
        twin = torch.load(file, weights_only=weights_only)
        assert twin.methods == state.methods and all(torch.equal(twin[k], state[k]) for k in state)


@pytest.mark.parametrize("format", ["fxgraft", "peft"])
def test_swap_from_a_folder(tmp_path, format: str) -> None:  # type: ignore[no-untyped-def]
    base, x = model(), torch.randn(3, 12)
    a, b = adapted(fg.LoRA(rank=2), base), adapted(fg.LoRA(rank=2), base, name="other", seed=2)
    fg.save_adapter(b, tmp_path, "other", format=format)
    compiled = torch.compile(a, backend="eager")
    fg.swap(compiled, tmp_path)
    assert torch.allclose(a(x), b(x), atol=1e-6)
    fg.swap(a, str(tmp_path))
    with pytest.raises(fg.AdapterError, match="the scale would make"):
        fg.swap(adapted(fg.LoRA(rank=2, alpha=3), base), tmp_path)
    with pytest.raises(fg.CheckpointError):
        fg.swap(a, tmp_path / "nothing")
    with pytest.raises(fg.AdapterError, match="no adapter 'c'"):
        fg.swap(a, tmp_path, "c")


def test_swap_from_a_model_of_several() -> None:
    base, x = model(), torch.randn(3, 12)
    a = adapted(fg.LoRA(rank=2), base)
    one = adapted(fg.LoRA(rank=2), base, name="one", seed=2)
    fg.swap(a, one)
    assert torch.allclose(a(x), one(x), atol=1e-6)
    two = adapted(fg.LoRA(rank=2), one, name="two", seed=3)
    with pytest.raises(fg.AdapterError, match="'one', 'two'"):
        fg.swap(a, two)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: torch.full_like(t, float("nan")), "NaN or infinite"),
        (lambda t: torch.full_like(t, float("inf")), "NaN or infinite"),
        (lambda t: t.new_zeros(0), "of size 0"),
        (lambda t: t.half(), "cast it first"),
        (lambda t: t.int(), "int32"),
        (lambda t: t.to("meta"), "meta"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t.tolist(), "list"),
        (lambda t: None, "NoneType"),
        (lambda t: t[:1], r"\(1, "),
    ],
)
def test_values_that_do_not_fit(change, match: str) -> None:  # type: ignore[no-untyped-def]
    a, x = adapted(fg.LoRA(rank=2)), torch.randn(3, 12)
    want, state = a(x), fg.adapter_state(a)
    with pytest.raises(fg.AdapterError, match=match):
        fg.swap(a, {**state, "2.B": change(state["2.B"])})
    with pytest.raises(fg.AdapterError, match="lacks"):
        fg.swap(a, {"2.B": state["2.B"]})
    with pytest.raises(fg.AdapterError, match="give adapter_state"):
        fg.swap(a, 7)  # type: ignore[arg-type]
    assert torch.equal(a(x), want)
