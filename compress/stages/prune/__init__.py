"""Structured pruning of attention heads, feed-forward neurons, layers and convolution channels."""
