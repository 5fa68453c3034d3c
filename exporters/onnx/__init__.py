"""ONNX graphs: exporting, opening adapters as inputs, and checking what was written."""
