"""Comparison of measured models, and the gate that judges it."""
