"""`OrtSession`: one graph in ONNX Runtime, several adapters, any or none of them per run."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..rewriter.errors import AdapterError, listing, near_misses
from . import manifest
from .adapterfile import ADAPTER_VERSION, TensorInfo, check_fit, export_ort_adapter, overlap, read_adapter
from .errors import SessionError

_PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory: the rank of every site, its size, and its tensors on the session's device."""

    name: str
    ranks: dict[str, int]
    bytes: int
    values: dict[str, Any]


class OrtSession:
    """A graph of `export_onnx`, ready to run with or without adapters.

    session = OrtSession("model.onnx")
    session.load("a", "a.onnx_adapter")
    session.run({"input_ids": ids, "attention_mask": mask}, adapter="a")["logits"]

    Runs may come from several threads at once. Loading while others run is safe: a run keeps the adapter it began with.
    `inputs`, `outputs` and `adapter_inputs` describe the graph ({name: TensorInfo}), `providers` is what runs it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        *,
        threads: int | None = None,
    ):
        """providers=None is CUDA where this onnxruntime has it and it starts, the CPU otherwise; providers asked for
        are the ones used, in order, or it is a `SessionError`. threads bounds the threads of one operator."""
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise SessionError(f"there is no graph {str(path)!r}")
        available = onnxruntime.get_available_providers()
        wanted = [entry if isinstance(entry, str) else entry[0] for entry in providers or ()]
        absent = [name for name in wanted if name not in available]
        if absent or (providers is not None and not wanted):
            raise SessionError(
                f"providers {listing(absent)} are not in this onnxruntime, which has {listing(available)}"
            )
        options = onnxruntime.SessionOptions()
        # Severity 2 remarks on every overridable initializer, which is the point of these graphs.
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        choices = (
            [list(providers)]
            if providers is not None
            else [[name for name in _PREFERRED[start:] if name in available] for start in range(len(_PREFERRED))]
        )
        self._session = _start(onnxruntime, self.path, options, choices)
        self.providers: list[str] = self._session.get_providers()
        lost = [name for name in wanted if name not in self.providers]
        if lost:
            raise SessionError(f"providers {listing(lost)} did not start; onnxruntime would run on {self.providers}")
        self._onnxruntime = onnxruntime
        self._device = "cuda" if self.providers[0].startswith(("CUDA", "Tensorrt")) else "cpu"
        self.manifest = manifest.load(self._session.get_modelmeta().custom_metadata_map)
        self.inputs = _infos(self._session.get_inputs())
        self.outputs = _infos(self._session.get_outputs())
        self.adapter_inputs = _infos(self._session.get_overridable_initializers())
        self._adapters: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name (a copy)."""
        with self._lock:
            return dict(self._adapters)

    def load(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        replace: bool = False,
        partial: bool = False,
        check_base: bool = True,
    ) -> LoadedAdapter:
        """Read an `.onnx_adapter` file and keep it under `name`.

        replace      take the place of a loaded adapter of that name (otherwise an error).
        partial      allow whole sites (or trained tensors) to be missing; they stay as in the base model.
        check_base   compare the base weights' fingerprint in the file with the graph's.

        Raises `CheckpointError` for a file that is damaged or something else, `AdapterError` where it does not fit the
        graph (see `adapterfile.check_fit`). Nothing is loaded then.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a non-empty string, not {name!r}")
        if not replace and name in self.adapters:
            raise AdapterError(f"an adapter {name!r} is loaded already; pass replace=True, or unload it first")
        if not self.adapter_inputs:
            raise AdapterError(
                f"{str(self.path)!r} takes no adapters, it has no inputs for them: export it with adapters='swappable'"
            )
        content = read_adapter(path)
        ranks = check_fit(name, content.values, self.adapter_inputs, partial)
        expected = (self.manifest or {}).get("fingerprint")
        # Files of other writers carry no fingerprint, and that of a partial adapter covers other sites by design.
        ours = expected is not None and content.adapter_version == ADAPTER_VERSION
        if check_base and ours and not partial and content.model_version != expected:
            raise AdapterError(
                f"adapter {name!r} was trained on other base weights than this graph holds (fingerprint "
                f"{content.model_version:08x}, the graph's is {expected:08x}); check_base=False loads it all the same"
            )
        # Copies: the file's own values are views of a mapping that changes when somebody rewrites the file.
        values = {key: self._place(value) for key, value in content.values.items()}
        size = sum(value.tensor_size_in_bytes() for value in values.values())
        adapter = LoadedAdapter(name, ranks, size, values)
        with self._lock:
            if not replace and name in self._adapters:
                raise AdapterError(f"an adapter {name!r} is loaded already; pass replace=True, or unload it first")
            self._adapters[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises `AdapterError` where none has that name."""
        with self._lock:
            if name not in self._adapters:
                raise AdapterError(self._absent(name))
            del self._adapters[name]

    def run(
        self,
        inputs: Mapping[str, Any],
        adapter: str | Sequence[str] | None = None,
        adapter_ids: Sequence[int] | np.ndarray | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the graph once and return {output name: array}.

        inputs       {name: numpy array, torch tensor or nested list} for every name in `inputs`, of the graph's dtypes.
        adapter      a loaded adapter's name, None for the base model; a sequence of names for partial adapters that set
                     different tensors.
        adapter_ids  one adapter per row of the batch; needs a graph with a bank.
        outputs      the outputs to compute; None is all.

        Raises `SessionError` for inputs or outputs that do not fit, `AdapterError` for adapters.
        """
        if adapter_ids is not None:
            raise SessionError(
                "adapter_ids needs a graph with a bank of adapters; this one takes one adapter for the whole batch "
                "(adapter=)"
            )
        wanted = list(self.outputs) if outputs is None else list(outputs)
        unknown = [name for name in wanted if name not in self.outputs]
        if unknown or not wanted:
            raise SessionError(f"unknown outputs {listing(unknown)}; the graph has {listing(self.outputs)}")
        feeds = {name: self._wrap(array) for name, array in self._check_inputs(inputs).items()}
        feeds.update(self._active(adapter))
        try:
            results = self._session.run_with_ort_values(wanted, feeds, self._onnxruntime.RunOptions())
        except Exception as error:  # onnxruntime's classes share no base
            raise SessionError(f"onnxruntime failed on {str(self.path)!r}: {error}") from error
        return {name: value.numpy() for name, value in zip(wanted, results, strict=True)}

    def _active(self, adapter: str | Sequence[str] | None) -> dict[str, Any]:
        if adapter is None:
            return {}
        names = [adapter] if isinstance(adapter, str) else list(adapter)
        with self._lock:
            absent = [name for name in names if name not in self._adapters]
            if absent:
                raise AdapterError(self._absent(absent[0]))
            chosen = [self._adapters[name] for name in names]
        values: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for one in chosen:
            shared = overlap(values, one.values)
            if shared:
                raise AdapterError(
                    f"adapters {owner[shared[0]]!r} and {one.name!r} both set {listing(shared)}: one run takes one "
                    "value each. Run them one after the other, or combine them before the export"
                )
            values.update(one.values)
            owner.update(dict.fromkeys(one.values, one.name))
        return values

    def _absent(self, name: str) -> str:
        loaded = listing(self._adapters) if self._adapters else "none"
        return f"no adapter {name!r} is loaded; loaded: {loaded}. Use load({name!r}, '<file>.onnx_adapter')"

    def _check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if not isinstance(inputs, Mapping):
            raise SessionError(f"inputs is a {type(inputs).__name__}; give a dict with {listing(self.inputs)}")
        unknown = [name for name in inputs if name not in self.inputs]
        missing = [name for name in self.inputs if name not in inputs]
        if unknown or missing:
            said = [f"unknown {listing(unknown)}"] if unknown else []
            said += [f"missing {listing(missing)}"] if missing else []
            close = near_misses(unknown[0], self.inputs) if unknown else []
            raise SessionError(
                f"inputs do not fit the graph: {', '.join(said)}; it takes {listing(self.inputs)}"
                + (f" (did you mean {close[0]!r}?)" if close else "")
            )
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, str]] = {}
        for name, info in self.inputs.items():
            given = inputs[name]
            array = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
            if array.dtype.name != info.dtype:
                raise SessionError(f"input {name!r} is {array.dtype.name}, the graph takes {info.dtype}")
            if array.ndim != len(info.shape):
                raise SessionError(f"input {name!r} has {array.ndim} dimensions {array.shape}, the graph takes {info}")
            for axis, (want, got) in enumerate(zip(info.shape, array.shape, strict=True)):
                if isinstance(want, int) and want != got:
                    raise SessionError(f"input {name!r} has size {got} in axis {axis}, the graph takes {info}")
                if isinstance(want, str):
                    size, first = sizes.setdefault(want, (got, name))
                    if size != got:
                        raise SessionError(
                            f"inputs {first!r} and {name!r} have different sizes in axis {want!r}: {size} and {got}"
                        )
            arrays[name] = np.ascontiguousarray(array).reshape(array.shape)
        return arrays

    def _wrap(self, array: np.ndarray) -> Any:
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device)

    def _place(self, value: Any) -> Any:
        """A copy of an adapter tensor on the session's device; bfloat16 has no numpy form and stays where it is."""
        return value if value.data_type() == "tensor(bfloat16)" else self._wrap(value.numpy().copy())


def _start(onnxruntime: Any, path: Path, options: Any, choices: Sequence[Sequence[Any]]) -> Any:
    """A session with the first of `choices` that starts."""
    failed: Exception | None = None
    for providers in choices:
        try:
            # onnxruntime's own fallback prints a banner and goes on on the CPU: never what was asked for.
            return onnxruntime.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
        except Exception as error:  # onnxruntime's classes share no base
            failed = error
    raise SessionError(f"onnxruntime cannot load {str(path)!r}: {failed}") from failed


def _infos(values: Sequence[Any]) -> dict[str, TensorInfo]:
    return {value.name: TensorInfo(value.name, tuple(value.shape), value.type) for value in values}


__all__ = ["LoadedAdapter", "OrtSession", "export_ort_adapter"]
