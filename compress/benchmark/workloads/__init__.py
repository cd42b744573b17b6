"""Workloads that are timed: calls on examples, text generation and image generation."""
