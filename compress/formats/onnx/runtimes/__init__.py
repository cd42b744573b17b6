"""Runtimes that open ONNX files."""
