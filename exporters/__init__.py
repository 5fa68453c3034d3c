"""Files that leave the process: checkpoints, ONNX graphs, ONNX Runtime adapters."""

from .checkpoints import own_format, save_pretrained  # noqa: F401 (registers what `Package.swap` does with a folder)
