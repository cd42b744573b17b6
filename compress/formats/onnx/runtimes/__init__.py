"""The runtimes that open ONNX files, and what they need."""
