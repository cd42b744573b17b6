"""INT8 quantization of ONNX graphs, dynamic, static or accuracy-aware."""
