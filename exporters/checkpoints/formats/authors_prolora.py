"""PRoLoRA as its authors' fork of PEFT stores it: per site `lora_A.weight (q, ceil(in/m))`,
`lora_B.weight (ceil(out/n), q)` and, where `u > 0`, `lora_A_vec (u, in)`, `lora_B_vec (u, out)`.

Without rotation, or with steps that are not the method's own, it opens as the LoRA that is the same function.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ....passes.methods.lora import LoRA
from ....passes.methods.prolora.prolora import PRoLoRA
from ....passes.methods.prolora.rotated_chunks import expand
from ....rewriter.errors import CheckpointError
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder, Tensors
from ..foreign.format import Format
from ..foreign.peft_folder import check_config, check_sites, peft_sites

# init2zero_via_vec and enable_lora_bias are not among them: only without them are the tensors what they are here
FIELDS = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "unshared_r", "reduce_lora_A_x", "reduce_lora_B_x"),
        *("enable_lora_rotation", "enable_lora_vec", "lora_A_shift_size", "lora_B_shift_size"),
    }
)
NAMES = {
    "lora_A.weight": "A_shared",
    "lora_B.weight": "B_shared",
    "lora_A_vec": "A_unshared",
    "lora_B_vec": "B_unshared",
}


def read(folder: ForeignFolder) -> ForeignAdapter:
    what = folder.what
    check_config(folder, FIELDS)
    method = PRoLoRA(
        rank=folder.value("r", int),
        unshared=folder.value("unshared_r", int, 0),
        a_chunks=folder.value("reduce_lora_A_x", int),
        b_chunks=folder.value("reduce_lora_B_x", int),
        alpha=folder.value("lora_alpha", float),
        dropout=folder.value("lora_dropout", float, 0.0),
    )
    if method.unshared and not folder.value("enable_lora_vec", bool, True):
        raise CheckpointError(f"{what}: enable_lora_vec=False and unshared_r={method.unshared} contradict each other")
    absent = {name for name in NAMES if not (method.unshared if "_vec" in name else method.shared)}
    sites, train, values = peft_sites(folder, f"(?P<name>{'|'.join(map(re.escape, NAMES))})")
    check_sites(folder, sites, [name for name in NAMES if name not in absent], loosely=True)
    steps = _steps(folder, method)
    for site, given in sites.items():
        for name in absent & set(given):  # of rank 0: stored without elements, or not at all
            if given[name].numel():
                raise CheckpointError(f"{what}: '{site}.{name}' has values, and unshared_r leaves it no rank")
        ours = {NAMES[name]: tensor for name, tensor in given.items() if name not in absent}
        if "B_unshared" in ours:
            ours["B_unshared"] = ours["B_unshared"].t()
        if steps is not None:
            ours = _expanded(folder, ours, method, steps, site)
        values |= {f"{site}.{name}": tensor for name, tensor in ours.items()}
    if steps is None:
        return ForeignAdapter(dict.fromkeys(sites, method), values, train)
    lora = LoRA(method.rank, method.alpha, method.dropout)
    warning = "its chunks are not rotated as PRoLoRA's are; it opens as a LoRA of the same function"
    return ForeignAdapter(dict.fromkeys(sites, lora), values, train, warning)


def _steps(folder: ForeignFolder, method: PRoLoRA) -> tuple[int, int] | None:
    """By how many ranks A's and B's copies are rotated, one against the next; None where that is PRoLoRA's own."""
    own = tuple(max(method.shared // chunks, 1) for chunks in (method.a_chunks, method.b_chunks))
    if folder.value("enable_lora_rotation", bool, True):
        keys = ("lora_A_shift_size", "lora_B_shift_size")
        steps = tuple(folder.value(key, int, step) for key, step in zip(keys, own, strict=True))
    else:
        steps = (0, 0)
    same = all((a - b) % max(method.shared, 1) == 0 for a, b in zip(steps, own, strict=True))
    return None if same else (steps[0], steps[1])


def _expanded(
    folder: ForeignFolder, given: Tensors, method: PRoLoRA, steps: tuple[int, int], site: str
) -> dict[str, Tensor]:
    """The factors in full, `A (r, in)` and `B (out, r)`, rotated by these steps instead of the method's own."""
    what, long = folder.what, folder.sizes(site)
    if long is None:
        kind = type(folder.model).__name__
        raise CheckpointError(f"{what} was made for another model: this {kind} has no layer {site!r}")
    q, factors = method.shared, []
    kinds = (("A", method.a_chunks, given["A_shared"]), ("B", method.b_chunks, given["B_shared"].t()))
    for (letter, chunks, chunk), length, step in zip(kinds, long, steps, strict=True):
        if tuple(chunk.shape) != (q, -(-length // chunks)) or chunks > length:
            raise CheckpointError(f"{what}: chunk {letter} of {site!r} is {tuple(chunk.shape)}, long side {length}")
        rows = (torch.arange(q)[:, None] + step * torch.arange(chunks)) % q
        factors.append(expand(chunk, rows, length))
    A, B = factors[0], factors[1].t()
    if method.unshared:
        A, B = torch.cat([A, given["A_unshared"].to(A.dtype)]), torch.cat([B, given["B_unshared"].to(B.dtype)], 1)
    return {"A": A, "B": B}


FORMAT = Format(
    read,
    names="lora_[AB]_vec",
    key=r"\.lora_A_vec",
    entry=lambda config: not {"reduce_lora_A_x", "unshared_r"}.isdisjoint(config),
)
