"""What a graph says of its export: the manifest, and the record that `verify` repeats the checks from.

fxgraft.manifest   mode, configs, sites, versions: what the graph is          (`graph_manifest`)
fxgraft.record     how inputs are drawn, what they gave, how far from torch   (`Record`)
fxgraft.seal       the hash of all that, and of the weights beside it         (`seal`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....backends.artifact.random_inputs import describe_inputs, draw
from ....backends.artifact.signature import Axes, Example, add_up, arguments, with_parts
from ....rewriter.errors import SessionError, VerifyError
from ...adapterfiles import graph_manifest as manifest
from .seal import check_seal, seal

RECORD = "fxgraft.record"


@dataclass(frozen=True)
class Record:
    """The inputs of an export, described and not held, its comparisons with torch, and what the graph gave (`probes`,
    each with its `sizes`, `seed`, `case` and, of a bank, `ids`)."""

    inputs: dict[str, dict[str, Any]]
    constants: dict[str, Any]
    axes: Axes
    nested: dict[str, dict[str, str]] = field(default_factory=dict)
    parity: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, example: Example, axes: Axes, given: bool = False) -> Record:
        return cls(describe_inputs(example, given), example.constants, axes, example.nested)

    def draw(self, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        """Random inputs like the example's, on the CPU."""
        return draw(self.inputs, self.axes, sizes, seed)

    def like(self, tensors: Mapping[str, torch.Tensor], count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Random inputs in the sizes of these, where they are."""
        sizes = {label: tensors[name].shape[axis] for name, named in self.axes.items() for axis, label in named.items()}
        for seed in range(count):
            yield {name: tensor.to(tensors[name].device) for name, tensor in self.draw(sizes, seed).items()}

    def arguments(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A model's arguments, copies all."""
        return arguments({**tensors, **self.constants}, self.nested)

    def unseen_sizes(self) -> list[dict[str, int]]:
        """Sizes for the dynamic axes that the export did not use: batches larger than any, sequences not longer."""
        sizes = {
            label: self.inputs[name]["shape"][axis]
            for name, named in self.axes.items()
            for axis, label in named.items()
        }
        seen = with_parts(sizes)
        return [
            add_up({label: size + 3 if "batch" in label else max(size - 2, 1) for label, size in seen.items()}),
            add_up({label: 1 if "batch" in label else size for label, size in seen.items()}),
        ]


def write_description(file: Path, told: Mapping[str, Any], record: Record) -> None:
    """Append manifest, record and seal to a graph."""
    seal(file, {manifest.KEY: manifest.dump(told), RECORD: json.dumps(dataclasses.asdict(record))})


def read_description(file: Path) -> tuple[dict[str, Any], Record]:
    """Manifest and record of a graph, every byte of which is as it was written. Raises `VerifyError`."""
    metadata = check_seal(file)
    try:
        told = manifest.load(metadata)
    except SessionError as error:
        raise VerifyError(str(error)) from error
    if told is None or RECORD not in metadata:
        raise VerifyError(
            f"{str(file)!r} was written in another format; this fxgraft reads {manifest.FORMAT}: update it"
        )
    said = json.loads(metadata[RECORD])
    # JSON has strings for keys.
    axes = {name: {int(axis): label for axis, label in named.items()} for name, named in said["axes"].items()}
    return told, Record(**{**said, "axes": axes})
