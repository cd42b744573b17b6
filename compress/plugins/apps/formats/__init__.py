"""Formats of models in bundles: how each is read, and its examples in each language."""
