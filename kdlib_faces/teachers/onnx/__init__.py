"""ONNX graphs as teachers: running, importing and inspecting them."""
