"""Utilities shared by all layers, each module named after what it contains."""
