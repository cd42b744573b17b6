"""Graphs in ONNX Runtime's own format in bundles."""
