"""A graph in a session of onnxruntime, spoken to by the model's names; and one that is only run to be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....backends.artifact.parity import sizes_of
from ....rewriter.errors import ExportError, ParityError
from ....rewriter.method import ADAPTER_IDS
from ...adapterfiles import graph_manifest
from ...adapterfiles.adapter_inputs import site_of, tensor_of
from ...adapterfiles.ort_values import TYPES, Device, TensorInfo, to_array, to_ort
from ..graph.widen import widened

Inputs = Mapping[str, torch.Tensor]


class OrtGraph:
    """A session, with the manifest of its graph; `told` is that of a graph which does not hold its own yet.

    `inputs`, `outputs` and `adapter_inputs` describe it by the model's names, which the graph's may not be.
    """

    def __init__(self, session: Any, told: Mapping[str, Any] | None = None) -> None:
        self.session = session
        self.manifest = graph_manifest.load(graph_manifest.metadata(session)) if told is None else dict(told)
        self._inputs, self.graph_outputs = graph_manifest.renamed(self.manifest or {})
        self.inputs = _infos(session.get_inputs(), self._inputs)
        self.outputs = _infos(session.get_outputs(), self.graph_outputs)
        self.adapter_inputs = _infos(session.get_overridable_initializers(), {})

    def lost(self) -> list[str]:
        """The adapter inputs that the manifest tells of and the graph has no more."""
        told = self.manifest or {"adapters": "merged"}
        trained = told.get("trained", ())
        sites = told.get("sites", ()) if told["adapters"] != "merged" and "own" not in told else ()
        begun, heads = (
            {site_of(name) for name in (*self.adapter_inputs, *trained)},
            set(map(tensor_of, self.adapter_inputs)),
        )
        # a part of a fused weight may be given as the whole weight, which is the input then
        gone = [site for site in sites if begun.isdisjoint({site, site.partition("[")[0]})]
        ids = [ADAPTER_IDS] if told["adapters"] == "bank" and ADAPTER_IDS not in self.inputs else []
        return [*gone, *(name for name in trained if name not in heads), *ids]

    def run(
        self,
        inputs: Mapping[str, Any],
        adapter: Mapping[str, Any],
        outputs: Sequence[str],
        kept: Sequence[str] = (),
        device: Device | None = None,
    ) -> list[Any]:
        """One run on OrtValues, which may go beside others: `outputs` on the CPU, then those `kept`, on the device.

        With a device every input is bound, and onnxruntime copies those from elsewhere. Active adapters
        (`RunOptions.add_active_adapter`) do not apply to bound runs, so adapter tensors are the inputs they are.
        """
        values = {**{self._inputs.get(name, name): value for name, value in inputs.items()}, **adapter}
        outputs = [self.graph_outputs.get(name, name) for name in outputs]
        if device is None:
            return list(self.session.run_with_ort_values([*outputs, *kept], values))
        binding = self.session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        for name in kept:
            binding.bind_output(name, device.type, device.index)
        binding.synchronize_inputs()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return list(binding.get_outputs())


def _infos(values: Sequence[Any], called: Mapping[str, str]) -> dict[str, TensorInfo]:
    """What a graph takes or gives, by the model's names; `called` are the graph's own where they differ."""
    models = {its: name for name, its in called.items()}
    named = [(models.get(value.name, value.name), value) for value in values]
    return {name: TensorInfo(name, tuple(value.shape), value.type) for name, value in named}


def options() -> Any:
    """Options of a session without onnxruntime's remark on every overridable initializer, the point of our graphs."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    return made


class CheckGraph(OrtGraph):
    """A graph on the CPU, for a handful of runs. A bfloat16 one, which the CPU has no kernels for, computes in float32
    with its bfloat16 weights. Raises `ExportError` where it does not load."""

    def __init__(self, path: Path, told: Mapping[str, Any]) -> None:
        import onnxruntime

        set_up = options()
        # Where a graph that is given as bytes has its external weights.
        set_up.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        # Packed weights are a second copy of them.
        set_up.add_session_config_entry("session.disable_prepacking", "1")
        try:
            graph = widened(path) or str(path)
            session = onnxruntime.InferenceSession(graph, set_up, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's error classes share no base but Exception
            raise ExportError(f"onnxruntime does not load the exported graph: {error}") from error
        super().__init__(session, told)

    def compute(self, case: str, inputs: Inputs, adapter: Inputs | None = None) -> dict[str, np.ndarray]:
        """Every output. Raises `ParityError` where onnxruntime fails, naming the case."""
        graph = {**self.inputs, **self.adapter_inputs}

        def values(tensors: Inputs) -> dict[str, Any]:
            wide = {name for name in tensors if name in graph and TYPES.get(graph[name].type) is torch.float32}
            return {name: to_ort(tensor.float() if name in wide else tensor) for name, tensor in tensors.items()}

        try:
            results = self.run(values(inputs), values(adapter or {}), list(self.outputs))
        except Exception as error:  # as above
            raise ParityError(f"onnxruntime fails on the graph ({case}; {sizes_of(inputs)}): {error}") from error
        return {name: to_array(value) for name, value in zip(self.outputs, results, strict=True)}
