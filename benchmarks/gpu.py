"""On an NVIDIA GPU: the kernels' errors and speeds against measured ceilings, and the ratios of adapted models.

    python benchmarks/gpu.py --json gpu.json

`ceilings` copies a large buffer and multiplies large matrices; `kernels` runs every kernel at sizes of real models
beside its definition through Inductor, in CUDA graphs (what the GPU needs) and asked for one by one (what the host
needs), with the error against float64; `inference`, `training` and `bank` compile the models of `compiled.py` with
kernels="aten", "triton" and "auto". The gate's constants (`backends/triton/kernel_gate.py`) are estimates until this
has run.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import harness
import subjects
import torch
import torch._dynamo
from rich.table import Table
from torch import Tensor, nn

import fxgraft as fg
from fxgraft.backends.triton import optional_triton
from fxgraft.backends.triton.kernels import hydralora_kernel as hydralora
from fxgraft.backends.triton.kernels import lora_kernel as lora
from fxgraft.backends.triton.kernels import prolora_kernel as prolora
from fxgraft.backends.triton.kernels import unilora_kernel as unilora

WHAT = ("ceilings", "kernels", "inference", "training", "bank")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: errors past which a kernel is wrong, not fast: of the largest entry, against float64
TOLERANCES = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
METHODS: dict[str, Any] = {
    "LoRA r8": fg.LoRA(rank=8),
    "Uni-LoRA r4": fg.UniLoRA(rank=4, vector_length=subjects.UNILORA_LENGTH),
    "HydraLoRA r4 N3": fg.HydraLoRA(rank=4, experts=3),
    "PRoLoRA r8": fg.PRoLoRA(rank=8, unshared=1, a_chunks=7, b_chunks=7),
}


# -- time ------------------------------------------------------------------------------------------------------------
def on_gpu(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds of a call when the host does not count: a CUDA graph of all calls, replayed; the median of the replays.

    On a CPU, where this only shows that the script runs: the median of plain calls.
    """
    if not torch.cuda.is_available():
        return asked(calls, repeats)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[2:])


def asked(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds of a call asked for from Python, one after the other without waiting between them."""
    times = []
    for _ in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(calls))
    return statistics.median(times[2:])


# -- ceilings --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy, read and written; operations a second of a product of each dtype."""

    bytes: float
    operations: dict[str, float]


def ceilings(device: str, quick: bool) -> Ceilings:
    size, side = (1 << 22, 256) if quick else (1 << 32, 8192)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    speed = 2 * size / on_gpu([lambda: target.copy_(source)], 10)
    found = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # random: zeros run faster
        found[name] = 2 * side**3 / on_gpu([lambda a=a, b=b: a @ b], 10)
    return Ceilings(speed, found)


# -- kernels ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """One kernel at one size. Times in microseconds; speeds as shares of the ceilings; error against float64."""

    kernel: str
    size: str
    dtype: str
    error: float
    gpu_us: float
    definition_gpu_us: float
    asked_us: float
    definition_asked_us: float
    bytes_per_second: float
    of_copy: float
    operations_per_second: float
    of_product: float


@dataclass(frozen=True)
class Kernel:
    """A kernel to time: `make(samples, tokens, inner, out)` gives fresh tensors, and the bytes of its factors and the
    operations a row that it needs. The operator takes the base's output first."""

    name: str
    operator: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    make: Callable[..., tuple[list[Any], float, float]]


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, device=device) / math.sqrt(shape[-1])).to(dtype)


def _ids(device: str, samples: int) -> Tensor:
    return torch.randperm(samples, device=device) + 1


def kernels_to_time(device: str, dtype: torch.dtype, rank: int = 8, experts: int = 3) -> list[Kernel]:
    def bank(samples: int, tokens: int, inner: int, out: int) -> tuple[list[Any], float, float]:
        A, B = (_random(device, dtype, samples + 1, rank, n) for n in (inner, out))
        entries = samples * rank * (inner + out)
        return [_ids(device, samples), A, B, 1.0], entries * A.itemsize, 2 * rank * (inner + out)

    def one(samples: int, tokens: int, inner: int, out: int) -> tuple[list[Any], float, float]:
        A, B = (_random(device, dtype, rank, n) for n in (inner, out))
        return [None, A, B, 2.0], rank * (inner + out) * A.itemsize, 2 * rank * (inner + out)

    def vector(samples: int, tokens: int, inner: int, out: int) -> tuple[list[Any], float, float]:
        r, d = 4, subjects.UNILORA_LENGTH
        theta, counts = torch.randn(d, device=device), torch.full((d,), 8, dtype=torch.uint8, device=device)
        a, b = (torch.randint(d, (r, n), dtype=torch.int32, device=device) for n in (inner, out))
        return [None, theta, counts, a, b], r * (inner + out) * 4 + 5 * d, 2 * r * (inner + out)

    def hydra(samples: int, tokens: int, inner: int, out: int) -> tuple[list[Any], float, float]:
        A, router = _random(device, dtype, rank, inner), _random(device, dtype, experts, inner)
        B = _random(device, dtype, experts * rank, out)
        entries = (rank + experts) * inner + experts * rank * out
        return [None, A, router, B, 2.0], entries * A.itemsize, 2 * entries

    def chunks(samples: int, tokens: int, inner: int, out: int) -> tuple[list[Any], float, float]:
        q, m = rank - 1, 7
        A0, B0 = _random(device, dtype, q, -(-inner // m)), _random(device, dtype, q, -(-out // m))
        Au, Bu = _random(device, dtype, 1, inner), _random(device, dtype, 1, out)
        held = sum(t.numel() * t.itemsize for t in (A0, B0, Au, Bu))
        return [A0, Au, B0, Bu, m, m, out, 2.0], held, 2 * rank * (inner + out)

    return [
        Kernel("LoRA bank", lora.lora, lora.definition, bank),
        Kernel("LoRA", lora.lora, lora.definition, one),
        Kernel("Uni-LoRA", unilora.unilora, unilora.definition, vector),
        Kernel("HydraLoRA", hydralora.hydralora, hydralora.definition, hydra),
        Kernel("PRoLoRA", prolora.prolora, prolora.definition, chunks),
    ]


def measure(
    kernel: Kernel, size: tuple[int, int, int, int], device: str, dtype: torch.dtype, top: Ceilings
) -> Measured:
    samples, tokens, inner, out = size
    rows = samples * tokens
    moved = rows * (inner + 2 * out) * dtype.itemsize
    copies = 2 if device == "cpu" else max(1, min(64, 2**28 // max(1, moved)))  # more than the cache holds
    sets = []
    for _ in range(copies):
        arguments, factors, row_operations = kernel.make(samples, tokens, inner, out)
        base, x = _random(device, dtype, rows, out), torch.randn(rows, inner, device=device).to(dtype)
        sets.append((base, x, *arguments))
    exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in sets[0]]
    want = kernel.definition(*exact)
    error = ((kernel.operator(*sets[0]).double() - want).abs().max() / want.abs().max()).item()
    name = str(dtype).removeprefix("torch.")
    if not error < TOLERANCES[name]:
        raise SystemExit(f"{kernel.name} at {size} in {name} is wrong: error {error:.1e} against float64")
    library = torch.compile(kernel.definition, dynamic=False)
    mine = [lambda s=s: kernel.operator(*s) for s in sets]
    other = [lambda s=s: library(*s) for s in sets]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library(*sets[0])
        seconds, theirs = on_gpu(mine, 20), on_gpu(other, 20)
        speed, rate = (moved + factors) / seconds, rows * row_operations / seconds
        return Measured(
            kernel.name, f"{samples} x {tokens}, {inner} -> {out}", name, error,
            seconds * 1e6, theirs * 1e6, asked(mine, 20) * 1e6, asked(other, 20) * 1e6,
            speed, speed / top.bytes, rate, rate / top.operations[name],
        )  # fmt: skip


def time_kernels(report: harness.Report, device: str, top: Ceilings, quick: bool) -> None:
    wide = 128 if quick else 4096
    sizes = [(4, 1, wide, wide), (2, 8, wide, wide)] if quick else [(32, 1, wide, wide), (8, 512, wide, 11008)]
    found = []
    for dtype in [DTYPES["bfloat16"]] if quick else [DTYPES["bfloat16"], DTYPES["float32"]]:
        for size in sizes:
            for kernel in kernels_to_time(device, dtype):
                torch._dynamo.reset()
                found.append(measure(kernel, size, device, dtype, top))
    table = Table(title="Kernels, with the sum onto the base's output", title_justify="left")
    for column in ("kernel", "samples x tokens", "x", "error", "GPU us", "definition", "asked us", "definition",
                   "of the copy", "of the product"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("kernel", "samples x tokens", "x") else "right")
    for m in found:
        table.add_row(
            m.kernel, m.size, m.dtype, f"{m.error:.1e}", f"{m.gpu_us:.1f}", f"{m.definition_gpu_us:.1f}",
            f"{m.asked_us:.1f}", f"{m.definition_asked_us:.1f}", f"{m.of_copy:.0%}", f"{m.of_product:.1%}",
        )  # fmt: skip
    report.console.print(table)
    report.facts["kernels"] = [asdict(m) for m in found]
    report.write()


# -- models ----------------------------------------------------------------------------------------------------------
def preferences() -> tuple[str, ...]:
    return (
        ("aten", "triton", "auto")
        if "cuda" in optional_triton.DEVICES and torch.cuda.is_available()
        else ("aten", "auto")
    )


def models(
    report: harness.Report, what: str, shape: str, mode: str, dtype: torch.dtype, device: str, quick: bool
) -> None:
    """Every method in every preference against the compiled base."""
    batch, tokens = map(int, shape.split("x"))
    training = what == "training"
    layers, width = (1, 128) if quick else (4, 768)
    base = subjects.bert(layers, width).to(device, dtype)
    inputs = subjects.embeddings(batch, tokens, width).to(device, dtype).requires_grad_(training)
    torch._dynamo.reset()
    frozen = subjects.frozen(base)
    named: dict[str, tuple[nn.Module, nn.Module]] = {"compiled base": (frozen, torch.compile(frozen, mode=mode))}
    for name, method in {k: METHODS[k] for k in list(METHODS)[: 1 if quick else None]}.items():
        adapted = subjects.rewritten(base, method, subjects.ALL_LINEAR)
        for kernels in preferences():
            if training and kernels == "triton":
                continue  # what nobody would choose: every site's products by the kernels, on the way back too
            # a note belongs to a model: each preference gets a copy of its own
            model = subjects.copy.deepcopy(adapted)
            named[f"{name}, {kernels}"] = model, fg.compile(model, kernels=kernels, mode=mode)
    candidates = []
    for name, (plain, fast) in named.items():
        plain.train(training)
        call, clear = subjects.training_step(fast, inputs) if training else (subjects.forward(fast, inputs), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                call()
        note = ""
        if name != "compiled base":
            compiled = fg.explain(plain).compiled
            lowered = sum(n for c in compiled for (by, _), n in c.made.items() if by.startswith("Lower"))
            note = f"{lowered} nodes lowered"
        candidates.append(harness.Candidate(name, call, prepare=clear, note=note))
    title = f"{what.capitalize()}: BERT, {layers} layers, {width} wide, {shape}, {dtype}, mode {mode}, all linears"
    with torch.compiler.set_stance("fail_on_recompile"):
        report.add(harness.measure(title, candidates, "compiled base", rounds=report.options["rounds"]))


def bank(report: harness.Report, tokens: int, mode: str, dtype: torch.dtype, device: str, quick: bool) -> None:
    """A batch with a sample of every tenant."""
    count = 3 if quick else 32
    layers, width = (1, 128) if quick else (4, 768)
    base = subjects.bert(layers, width).to(device, dtype)
    one = subjects.rewritten(base, fg.LoRA(rank=8), subjects.ALL_LINEAR)
    states = {
        f"t{i}": {key: torch.randn_like(value) * 1e-2 for key, value in fg.adapter_state(one).items()}
        for i in range(count)
    }
    inputs = subjects.embeddings(count, tokens, width).to(device, dtype)
    torch._dynamo.reset()
    frozen = subjects.frozen(base)
    candidates = [
        harness.Candidate("compiled base", subjects.forward(torch.compile(frozen, mode=mode), inputs))
    ]  # fmt: skip
    for kernels in preferences():
        banked = fg.bank(one, states)
        ids, fast = fg.adapter_ids(banked, list(states)), fg.compile(banked, kernels=kernels, mode=mode)

        def call(fast: nn.Module = fast, ids: Tensor = ids) -> Tensor:
            with torch.no_grad():
                return fast(inputs_embeds=inputs, adapter_ids=ids).last_hidden_state

        candidates.append(harness.Candidate(f"bank, {kernels}", call))
    title = f"Bank of {count} LoRA r8 on all linears: {layers} layers, {width} wide, {tokens} token(s), {dtype}, {mode}"
    report.add(harness.measure(title, candidates, "compiled base", rounds=report.options["rounds"]))


def main() -> None:
    parser = harness.arguments(__doc__.splitlines()[0], rounds=50, quick_rounds=3)
    parser.add_argument("--what", choices=WHAT, nargs="+", default=WHAT, help="what is measured")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "1x16"], help="batch x tokens of the models")
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"], help="of torch.compile")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the models")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu, with --quick: only shows that the script runs"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"benchmarks/gpu.py needs an NVIDIA GPU, and this PyTorch ({torch.__version__}) sees none\n")
    if options.device == "cuda" and not optional_triton.INSTALLED:
        parser.exit(2, "benchmarks/gpu.py needs triton: pip install 'fxgraft[triton]'\n")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu shows that the script runs, and goes with --quick only")
    report = harness.start("gpu", options)
    dtype, quick = DTYPES[options.dtype], options.quick
    shapes = ["2x8"] if quick else options.shapes
    modes = options.modes[:1] if quick else options.modes
    if {"ceilings", "kernels"} & set(options.what):
        top = ceilings(options.device, quick)
        rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s {name}" for name, rate in top.operations.items())
        report.fact("ceilings", asdict(top), f"ceilings: a copy {top.bytes / 1e12:.2f} TB/s; products {rates}\n")
        if "kernels" in options.what:
            time_kernels(report, options.device, top, quick)
    # all candidates share one class, to whose code Dynamo's limit applies
    with torch._dynamo.config.patch(recompile_limit=64):
        for mode in modes:
            for what in [w for w in ("inference", "training") if w in options.what]:
                for shape in shapes:
                    models(report, what, shape, mode, dtype, options.device, quick)
            if "bank" in options.what:
                for tokens in (1,) if quick else (1, 16, 128):
                    bank(report, tokens, mode, dtype, options.device, quick)


if __name__ == "__main__":
    main()
