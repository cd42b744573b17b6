"""Quantizing a causal decoder block by block, with the weights of one block in memory at a time."""
