"""fxgraft: a model-surgery compiler that grafts parameter-efficient adapters by rewriting torch.fx graphs."""

from . import passes
from .backends.aot.loaded_package import Package, load_package
from .backends.aot.package import package
from .backends.compile.inductor import compile
from .backends.compile.kernel_preference import KernelPreference
from .exporters.adapterfiles.export_adapter import export_ort_adapter
from .exporters.checkpoints.load_adapter import load_adapter
from .exporters.checkpoints.save_adapter import save_adapter
from .exporters.checkpoints.swap import swap
from .exporters.onnx.export import OnnxExport, export_onnx
from .exporters.onnx.gpu.gpu_check import check_gpu
from .exporters.onnx.gpu.gpu_report import GpuReport
from .exporters.onnx.quantize import QuantizedOnnx, quantize_onnx
from .exporters.onnx.verify import Verification, verify
from .exporters.ort.session import OrtSession
from .passes.methods import *  # noqa: F403  (every method)
from .passes.models.bank import adapter_ids, add_tenant, bank, remove_tenant, tenants
from .passes.models.combine import combine
from .passes.models.dequantise import dequantise
from .passes.models.factors import to_lora
from .passes.models.merge import merge
from .rewriter.adapter_state import AdapterState
from .rewriter.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ExportError,
    FxgraftError,
    MergeError,
    PackageError,
    ParityError,
    SessionError,
    SpecError,
    TargetError,
    VerifyError,
)
from .rewriter.explain import explain
from .rewriter.exported_program import capture
from .rewriter.materialise import materialise
from .rewriter.parameter_groups import parameter_groups
from .rewriter.program import Program
from .rewriter.rewrite import rewrite
from .rewriter.spec import Spec, Target
from .rewriter.switch import active, active_weights, disabled, remove, set_active
from .rewriter.tensors import adapter_state

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "AdapterState",
    "CaptureError",
    "CheckpointError",
    "ExportError",
    "FxgraftError",
    "GpuReport",
    "KernelPreference",
    "MergeError",
    "OnnxExport",
    "OrtSession",
    "Package",
    "PackageError",
    "ParityError",
    "Program",
    "QuantizedOnnx",
    "SessionError",
    "Spec",
    "SpecError",
    "Target",
    "TargetError",
    "Verification",
    "VerifyError",
    "active",
    "active_weights",
    "adapter_ids",
    "adapter_state",
    "add_tenant",
    "bank",
    "capture",
    "check_gpu",
    "combine",
    "compile",
    "dequantise",
    "disabled",
    "explain",
    "export_onnx",
    "export_ort_adapter",
    "load_adapter",
    "load_package",
    "materialise",
    "merge",
    "package",
    "parameter_groups",
    "passes",
    "quantize_onnx",
    "remove",
    "remove_tenant",
    "rewrite",
    "save_adapter",
    "set_active",
    "swap",
    "tenants",
    "to_lora",
    "verify",
]
__all__ += passes.methods.__all__
