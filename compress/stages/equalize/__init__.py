"""Cross-layer equalization and SmoothQuant for language models."""
