"""Attention as one operator of ONNX Runtime: traced through transformers' interface, or found in the graph."""
