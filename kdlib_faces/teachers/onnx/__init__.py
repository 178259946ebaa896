"""ONNX graphs as teachers."""
