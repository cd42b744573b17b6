"""ONNX Runtime's own format."""
