"""Files that leave the process: checkpoints, ONNX graphs, ONNX Runtime adapters."""

from . import pretrained  # noqa: F401 (registers what `save_pretrained` of an adapted model does)
