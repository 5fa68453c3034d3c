"""The cost rule: operations, bytes and calls of the forms an adapter can take, in seconds of a machine.

Only quotients matter, so a handful of constants per kind of device is enough. Sizes may be symbolic: the rule then
looks at the size the graph was captured with and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """What a device does in a second.

    Args:
        flops: of a large float32 product; bytes: to and from memory; call: seconds one operator costs by itself.
    """

    flops: float
    bytes: float
    call: float


#: CPU: one core with AVX2, fitted to products of 16 to 1024 rows with 768 x 768 to 3072 x 768 weights (2026-11);
#: CUDA: an A100's data sheet and a launch of 5 us, not measured here
MACHINES = {"cpu": Machine(35e9, 6e9, 5e-6), "cuda": Machine(19.5e12, 1.5e12, 5e-6)}
_FLOAT = 4  # bytes
_OPAQUE_CALL = 75e-6  # seconds for an operator of ours inside compiled code, on CPU


@dataclass(frozen=True)
class Verdict:
    """A choice and why; true where the alternative pays."""

    pays: bool
    reason: str

    def __bool__(self) -> bool:
        return self.pays


def machine(device: str) -> Machine:
    return MACHINES.get(device, MACHINES["cuda"])


def hint(rows: int | torch.SymInt | None) -> tuple[int | None, str]:
    """The number of rows to reckon with, None where nothing is known, and how to say it."""
    if rows is None:
        return None, "an unknown number of rows"
    if isinstance(rows, torch.SymInt):
        hint = rows.node.hint
        return (None if hint is None else int(hint)), f"{rows} rows, {hint} when captured"
    return int(rows), f"{rows} rows"


def joined_down_pays(
    rows: int | torch.SymInt | None, inner: int, ranks: int, count: int, device: str, training: bool
) -> Verdict:
    """Whether one product for `count` adapters on one input pays; `ranks` is the sum of theirs.

    It reads the input once instead of `count` times and is one call instead of `count`, in training once more on the
    way back; it writes the factors one under the other first, a call and `8 * ranks * in` bytes.
    """
    m, (n, text) = machine(device), hint(rows)
    if n is None:
        return Verdict(True, text)
    saved = (count - 1) * (_FLOAT * n * inner / m.bytes + m.call) * (2 if training else 1)
    cost = 2 * _FLOAT * ranks * inner / m.bytes + m.call
    return Verdict(saved > cost, f"{text}; saves {saved * 1e6:.0f} us and costs {cost * 1e6:.0f}")


def joined_product_pays(rows: int | torch.SymInt | None, count: int, device: str) -> Verdict:
    """Whether one product with the weights of `count` frozen ones under each other pays.

    It reads the input once and is one call, but what follows reads slices of wider rows. On a CPU it takes 0.94 to 1.08
    times as long as the products apart (three of 384 to 2048 wide, 1 to 1024 rows, one core), with no size where it is
    the faster one throughout; elsewhere `count - 1` launches are saved and narrow products fill the device better.
    """
    _, text = hint(rows)
    if device == "cpu":
        return Verdict(False, f"{text}; on cpu one wide product takes as long as {count} narrow ones")
    return Verdict(True, f"{text}; saves {count - 1} launches")


def accumulate_pays(rows: int | torch.SymInt | None, out: int, device: str) -> Verdict:
    """Whether adding the base's product onto the delta pays: it saves reading the delta and reading and writing the
    output, 12 bytes an entry, and costs a call that no compiler fuses (75 us measured on CPU).

    Elsewhere than on a CPU the compiler fuses the sum into what follows, and the answer is no.
    """
    n, text = hint(rows)
    if device != "cpu":
        return Verdict(False, f"on {device} the sum is fused into what follows")
    if n is None:
        return Verdict(False, text)
    saved = 3 * _FLOAT * n * out / machine(device).bytes
    return Verdict(saved > _OPAQUE_CALL, f"{text}; saves {saved * 1e6:.0f} us and costs {_OPAQUE_CALL * 1e6:.0f}")


def inline_merge_pays(rows: int | torch.SymInt | None, out: int, inner: int, rank: int, device: str) -> Verdict:
    """Whether `x (W + B A)^T` with the sum made at every call is cheaper than `x W^T + (x A^T) B^T`.

    The sum reads W and writes the result, which the product reads again, `16 * out * in` bytes with the copy the
    product starts from, and `2 r` operations an entry. The delta reads x and writes and reads the output, `4 in + 20
    out` bytes a row, and `2 r (in + out)` operations.
    """
    m = machine(device)
    merged = out * inner * (16 / m.bytes + 2 * rank / m.flops) + m.call
    row = (_FLOAT * inner + 5 * _FLOAT * out) / m.bytes + 2 * rank * (inner + out) / m.flops
    even = max(1, round((merged - 3 * m.call) / row))  # three products of its own become one sum
    n, text = hint(rows)
    if n is None:
        return Verdict(False, f"{text}; merging inside the graph would pay from {even} rows up")
    return Verdict(n >= even, f"{text}; merging inside the graph pays from {even} rows up")
