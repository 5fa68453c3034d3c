"""Files that leave the process: checkpoints, ONNX graphs, ONNX Runtime adapters."""
