"""What every kernel takes of a GPU, read off an ahead-of-time compilation: no GPU is needed.

    python -m fxgraft.backends.triton.resources --write      writes RESOURCES.md beside this file

Compiled is what the launchers would launch (`Launch`), specialised as Triton's own launcher specialises: a stride of 1
and an absent tensor are constants, pointers and numbers that 16 divides are marked so.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import (
    hydralora_kernels as hydralora,
)
from . import (
    lora_kernels as lora,
)
from . import (
    prolora_kernels as prolora,
)
from . import (
    segments,
)
from . import (
    unilora_kernels as unilora,
)
from .language import INSTALLED, VERSION
from .launch import Launch

FILE = Path(__file__).with_name("RESOURCES.md")
CAPABILITIES = (80, 90)
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
#: samples, tokens, in, out and rank of the compiled calls: one token of 32 tenants, and four prompts
SHAPES = {"32 x 1, rank 16": (32, 1, 4096, 4096, 16), "4 x 512, rank 64": (4, 512, 4096, 11008, 64)}
#: the columns of the table: what each case is compiled for
TARGETS = tuple((capability, dtype) for capability in CAPABILITIES for dtype in (torch.bfloat16, torch.float32))


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes of shared memory of a program, bytes of a thread's stack.

    The kernels have no arrays of their own, so that a stack can only hold registers that did not fit: spills.
    """

    registers: int
    shared: int
    spilled: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.shared:,}" + (f" / {self.spilled} SPILLED" if self.spilled else "")


def cases(dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    """Every kernel at the sizes of `SHAPES`; tensors without memory."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    for name, (samples, tokens, inner, out, rank) in SHAPES.items():
        rows = samples * tokens
        x, y, ids = empty(rows, inner), empty(rows, out), empty(samples, of=torch.int64)
        A, B = empty(33, rank, inner), empty(33, rank, out)
        yield f"bank, {name}", lora.launches(y, x, ids, A, B, 1.0, y)
        A, B = empty(1, rank, inner, of=torch.float32), empty(1, out, rank, of=torch.float32).transpose(1, 2)
        yield f"one, {name}, no base", lora.launches(None, x, None, A, B, 2.0, y)
        theta, counts = empty(33, 524_288, of=torch.float32), empty(524_288, of=torch.uint8)
        index_a, index_b = empty(4, inner, of=torch.int32), empty(4, out, of=torch.int32)
        case = name.rpartition(",")[0]
        A, router, B = empty(33, 8, inner), empty(33, 3, inner), empty(33, 24, out)
        if tokens == 1:
            yield f"bank, {case}, rank 4", unilora.launches(y, x, ids, theta, counts, index_a, index_b, y)
            yield f"bank, {case}, rank 8, 3 experts", hydralora.launches(y, x, ids, A, router, B, 1.0, y)
        else:
            yield f"one, {case}, rank 4", unilora.launches(y, x, None, theta[:1], counts, index_a, index_b, y)
            alone = A[:1], router[:1], B[:1]
            yield f"one, {case}, rank 8, 3 experts", hydralora.launches(y, x, None, *alone, 8.0, y)
        shared = empty(31, -(-inner // 7)), empty(-(-out // 7), 31).t()
        unshared = empty(1, inner), empty(out, 1).t()
        factors = shared[0], unshared[0], shared[1], unshared[1]
        yield f"{case}, rank 32, 7 chunks", prolora.launches(y, x, *factors, 7, 7, 0.5, y)
    values, index, one = empty(2**23, of=torch.float32), empty(2**23, of=torch.int32), empty(1, of=torch.float64)
    yield "any", segments.launches(values, index, one, empty(524_288, of=torch.int64))


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, value) in enumerate(launch.arguments.items()):
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    return {name: signature[name] for name in launch.kernel.arg_names}, constants, attributes


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel for a compute capability such as 80, as Triton compiles it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *_signature(launch))
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """What the disassembler that comes with Triton tells of machine code: REG, STACK and so on."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    assert set(found) == {"REG", "STACK", "LOCAL"}, text
    return found


def measure(dtype: torch.dtype, capability: int) -> dict[tuple[str, str], Resources]:
    """(kernel, case) -> what it takes, for one dtype of x and one capability."""
    found = {}
    for case, launches in cases(dtype):
        for launch in launches:
            kernel = compiled(launch, capability)
            used = usage(kernel.asm["cubin"])
            name = f"{launch.kernel.__module__.rpartition('.')[2]}.{launch.kernel.__name__}"
            found[name, case] = Resources(used["REG"], kernel.metadata.shared, used["STACK"] + used["LOCAL"])
    return found


def table() -> str:
    """The text of RESOURCES.md."""
    measured = [measure(dtype, capability) for capability, dtype in TARGETS]
    lines = [
        "# What the kernels take",
        "",
        f"Triton {VERSION}; written by `python -m fxgraft.backends.triton.resources --write`, checked by a test that",
        "also fails on any spill. A cell is registers of a thread / bytes of shared memory of a program.",
        "A case names samples x tokens: single tokens with 4096 features in and out, prompts with 4096 in, 11008 out.",
        "",
        "| kernel | case | " + " | ".join(f"sm_{c} {_TYPES[d]}" for c, d in TARGETS) + " |",
        "| --- | --- |" + " --- |" * len(TARGETS),
    ]
    for kernel, case in sorted(measured[0], key=lambda row: row[0].partition(".")[0]):
        cells = " | ".join(str(column[kernel, case]) for column in measured)
        lines.append(f"| {kernel} | {case} | {cells} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Registers, shared memory and spills of every kernel.")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} instead of printing")
    options = parser.parse_args(arguments)
    if not INSTALLED:
        parser.error("triton is not installed: pip install 'fxgraft[triton]'")
    if options.write:
        FILE.write_text(table(), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
