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

from . import kernels  # noqa: F401  (they register)
from .example_launches import Shape, examples
from .launch import Launch
from .optional_triton import INSTALLED, VERSION

FILE = Path(__file__).with_name("RESOURCES.md")
CAPABILITIES = (80, 90)
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip
#: of the compiled calls: one token of 32 tenants, and four prompts
SHAPES = (Shape(32, 1, 4096, 4096, 16), Shape(4, 512, 4096, 11008, 64))
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


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, list[Launch]]]:
    """(kernel, case, launches) of every kernel at the sizes of `SHAPES`; tensors without memory."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for shape in SHAPES:
        rows = shape.samples * shape.tokens
        x, y, ids = empty(rows, shape.inner), empty(rows, shape.out), empty(shape.samples, dtype=torch.int64)
        for kernel, function in examples.items():
            for case, launches in function(empty, shape, x, y, ids):
                yield kernel, case, launches


def _specialised(argument: Any, place: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument, or of a tuple's; adds what Triton takes as known of it."""
    if isinstance(argument, tuple):
        return tuple(_specialised(a, (*place, i), constants, attributes) for i, a in enumerate(argument))
    if isinstance(argument, float):
        return "fp32"
    if argument is None or (isinstance(argument, int) and argument == 1):
        constants[place] = argument
        return "constexpr"
    if isinstance(argument, Tensor) or argument % 16 == 0:
        attributes[place] = [["tt.divisibility", 16]]
    if isinstance(argument, Tensor):
        return f"*{_TYPES[argument.dtype]}"
    return "i64" if argument >= 2**31 else "i32"


def _signature(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    names, constants, attributes = launch.kernel.arg_names, dict[Any, Any](launch.constants), dict[Any, Any]()
    signature = {
        name: _specialised(argument, (names.index(name),), constants, attributes)
        for name, argument in launch.arguments.items()
    } | dict.fromkeys(launch.constants, "constexpr")
    return {name: signature[name] for name in names}, constants, attributes


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
    for name, case, launches in cases(dtype):
        for launch in launches:
            kernel = compiled(launch, capability)
            used = usage(kernel.asm["cubin"])
            place = f"{name}.{launch.kernel.__name__}", case
            found[place] = Resources(used["REG"], kernel.metadata.shared, used["STACK"] + used["LOCAL"])
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
