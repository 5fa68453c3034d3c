"""Adapters of an exported graph: `.onnx_adapter` files."""
