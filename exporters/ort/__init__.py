"""Sessions of ONNX Runtime that serve many adapters."""
