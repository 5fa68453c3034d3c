"""Adapter files read for one graph: expanded where they are structured, held against it, and on its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...rewriter.errors import AdapterError
from ..adapterfiles.adapter_format import EXPANDED, STRUCTURED, read_adapter
from ..adapterfiles.fit import check_config, check_fit, check_room, widened_to
from ..adapterfiles.ort_values import Device, TensorInfo, to_ort
from ..adapterfiles.structured import Expander
from .adapter_cache import LoadedAdapter, Source


@dataclass(frozen=True)
class AdapterReader:
    """`AdapterCache`'s reader.

    Args:
        path: of the graph.
        told: its manifest.
        inputs: what it takes of one adapter.
        device: where adapters go.
        stacks: of a bank, whose tenants stay on the CPU until they are copied into a slot.
    """

    path: Path
    told: Mapping[str, Any]
    inputs: Mapping[str, TensorInfo]
    device: Device
    stacks: Mapping[str, torch.Tensor] | None = None
    expand: Expander = field(default_factory=Expander)

    def __call__(self, name: str, source: Source) -> tuple[LoadedAdapter, str]:
        """One adapter, and the digest of its file. Raises `CheckpointError` and `AdapterError`, see
        `OrtSession.load`."""
        if not self.inputs:
            raise AdapterError(
                f"{str(self.path)!r} takes no adapters, it has no inputs for them: export it with "
                "adapters='swappable' or 'bank'"
            )
        content = read_adapter(source.path)
        values = content.values
        own = self.told.get("own")
        if own is not None:
            check_config(name, content.described, own)
        elif content.described is not None:
            values = self.expand(content.described, values, f"adapter {name!r} in {str(source.path)!r}")
        values = widened_to(values, self.inputs)
        ranks = check_fit(name, values, self.inputs, source.partial)
        if self.stacks is not None:
            check_room(name, values, self.stacks)
        expected = self.told.get("fingerprint")
        # Files of other writers carry no fingerprint, and that of a partial adapter covers other sites by design.
        ours = expected is not None and content.adapter_version in (EXPANDED, STRUCTURED)
        if source.check_base and ours and not source.partial and content.model_version != expected:
            raise AdapterError(
                f"adapter {name!r} was trained on other base weights than this graph holds (fingerprint "
                f"{content.model_version:08x}, the graph's is {expected:08x}); check_base=False loads it all the same"
            )
        size = sum(tensor.nbytes for tensor in values.values())
        placed = values if self.stacks is not None else {k: to_ort(tensor, self.device) for k, tensor in values.items()}
        return LoadedAdapter(name, ranks, size, dict(placed), source.serial), content.digest()
