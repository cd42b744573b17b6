"""Quantization-aware training of encoders and vision models, exported to ONNX."""
