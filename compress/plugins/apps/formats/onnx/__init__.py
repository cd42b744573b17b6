"""ONNX graphs in bundles."""
