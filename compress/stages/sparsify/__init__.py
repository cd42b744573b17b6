"""Unstructured pruning: single weights become zero."""
