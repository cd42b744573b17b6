"""A model in use: whether its inputs are still what it was compressed for, and which of two answers them better."""
