"""`set_active`, `disabled` and `remove`: whom they reach, what they leave alone, and that they are all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxgraft as fg
from fxgraft.rewriter import graft


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


def noisy(adapted: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for tensor in fg.adapter_state(adapted, name).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return adapted


def adapted(**spec) -> tuple[nn.Module, nn.Module]:  # type: ignore[no-untyped-def]
    base = model()
    spec = {"targets": ["0", "2"], "train": ["4"], **spec}
    return base, noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), **spec)))


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))


# -- disabled ----------------------------------------------------------------------------------------------------
def test_disabled_holds_for_its_thread_alone() -> None:
    base, a = adapted()
    want, plain, wrong = a(X), base(X), []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        wrong.extend(not torch.equal(a(X), want) for _ in range(20))
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fg.disabled(a):
        inside.set()
        assert done.wait(10)
        assert torch.equal(a(X), plain)
    thread.join()
    assert wrong == [False] * 20
    assert torch.equal(a(X), want) and fg.active(a) == ["default"]


def test_blocks_that_overlap_leave_the_adapters_on() -> None:
    _, a = adapted()
    want, turn = a(X), threading.Barrier(2)

    def run(pause: float) -> None:
        with fg.disabled(a):
            turn.wait()
            time.sleep(pause)

    threads = [threading.Thread(target=run, args=(pause,)) for pause in (0, 0.05)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert fg.active(a) == ["default"] and torch.equal(a(X), want)


def test_nested_blocks_and_other_models() -> None:
    base, a = adapted()
    b = fg.rewrite(a, fg.Spec(fg.LoRA(rank=2), targets=["0"]), name="b")
    fg.set_active(b, ["default"])
    want, plain = a(X), base(X)
    with fg.disabled(a):
        twin = copy.deepcopy(a)
        with fg.disabled(a):
            assert torch.equal(a(X), plain)
        assert torch.equal(a(X), plain)
        assert torch.equal(b(X), want) and torch.equal(twin(X), want)  # other models
        with fg.disabled(b):
            assert torch.equal(b(X), plain)
        with pytest.raises(ValueError, match="inside"), fg.disabled(a):
            raise ValueError("inside")
        assert torch.equal(a(X), plain)
    assert torch.equal(a(X), want)


def test_tasks_of_one_thread_do_not_see_each_others_block() -> None:
    base, a = adapted()
    want, plain = a(X), base(X)

    async def off() -> bool:
        with fg.disabled(a):
            await asyncio.sleep(0.01)
            there = await asyncio.to_thread(a, X)
            return torch.equal(a(X), plain) and torch.equal(there, plain)

    async def on() -> bool:
        await asyncio.sleep(0.005)
        return torch.equal(a(X), want)

    async def both() -> list[bool]:
        return await asyncio.gather(off(), on())

    assert asyncio.run(both()) == [True, True]
    with fg.disabled(a):
        assert torch.equal(contextvars.Context().run(a, X), want)


def test_a_generator_closed_elsewhere_leaves_nothing_behind() -> None:
    _, a = adapted()
    want = a(X)

    def steps():  # type: ignore[no-untyped-def]
        with fg.disabled(a):
            yield

    running = steps()
    contextvars.copy_context().run(next, running)
    assert torch.equal(a(X), want)
    running.close()
    assert torch.equal(a(X), want)


def test_disabled_writes_nothing_on_the_model() -> None:
    _, a = adapted()
    before = {n: (type(m), {k: id(v) for k, v in m.__dict__.items()}) for n, m in a.named_modules()}
    flags = {n: p.requires_grad for n, p in a.named_parameters()}
    with fg.disabled(a):
        assert {n: (type(m), {k: id(v) for k, v in m.__dict__.items()}) for n, m in a.named_modules()} == before
        assert {n: p.requires_grad for n, p in a.named_parameters()} == flags
        fg.set_active(a, [])  # from inside: counts after the block
    assert fg.active(a) == []


@pytest.mark.parametrize("compiler", [fg.compile, lambda m: torch.compile(m, fullgraph=True, backend="eager")])
def test_a_compiled_model_inside_the_block(compiler) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    base, a = adapted()
    compiled = compiler(a)
    want, plain = a(X).detach(), base(X).detach()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(X), want, atol=1e-5)
            with fg.disabled(compiled):
                assert torch.allclose(compiled(X), plain, atol=1e-5)
                got = contextvars.Context().run(compiled, X)
            assert torch.allclose(got, want, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_again_what_the_forward_saw(reentrant: bool) -> None:
    base, a = adapted()
    a = nn.Sequential(a, nn.Tanh())
    base = nn.Sequential(base, nn.Tanh())
    x = X.clone().requires_grad_()

    def run(model: nn.Module, inner: bool = False) -> torch.Tensor:
        def function(v: torch.Tensor) -> torch.Tensor:
            return checkpoint(model, v, use_reentrant=reentrant) if inner else model(v)

        return checkpoint(function, x, use_reentrant=reentrant)

    def gradient(loss: torch.Tensor, thread: bool = False) -> torch.Tensor:
        x.grad = None
        if thread:  # as on a GPU, whose backward runs in a thread of its own
            other = threading.Thread(target=loss.sum().backward)
            other.start()
            other.join()
        else:
            loss.sum().backward()
        assert x.grad is not None
        return x.grad

    on, off = gradient(a(x)), gradient(base(x))
    assert not torch.allclose(on, off, atol=1e-2)
    assert torch.allclose(gradient(run(a)), on, atol=1e-6)
    for inner in (False, True):
        for thread in (False, True):
            with fg.disabled(a[0]):
                plain = run(a, inner)
            assert torch.allclose(gradient(plain, thread), off, atol=1e-6)
        with fg.disabled(a[0]):
            assert torch.allclose(gradient(run(a, inner)), off, atol=1e-6)
            assert torch.allclose(gradient(run(a, inner), thread=True), off, atol=1e-6)
    with torch.no_grad(), fg.disabled(a[0]):
        assert torch.equal(run(a), base(X))
    loss = run(a).sum()
    with fg.disabled(a[0]), pytest.raises(fg.AdapterError, match="outside the block"):
        loss.backward()


class Checkpointed(nn.Module):
    """Two blocks, each computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_layer_is_computed_again_as_the_forward_saw_it(reentrant: bool, wrapped: bool) -> None:
    torch._dynamo.reset()
    base = Checkpointed(reentrant)
    a = noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets="all-linear")))

    def gradient(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, x)[0] if not reentrant else (loss.backward(), x.grad)[1]

    def of(model: nn.Module, off: bool = False) -> torch.Tensor:
        x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
        with fg.disabled(model) if off else contextlib.nullcontext():
            loss = model(x).square().sum()
        return gradient(loss, x)

    on, plain = of(a), of(base)
    assert not torch.allclose(on, plain, atol=1e-2)
    for index, block in enumerate(a.blocks):
        if wrapped:
            a.blocks[index] = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(of(a), on)
        torch.testing.assert_close(of(a, off=True), plain)
    twin = pickle.loads(pickle.dumps(a)) if not wrapped else copy.deepcopy(a)
    torch.testing.assert_close(of(twin, off=True), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_model_is_computed_again_as_the_forward_saw_it(reentrant: bool) -> None:
    torch._dynamo.reset()
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    a = torch.compile(noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets="all-linear"))), backend="eager")

    def of(model: nn.Module, off: bool = False) -> Any:
        x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
        with fg.disabled(model) if off else contextlib.nullcontext():
            loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        loss.backward()
        return x.grad

    on = of(a)
    torch.testing.assert_close(of(a, off=True), of(base))
    torch.testing.assert_close(of(a), on)


def test_a_compilation_in_another_thread_is_not_ours(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """torch's flag that something is compiled is the process's, and guards are for the calls of this thread."""
    base, a = adapted()
    b = fg.bank(base, {"t": noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets=["0"])))})
    want = b(X, adapter_ids=fg.adapter_ids(b, ["t"] * 6))
    again = fg.bank(base, {"t": fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets=["0"]))})
    fg.add_tenant(again, "t", noisy(fg.rewrite(base, fg.Spec(fg.LoRA(rank=2), targets=["0"]))))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert torch.equal(again(X, adapter_ids=fg.adapter_ids(again, ["t"] * 6)), want)
    x = X.clone().requires_grad_()
    with fg.disabled(a):
        y = checkpoint(a, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(got, torch.autograd.grad(base(x).sum(), x)[0], atol=1e-6)


def test_disabled_refuses_replicas_in_threads() -> None:
    _, a = adapted()
    with pytest.raises(fg.AdapterError, match="DataParallel"), fg.disabled(nn.DataParallel(a)):
        pass
    with pytest.raises(fg.AdapterError, match="has no adapter"), fg.disabled(model()):
        pass


# -- requires_grad -----------------------------------------------------------------------------------------------
def test_what_the_user_froze_stays_frozen() -> None:
    _, a = adapted()
    a = fg.rewrite(a, fg.Spec(fg.LoRA(rank=2), targets=["0"]), name="b")
    fg.set_active(a, ["default"])
    frozen = {"0.A", "4.bias"}
    mine = {n: p for n, p in a.named_parameters() if ".default." in n}
    for name, p in mine.items():
        if name.replace(".fxgraft.default", "") in frozen:
            p.requires_grad_(False)
    assert sum(not p.requires_grad for p in mine.values()) == 2
    flags = {n: p.requires_grad for n, p in a.named_parameters()}
    fg.set_active(a, ["default"])
    with fg.disabled(a):
        pass
    assert {n: p.requires_grad for n, p in a.named_parameters()} == flags
    for names in ([], ["b"], []):
        fg.set_active(a, names)
        assert not any(p.requires_grad for p in mine.values())
        a = pickle.loads(pickle.dumps(copy.deepcopy(a)))
        mine = {n: p for n, p in a.named_parameters() if ".default." in n}
    fg.set_active(a, {"default": 0.5})
    assert {n: p.requires_grad for n, p in a.named_parameters()} == flags
    fg.set_active(a, ["b", "default"])
    assert all(p.requires_grad for n, p in a.named_parameters() if ".b." in n)
    assert {n: p.requires_grad for n, p in mine.items()} == {n: flags[n] for n in mine}


# -- all or nothing ----------------------------------------------------------------------------------------------
def test_a_switch_that_fails_has_changed_nothing(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _, a = adapted()
    a = noisy(fg.rewrite(a, fg.Spec(fg.LoRA(rank=3), targets=["0", "2"]), name="b"), "b", 2)
    want, types = a(X), [type(m) for m in a.modules()]
    flags = {n: p.requires_grad for n, p in a.named_parameters()}
    real, calls = graft.class_for, []

    def failing(owner, *rest):  # type: ignore[no-untyped-def]
        calls.append(owner)
        if len(calls) == 2:
            raise fg.CaptureError("no class for this one")
        return real(owner, *rest)

    monkeypatch.setattr(graft, "class_for", failing)
    for names in (["default"], [], {"default": 2.0, "b": 0.5}):
        calls.clear()
        with pytest.raises(fg.CaptureError, match="no class"):
            fg.set_active(a, names)
        assert torch.equal(a(X), want) and fg.active(a) == ["b"] and [type(m) for m in a.modules()] == types
        assert {n: p.requires_grad for n, p in a.named_parameters()} == flags
    calls.clear()
    with pytest.raises(fg.CaptureError, match="no class"):
        fg.remove(a, "b")
    assert torch.equal(a(X), want) and fg.active(a) == ["b"]


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["nobody"], "no adapter 'nobody'"),
        ("default", "give a list"),
        (["default", "default"], "at most once"),
        ({"default": 0}, "other than 0"),
        ({"default": float("nan")}, "other than 0"),
        ({"default": float("inf")}, "other than 0"),
        ({"default": True}, "other than 0"),
        ({"default": "1"}, "other than 0"),
        ({"default": None}, "other than 0"),
        ({"nobody": 1.0}, "no adapter 'nobody'"),
    ],
)
def test_names_and_weights_that_are_refused(names, match: str) -> None:  # type: ignore[no-untyped-def]
    _, a = adapted()
    want = a(X)
    with pytest.raises(fg.AdapterError, match=match):
        fg.set_active(a, names)
    assert torch.equal(a(X), want) and fg.active(a) == ["default"]
    with pytest.raises(fg.AdapterError, match="2 weights for 1"):
        fg.set_active(a, ["default"], weights=[1, 2])


# -- adapters that exclude each other --------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("trainer_first", [False, True])
def test_one_trains_what_the_other_adapts(inner: bool, trainer_first: bool) -> None:
    base = nn.Sequential(nn.Linear(12, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()) if inner else nn.Linear(8, 8))
    site = "1.0" if inner else "1"
    specs = {
        "t": fg.Spec(fg.LoRA(rank=2), targets=["re:0"], train=["1"]),
        "l": fg.Spec(fg.LoRA(rank=2), targets=[f"re:{site}"]),
    }
    names = ["t", "l"] if trainer_first else ["l", "t"]
    a: nn.Module = base
    for name in names:
        a = fg.rewrite(a, specs[name], name=name)
        if name == "t":  # its copy starts from the base, whatever is active then
            assert torch.equal(a(X), base(X))
        noisy(a, name, ord(name))
    singly = {}
    for name in names:
        fg.set_active(a, [name])
        assert torch.equal(a(X), noisy(fg.rewrite(base, specs[name], name=name), name, ord(name))(X))
        singly[name] = a(X)
    for both in (["t", "l"], ["l", "t"]):
        with pytest.raises(fg.AdapterError, match="brings its own trained '1"):
            fg.set_active(a, both)
        with pytest.raises(fg.FxgraftError, match="brings its own trained '1"):
            fg.merge(a, both)
    assert torch.equal(a(X), singly[fg.active(a)[0]])
    assert torch.allclose(fg.merge(a, ["l"])(X), singly["l"], atol=1e-6)
    assert torch.allclose(fg.merge(a, ["t"])(X), singly["t"], atol=1e-6)


# -- remove, copies, pickles ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c"), ("b", "c", "a")])
def test_remove_in_every_order(order: tuple[str, ...]) -> None:
    base = model()
    base[0].weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    methods = {
        "a": fg.LoRA(rank=2),
        "b": fg.UniLoRA(rank=2, vector_length=30),
        "c": fg.GLoRA(rank=2, path=fg.GLoRAPath("vector", "lora", "none", "vector", "constant")),
    }
    m: nn.Module = base
    for seed, (name, method) in enumerate(methods.items()):
        m = noisy(fg.rewrite(m, fg.Spec(method, targets=["0", "2"]), name=name), name, seed)
    weights = {"a": 0.5, "b": 1.0, "c": -2.0}
    fg.set_active(m, weights)
    plain = base(X)
    for name in order:
        m = pickle.loads(pickle.dumps(m)) if name == order[1] else copy.deepcopy(m)
        assert torch.allclose(m(X), fg.merge(m)(X), atol=1e-4)
        fg.remove(m, name)
        weights.pop(name)
        if weights:
            assert fg.active_weights(m) == weights
            with pytest.raises(fg.AdapterError, match=f"no adapter '{name}'"):
                fg.remove(m, name)
    assert torch.equal(m(X), plain) and type(m[0]) is nn.Linear
    assert {n: p.requires_grad for n, p in m.named_parameters()} == flags
    assert not any(k.startswith("fxgraft") for module in m.modules() for k in module.__dict__)


# -- layers that compute their children in one fused call ------------------------------------------------------------
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_path_of_an_encoder_is_the_bases_alone(padded: bool) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    spec = fg.Spec(fg.LoRA(rank=2), targets=["layers.1.linear1"])
    a = noisy(fg.rewrite(base, spec))
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    options = {"src_key_padding_mask": mask} if padded else {}
    with torch.no_grad():
        want, plain = fg.merge(a)(x, **options), base(x, **options)
        keep = ~mask  # what the fused path leaves of padding is zero
        for twin in (a, copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            torch.testing.assert_close(twin(x, **options)[keep], want[keep], rtol=1e-4, atol=1e-5)
            with fg.disabled(twin):
                assert torch.equal(twin(x, **options), plain)
            torch.testing.assert_close(twin(x, **options)[keep], want[keep], rtol=1e-4, atol=1e-5)
            fg.set_active(twin, [])
            assert torch.equal(twin(x, **options), plain)
            fg.set_active(twin, ["default"])
        fg.remove(a, "default")
        assert torch.equal(a(x, **options), plain)
    assert [type(m) for m in a.modules()] == [type(m) for m in base.modules()]
    assert not any("fxgraft" in key for m in a.modules() for key in m.__dict__)
