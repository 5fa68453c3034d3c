"""Files that leave the process: checkpoints, ONNX graphs, ONNX Runtime adapters."""

from .checkpoints import (
    own_format,  # noqa: F401 (registers what `Package.swap` does with a folder)
    save_pretrained,  # noqa: F401 (registers what `save_pretrained` of an adapted model does)
)
