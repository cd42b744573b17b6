"""Checkpoints in the compressed-tensors layout."""
