"""Starting a session on the providers that were asked for.

onnxruntime falls back to the CPU in three quiet ways: a provider that is not in the build, one whose libraries do not
load, and nodes without a kernel. The first two are errors here (a warning where no provider was asked for); the third
is one with `strict`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...rewriter.errors import SessionError, listing
from ..adapterfiles.ort_values import CPU, Device
from ..onnx.checks.ort_graph import options
from ..onnx.graph.widen import has_bfloat16

_CPU = "CPUExecutionProvider"
_PREFERRED = ("CUDAExecutionProvider",)
_ON_GPU = ("CUDA", "Tensorrt", "NvTensorRT")
_INSTALL = {
    "CUDAExecutionProvider": "`pip install onnxruntime-gpu` in place of onnxruntime, with the CUDA and cuDNN it names",
    "TensorrtExecutionProvider": "`pip install onnxruntime-gpu tensorrt` in place of onnxruntime, with CUDA",
    "ROCMExecutionProvider": "a ROCm build of onnxruntime",
    "OpenVINOExecutionProvider": "`pip install onnxruntime-openvino` in place of onnxruntime",
    "CoreMLExecutionProvider": "onnxruntime for macOS",
    "DmlExecutionProvider": "`pip install onnxruntime-directml` in place of onnxruntime",
}

Provider = str | tuple[str, dict[str, Any]]


def start(path: Path, providers: Sequence[Provider] | None, threads: int | None, strict: bool) -> Any:
    """An `InferenceSession` on exactly these providers; None is CUDA where it is there and starts, else the CPU.

    strict: no node may run on the CPU. Raises `SessionError` where a provider is missing or does not start.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    chosen: list[Provider] = [name for name in _PREFERRED if name in available] if providers is None else [*providers]
    if isinstance(providers, str) or any(not isinstance(_name(one), str) for one in chosen):
        raise SessionError(f"providers={providers!r}: give a list of names, or of (name, options)")
    _check_available(chosen, available, asked=providers is not None)
    set_up = options()
    if threads is not None:
        set_up.intra_op_num_threads = threads
    if strict:
        # onnxruntime adds the CPU provider by itself; named and forbidden at once it refuses to start.
        chosen = [entry for entry in chosen if _name(entry) != _CPU]
        if not chosen:
            raise SessionError(
                f"strict=True forbids the CPU, and no other provider is chosen; this onnxruntime has "
                f"{listing(available)}. {_how('CUDAExecutionProvider')}"
            )
        set_up.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    elif providers is None:
        chosen = [*chosen, _CPU]
    try:
        # onnxruntime's own fallback prints a banner and goes on on the CPU: never what was asked for.
        session = onnxruntime.InferenceSession(str(path), set_up, providers=chosen, enable_fallback=0)
        lost = [_name(entry) for entry in chosen if _name(entry) not in session.get_providers()]
        reason = f"onnxruntime would run on {listing(session.get_providers())}"
    except Exception as error:  # onnxruntime's classes share no base
        first = _name(chosen[0])
        if providers is not None or strict or first == _CPU:
            raise SessionError(f"onnxruntime cannot load {str(path)!r}: {error}{_narrow(path, chosen)}") from error
        session = start(path, [_CPU], threads, strict=False)
        lost, reason = [first], str(error)
    if lost and (providers is not None or strict):
        raise SessionError(f"providers {listing(lost)} did not start: {reason}. {_how(lost[0])}")
    if lost:
        warnings.warn(
            f"{listing(lost)} did not start ({reason}), so the session runs on the CPU. {_how(lost[0])}; "
            f"providers=[{lost[0]!r}] makes this an error, providers=[{_CPU!r}] is silent",
            stacklevel=3,
        )
    return session


def _check_available(chosen: Sequence[Provider], available: Sequence[str], asked: bool) -> None:
    absent = [_name(entry) for entry in chosen if _name(entry) not in available]
    if absent:
        raise SessionError(
            f"providers {listing(absent)} are not in this onnxruntime, which has {listing(available)}. "
            + _how(absent[0])
        )
    if asked and not chosen:
        raise SessionError(f"providers is empty; this onnxruntime has {listing(available)}, None lets fxgraft choose")


def _how(provider: str) -> str:
    return f"{provider} needs {_INSTALL.get(provider, 'a build of onnxruntime that has it')}"


def _narrow(path: Path, chosen: Sequence[Provider]) -> str:
    """What to say of a bfloat16 graph that does not start on the CPU."""
    import onnx_ir as ir

    try:
        narrow = [_name(entry) for entry in chosen] == [_CPU] and has_bfloat16(ir.load(path))
    except Exception:  # damaged in whatever way: onnxruntime's own text stands
        return ""
    return ". The CPU has few bfloat16 kernels: run it on CUDA, or export the model in float32" if narrow else ""


def _name(entry: Provider) -> str:
    return entry if isinstance(entry, str) else entry[0] if isinstance(entry, (tuple, list)) and entry else entry


def device_of(session: Any) -> Device:
    """Where the session's first provider keeps its tensors."""
    first = session.get_providers()[0]
    if not first.startswith(_ON_GPU):
        return CPU
    return Device("cuda", int(session.get_provider_options()[first].get("device_id", 0)))
