"""fxgraft: a model-surgery compiler that grafts parameter-efficient adapters by rewriting torch.fx graphs."""

from . import passes
from .backends.aot import package
from .backends.aot_package import Package, load_package
from .backends.inductor import compile
from .backends.kernels import KernelPreference
from .exporters.adapterfile import export_ort_adapter
from .exporters.checkpoint import load_adapter, save_adapter
from .exporters.errors import SessionError, VerifyError
from .exporters.gpu_check import GpuReport, check_gpu
from .exporters.onnx import OnnxExport, export_onnx
from .exporters.ort import OrtSession
from .exporters.quantize import QuantizedOnnx, quantize_onnx
from .exporters.swap import swap
from .exporters.tenants import add_tenant, bank
from .exporters.verify import Verification, verify
from .passes.analysis import lora_breakdown
from .passes.bank import adapter_ids, remove_tenant, tenants
from .passes.combine import combine
from .passes.estimate import estimate_update
from .passes.experts import suggest_experts
from .passes.factors import to_lora
from .passes.merge import merge
from .passes.methods import GLoRA, GLoRAPath, HydraLoRA, LoRA, LoRASB, LoRAXS, PRoLoRA, UniLoRA
from .passes.methods.lora_sb import UpdateEstimate
from .passes.paths import fix_paths, get_paths, set_paths
from .passes.search import search_paths
from .rewriter.adapterstate import AdapterState
from .rewriter.api import active, active_weights, adapter_state, disabled, remove, rewrite, set_active
from .rewriter.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ExportError,
    FxgraftError,
    MergeError,
    PackageError,
    ParityError,
    SpecError,
    TargetError,
)
from .rewriter.explain import explain
from .rewriter.exported import capture
from .rewriter.groups import parameter_groups
from .rewriter.materialise import materialise
from .rewriter.passbase import Program
from .rewriter.spec import Spec, Target

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "AdapterState",
    "CaptureError",
    "CheckpointError",
    "ExportError",
    "FxgraftError",
    "GLoRA",
    "GLoRAPath",
    "GpuReport",
    "HydraLoRA",
    "KernelPreference",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "MergeError",
    "OnnxExport",
    "OrtSession",
    "PRoLoRA",
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
    "UniLoRA",
    "UpdateEstimate",
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
    "disabled",
    "estimate_update",
    "explain",
    "export_onnx",
    "export_ort_adapter",
    "fix_paths",
    "get_paths",
    "load_adapter",
    "load_package",
    "lora_breakdown",
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
    "search_paths",
    "set_active",
    "set_paths",
    "suggest_experts",
    "swap",
    "tenants",
    "to_lora",
    "verify",
]
