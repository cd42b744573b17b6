"""A model's attention as one operator of ONNX Runtime: plugged in while it is traced, or found in the graph."""
