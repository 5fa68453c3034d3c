"""`OnnxExport`: what an export wrote, in figures and as a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...backends.artifact.parity import Parity
from ...backends.artifact.signature import Axes

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxExport:
    """What was written, and how close it is to torch.

    `inputs`, `outputs` and `adapter_inputs` map names to shapes, with a string for every free dimension; `dynamic_axes`
    maps input names to {axis: name}. `adapter_inputs` may be left out at run: without them the graph is the base model;
    `trained` are those that hold a tensor trained in whole, and no factor of a site.
    `parity` holds the comparisons made, with what each was allowed; none with `check=False`, and then `checked` is
    False. `renamed` has the inputs and outputs whose names in the model cannot be theirs in the graph, as a weight has
    the name or both an input and an output: {"inputs": {model's name: the graph's}, "outputs": ...}. `OrtSession` goes
    by the model's names, and so do `inputs` and `outputs` here.
    """

    path: Path
    adapters: str
    name: str | None
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    dynamic_axes: Axes
    adapter_inputs: dict[str, Shape]
    opset: int
    parity: tuple[Parity, ...]
    tolerance: float
    files: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    renamed: dict[str, dict[str, str]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()

    @property
    def checked(self) -> bool:
        """Whether the graph was run and compared with torch."""
        return bool(self.parity)

    @property
    def bytes(self) -> int:
        """Size of the graph and its external data."""
        return sum(self.files.values())

    def __str__(self) -> str:
        def shapes(values: Mapping[str, Shape]) -> str:
            return ", ".join(f"{name} ({' x '.join(map(str, shape)) or 'scalar'})" for name, shape in values.items())

        lines = [
            f"{self.path}: {self.adapters}, opset {self.opset}, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s",
            f"  inputs   {shapes(self.inputs)}",
            f"  outputs  {shapes(self.outputs)}",
        ]
        if self.adapter_inputs:
            legs = [name.rpartition(".") for name in self.adapter_inputs if name not in self.trained]
            sites, kinds = {site for site, _, _ in legs}, sorted({leg for _, _, leg in legs})
            said = [f"{len(sites)} sites ({', '.join(kinds)} of any rank)"] if sites else []
            said += [f"{len(self.trained)} trained tensors"] if self.trained else []
            lines.append(f"  adapter  {', '.join(said)}")
        lines.append("  parity   relative to each output's largest value" if self.checked else "  parity   not checked")
        lines += [
            f"    {check.case:<32} {check.relative:8.1e}  (allowed {check.allowed:.1e})  {check.sizes}"
            for check in self.parity
        ]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])
