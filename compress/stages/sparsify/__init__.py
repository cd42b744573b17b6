"""Unstructured pruning: single weights or blocks of weights become zero."""
