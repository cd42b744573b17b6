"""Compress a trained model into the smallest, fastest artifact that still does its job, and prove it."""

__version__ = "0.1.0"
