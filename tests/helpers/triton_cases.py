"""What the kernels are tested with: inputs and float64 oracles, for the interpreter (CPU) and for a GPU alike.

    TRITON_INTERPRET=1 python tests/helpers/triton_cases.py      prints {case: {tensor: error}} as JSON

Sizes are ragged, odd and rectangular. The oracles are written sample by sample from the formulas of the papers and
share no code with the kernels' definitions. Errors are the largest deviation relative to the oracle's largest entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxgraft as fg
from fxgraft.backends.triton.kernels import hydralora_kernel as hydralora
from fxgraft.backends.triton.kernels import lora_kernel as lora
from fxgraft.backends.triton.kernels import prolora_kernel as prolora
from fxgraft.backends.triton.kernels import unilora_kernel as unilora
from fxgraft.backends.triton.kernels.segment_sum import segment_sum

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """One call. `call` and `oracle` take `tensors`, whose gradients are compared too."""

    call: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    tensors: dict[str, Tensor]


def floats(device: str, **shapes: Any) -> dict[str, Tensor]:
    """Random tensors, made on the CPU so that every device gets the same; `name=(dtype, *shape)`."""
    return {name: torch.randn(shape).to(dtype).to(device) for name, (dtype, *shape) in shapes.items()}


def by_sample(function: Callable[[int, Tensor], Tensor], x: Tensor, ids: Tensor | None) -> Tensor:
    """`function(slot, rows)` for every sample, zero for slot 0; without ids for all rows with slot None."""
    if ids is None:
        return function(None, x)  # type: ignore[arg-type]
    rows = x.reshape(len(ids), -1, x.shape[-1])
    parts = [function(slot, part) for slot, part in zip(ids.tolist(), rows, strict=True)]
    whole = torch.stack([part * (slot != 0) for slot, part in zip(ids.tolist(), parts, strict=True)])
    return whole.reshape(*x.shape[:-1], whole.shape[-1])


# -- grouped LoRA ----------------------------------------------------------------------------------------------------
def lora_case(device, dtype, samples, tokens, inner, out, rank, slots=None, factors=None, base=True, scale=0.5):
    """Slots None: one adapter. `factors`: dtype of A and B, by default x's."""
    stack = () if slots is None else (slots,)
    ids = None if slots is None else torch.arange(samples, device=device) % slots
    shape = (samples * tokens,) if samples > 1 and base else (samples, tokens)  # samples one under the other, or apart
    tensors = floats(
        device, x=(dtype, *shape, inner), A=(factors or dtype, *stack, rank, inner),
        B=(factors or dtype, *stack, rank, out), **({"base": (dtype, *shape, out)} if base else {}),
    )  # fmt: skip

    def call(x, A, B, base=None):
        return lora.lora(base, x, ids, A, B, scale)

    def oracle(x, A, B, base=None):
        def one(slot, rows):
            a, b = (A, B) if slot is None else (A[slot], B[slot])
            return scale * rows @ a.T @ b

        delta = by_sample(one, x, ids)
        return delta if base is None else base + delta

    return Case(call, oracle, tensors)


# -- Uni-LoRA --------------------------------------------------------------------------------------------------------
def unilora_case(device, dtype, samples, tokens, inner, out, rank, length, slots=None, base=True):
    ids = None if slots is None else torch.arange(samples, device=device) % slots
    stack = () if slots is None else (slots,)
    index = torch.randint(length, (rank * (inner + out),))
    counts = torch.bincount(index, minlength=length).clamp(min=1).to(torch.uint8).to(device)
    index_a = index[: rank * inner].view(rank, inner).int().to(device)
    index_b = index[rank * inner :].view(rank, out).int().to(device)
    tensors = floats(
        device, x=(dtype, samples, tokens, inner), theta=(torch.float32, *stack, length),
        **({"base": (dtype, samples, tokens, out)} if base else {}),
    )  # fmt: skip

    def call(x, theta, base=None):
        return unilora.unilora(base, x, ids, theta, counts, index_a, index_b)

    def oracle(x, theta, base=None):
        def one(slot, rows):
            vector = (theta if slot is None else theta[slot]) / counts.double().sqrt()
            return rows @ vector[index_a.long()].T @ vector[index_b.long()]

        delta = by_sample(one, x, ids)
        return delta if base is None else base + delta

    return Case(call, oracle, tensors)


# -- HydraLoRA -------------------------------------------------------------------------------------------------------
def hydralora_case(device, dtype, samples, tokens, inner, out, rank, experts, slots=None, base=True, scale=2.0):
    ids = None if slots is None else torch.arange(samples, device=device) % slots
    stack = () if slots is None else (slots,)
    tensors = floats(
        device, x=(dtype, samples, tokens, inner), A=(dtype, *stack, rank, inner),
        router=(dtype, *stack, experts, inner), B=(dtype, *stack, experts, rank, out),
        **({"base": (dtype, samples, tokens, out)} if base else {}),
    )  # fmt: skip
    with torch.no_grad():
        tensors["router"] *= inner**-0.5  # softmax of logits near 1, not of one that wins everywhere

    def call(x, A, router, B, base=None):
        return hydralora.hydralora(base, x, ids, A, router, B if slots else B.flatten(0, 1), scale)

    def oracle(x, A, router, B, base=None):
        def one(slot, rows):
            a, gate, b = (A, router, B) if slot is None else (A[slot], router[slot], B[slot])
            logits = (rows @ gate.T).exp()
            weights = logits / logits.sum(-1, keepdim=True)
            return scale * sum(weights[..., i : i + 1] * (rows @ a.T @ b[i]) for i in range(experts))

        delta = by_sample(one, x, ids)
        return delta if base is None else base + delta

    return Case(call, oracle, tensors)


# -- PRoLoRA ---------------------------------------------------------------------------------------------------------
def prolora_case(device, dtype, tokens, inner, out, shared, unshared, a_chunks, b_chunks, base=True, scale=0.25):
    """B's tensors are given as the method stores them, `(out, r)`, and turned."""
    shapes: dict[str, Any] = {"x": (dtype, tokens, inner)}
    if shared:
        shapes["A0"] = (dtype, shared, -(-inner // a_chunks))
        shapes["B0"] = (dtype, -(-out // b_chunks), shared)
    if unshared:
        shapes["Au"], shapes["Bu"] = (dtype, unshared, inner), (dtype, out, unshared)
    if base:
        shapes["base"] = (dtype, tokens, out)

    def call(x, A0=None, B0=None, Au=None, Bu=None, base=None):
        turned = [None if t is None else t.t() for t in (B0, Bu)]
        return prolora.prolora(base, x, A0, Au, *turned, a_chunks, b_chunks, out, scale)

    def oracle(x, A0=None, B0=None, Au=None, Bu=None, base=None):
        def full(chunk, chunks, length):  # section 3.2, with the strides of the authors' code
            turn = max(chunk.shape[0] // chunks, 1)
            return torch.cat([chunk.roll(-k * turn, 0) for k in range(chunks)], 1)[:, :length]

        A = torch.cat([*([] if A0 is None else [full(A0, a_chunks, inner)]), *([] if Au is None else [Au])])
        B = torch.cat([*([] if B0 is None else [full(B0.T, b_chunks, out)]), *([] if Bu is None else [Bu.T])])
        delta = scale * x @ A.T @ B
        return delta if base is None else base + delta

    return Case(call, oracle, floats(device, **shapes))


#: small enough for the interpreter, at 10 to 45 ms a program and step
CASES: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "lora, bank, ragged": (lora_case, {"samples": 5, "tokens": 3, "inner": 70, "out": 45, "rank": 5, "slots": 4}),
    "lora, bank, one token": (lora_case, {"samples": 7, "tokens": 1, "inner": 256, "out": 33, "rank": 8, "slots": 3}),
    "lora, bank, no base": (
        lora_case,
        {"samples": 2, "tokens": 17, "inner": 33, "out": 130, "rank": 3, "slots": 9, "base": False},
    ),
    "lora, one": (lora_case, {"samples": 1, "tokens": 37, "inner": 130, "out": 77, "rank": 20}),
    "lora, one, float32 factors": (
        lora_case,
        {"samples": 1, "tokens": 5, "inner": 96, "out": 50, "rank": 70, "factors": torch.float32},
    ),
    "unilora, one": (
        unilora_case,
        {"samples": 1, "tokens": 19, "inner": 70, "out": 90, "rank": 4, "length": 37},
    ),
    "unilora, no base": (
        unilora_case,
        {"samples": 3, "tokens": 5, "inner": 65, "out": 17, "rank": 18, "length": 400, "base": False},
    ),
    "unilora, bank": (
        unilora_case,
        {"samples": 5, "tokens": 2, "inner": 40, "out": 66, "rank": 3, "length": 50, "slots": 3},
    ),
    "hydralora, one": (
        hydralora_case,
        {"samples": 1, "tokens": 21, "inner": 70, "out": 85, "rank": 5, "experts": 3},
    ),
    "hydralora, bank, no base": (
        hydralora_case,
        {"samples": 4, "tokens": 3, "inner": 130, "out": 34, "rank": 9, "experts": 10, "slots": 3, "base": False},
    ),
    "prolora": (
        prolora_case,
        {"tokens": 20, "inner": 100, "out": 75, "shared": 7, "unshared": 1, "a_chunks": 7, "b_chunks": 4},
    ),
    "prolora, nothing unshared": (
        prolora_case,
        {"tokens": 3, "inner": 65, "out": 130, "shared": 18, "unshared": 0, "a_chunks": 3, "b_chunks": 25},
    ),
    "prolora, nothing shared": (
        prolora_case,
        {"tokens": 17, "inner": 40, "out": 33, "shared": 0, "unshared": 6, "a_chunks": 7, "b_chunks": 7, "base": False},
    ),
}


#: for a GPU: the sizes of real models
LARGE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "lora, bank, 32 tokens": (
        lora_case,
        {"samples": 32, "tokens": 1, "inner": 4096, "out": 4096, "rank": 16, "slots": 33},
    ),
    "lora, one, a prompt": (
        lora_case,
        {"samples": 1, "tokens": 1000, "inner": 4096, "out": 11008, "rank": 64, "factors": torch.float32},
    ),
    "unilora, one token": (
        unilora_case,
        {"samples": 1, "tokens": 1, "inner": 3072, "out": 768, "rank": 4, "length": 23_040},
    ),
    "unilora, bank": (
        unilora_case,
        {"samples": 8, "tokens": 128, "inner": 768, "out": 3072, "rank": 4, "length": 23_040, "slots": 9},
    ),
    "hydralora, a prompt": (
        hydralora_case,
        {"samples": 1, "tokens": 1000, "inner": 4096, "out": 4096, "rank": 8, "experts": 3},
    ),
    "hydralora, bank": (
        hydralora_case,
        {"samples": 16, "tokens": 7, "inner": 1024, "out": 2048, "rank": 4, "experts": 4, "slots": 5},
    ),
    "prolora, a prompt": (
        prolora_case,
        {"tokens": 1000, "inner": 4096, "out": 11008, "shared": 31, "unshared": 1, "a_chunks": 7, "b_chunks": 7},
    ),
}


def errors(case: Case, seed: int = 1) -> dict[str, float]:
    """Of the result and of every gradient."""
    torch.manual_seed(seed)
    given = {name: t.requires_grad_() for name, t in case.tensors.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    y, wanted = case.call(**given), case.oracle(**exact)
    g = torch.randn(y.shape).to(y.dtype).to(y.device)
    got = dict(zip(given, torch.autograd.grad(y, list(given.values()), g), strict=True))
    want = dict(zip(exact, torch.autograd.grad(wanted, list(exact.values()), g.double()), strict=True))
    pairs = {"result": (y, wanted), **{f"grad {name}": (got[name], want[name]) for name in given}}
    return {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


METHODS = {
    "lora": fg.LoRA(4),
    "unilora": fg.UniLoRA(rank=3, vector_length=50, init_bound=0.5),
    "hydralora": fg.HydraLoRA(rank=2, experts=3),
    "prolora": fg.PRoLoRA(rank=6, unshared=1, a_chunks=5, b_chunks=3),
}


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> Case:
    torch.manual_seed(0)
    builder, options = {**CASES, **LARGE}[name]
    return builder(device, dtype, **options)


def wrong_ids(device: str = "cpu") -> list[bool]:
    """Which samples come back as NaN when the ids are 1, -1, 5 and 0 of three slots."""
    x, A, B = (torch.ones(shape, device=device) for shape in ((4, 2, 8), (3, 2, 8), (3, 2, 6)))
    y = lora.lora(None, x, torch.tensor([1, -1, 5, 0], device=device), A, B, 1.0)
    return y.isnan().all(-1).all(-1).tolist()


def segment_sums(device: str = "cpu") -> dict[str, Any]:
    """The sum by index: its error, whether another order gives the same bits, zeros, and what one NaN makes of it."""
    torch.manual_seed(0)
    values, index = torch.randn(5000, device=device) * 10.0 ** torch.randint(-6, 3, (5000,)).to(device), None
    index = torch.randint(300, (5000,), dtype=torch.int32).to(device)
    want = torch.zeros(300, dtype=torch.float64, device=device).index_add(0, index, values.double())
    got = segment_sum(values, index, 300)
    order = torch.randperm(5000).to(device)
    again = segment_sum(values[order], index[order], 300)
    tiny = segment_sum(values * 1e-30, index, 300)
    return {
        "error": ((got - want).abs().max() / want.abs().max()).item(),
        "tiny": ((tiny.double() * 1e30 - want).abs().max() / want.abs().max()).item(),
        "same bits": torch.equal(got, again),
        "zeros": segment_sum(torch.zeros_like(values), index, 300).abs().max().item(),
        "nan": bool(segment_sum(values.index_fill(0, order[:1], torch.inf), index, 300).isnan().all()),
    }


def through_compile(device: str = "cpu", **options: Any) -> dict[str, Any]:
    """`fg.compile(kernels="triton")` of a model with every method: errors against itself, and what explain says."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for place, name in enumerate(METHODS):
                setattr(self, name, nn.Linear(24 + 8 * place, 32 + 8 * place, bias=place % 2 == 0))

        def forward(self, x):
            for name in METHODS:
                x = torch.tanh(getattr(self, name)(x))
            return x

    torch.manual_seed(0)
    first, *others = METHODS
    spec = fg.Spec(METHODS[first], targets=list(METHODS), overrides={name: METHODS[name] for name in others})
    model = fg.rewrite(Model().eval().to(device), spec)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * 0.1)
    fast, x = fg.compile(model, kernels="triton", fullgraph=True, **options), torch.randn(5, 24, device=device)
    with torch.no_grad():
        forward = (fast(x) - model(x)).abs().max().item()
    got = torch.autograd.grad(fast(x).square().sum(), parameters)
    want = torch.autograd.grad(model(x).square().sum(), parameters)
    backward = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(got, want, strict=True))
    notes = [str(note) for note in fg.explain(fast).compiled]
    return {"forward": forward, "backward": backward, "notes": notes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        f"{name}, {text}": errors(make(name, dtype)) for name in CASES for text, dtype in DTYPES.items()
    }
    rest = {"wrong ids": wrong_ids(), "segments": segment_sums(), "compile": through_compile()}
    print(json.dumps({"errors": found, **rest}))
