"""VeRA as HF PEFT stores it (0.21): `<site>.vera_lambda_d (r,)`, `<site>.vera_lambda_b (out,)` and, with
`save_projection`, `base_model.vera_A (r, largest in)`, `base_model.vera_B (largest out, r)`.

A stored projection that is the seed's own is drawn here too, and takes no room in folders of ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....passes.methods.vera import VeRA, draw
from ....rewriter.errors import CheckpointError
from ..foreign.foreign_folder import ForeignAdapter, ForeignFolder, Sites
from ..foreign.format import Format, OwnAdapter, Written
from ..foreign.peft_folder import BIASES, check_config, check_sites, peft_sites
from ..foreign.plain_keys import PREFIX

PROJECTION = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


def read(folder: ForeignFolder) -> ForeignAdapter:
    known = {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"}
    check_config(folder, known, BIASES["VERA"])
    method = VeRA(
        rank=folder.value("r", int, 256),
        seed=folder.value("projection_prng_key", int, 0),
        d_initial=folder.value("d_initial", float, 0.1),
        dropout=folder.value("vera_dropout", float, 0.0),
    )
    rest = dict(folder.tensors)
    given = {name: rest.pop(key) for name, key in PROJECTION.items() if key in rest}
    sites, train, values = peft_sites(folder, r"vera_lambda_(?P<name>[bd])", rest)
    check_sites(folder, sites, ("b", "d"))
    values |= {f"{site}.{name}": tensor for site, own in sites.items() for name, tensor in own.items()}
    saved = folder.value("save_projection", bool, True)
    if missing := [key for name, key in PROJECTION.items() if name not in given and (saved or given)]:
        raise folder.lacks(missing)
    if given and (stored := _other_than_drawn(folder, method, sites, given)):
        if not saved:
            raise CheckpointError(
                f"{folder.what} stores another vera_A and vera_B than its seed {method.seed} gives, and with "
                "save_projection=False, as its config says, PEFT reads the seed: one of both is not the adapter's"
            )
        # the seed says nothing any more, and must not make two such adapters look different
        method, values = replace(method, projection="stored", seed=VeRA.seed), values | stored
    return ForeignAdapter(dict.fromkeys(sites, method), values, train)


def _other_than_drawn(folder: ForeignFolder, method: VeRA, sites: Sites, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored projection cut to what the sites read (PEFT gives a second adapter the first one's, which may be
    larger); nothing where the seed gives the same."""
    A, B = given["A"], given["B"]
    columns, rows = max((folder.sizes(site) or (1,))[0] for site in sites), max(len(t["b"]) for t in sites.values())
    if [A.dim(), B.dim(), *A.shape[:1], *B.shape[1:]] != [2, 2, method.rank, method.rank] or (
        A.shape[1] < columns or B.shape[0] < rows
    ):
        raise CheckpointError(
            f"{folder.what}: vera_A is {tuple(A.shape)} and vera_B {tuple(B.shape)}, and its layers need at least "
            f"{(method.rank, columns)} and {(rows, method.rank)}"
        )
    A, B = A[:, :columns], B[:rows]
    drawn = draw(method.rank, columns, rows, method.seed)
    return {} if torch.equal(A, drawn[0]) and torch.equal(B, drawn[1]) else {"A": A, "B": B}


def write(adapter: OwnAdapter) -> Written:
    method = adapter.only_method("projection per VeRA")
    stored = method.projection == "stored"
    if stored and adapter.save_indices is False:
        raise CheckpointError(
            f"{adapter.what} without its A and B: PEFT would draw others; leave save_indices out, or set it to True"
        )
    fields = {
        "peft_type": "VERA",
        "r": method.rank,
        "projection_prng_key": method.seed,
        "save_projection": stored or bool(adapter.save_indices),
        "vera_dropout": method.dropout,
        "d_initial": method.d_initial,
        "fan_in_fan_out": adapter.on_conv1d,
    }
    tensors = {
        f"{PREFIX}{name}.vera_lambda_{letter}": module.tensors()[letter]
        for name, module in adapter.sites.items()
        for letter in "bd"
    }
    if fields["save_projection"]:
        shared = next(iter(adapter.sites.values())).__dict__["shared"].tensors()
        tensors |= {key: shared[name] for name, key in PROJECTION.items()}
    return fields, tensors


FORMAT = Format(read, names=r"vera_lambda_[bd]|vera_[AB]", peft_type="VERA", method=VeRA, write=write, has_indices=True)
