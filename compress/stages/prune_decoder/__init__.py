"""Structured pruning of language models: layers, heads, feed-forward neurons and experts."""
