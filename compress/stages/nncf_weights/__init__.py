"""Weight-only quantization of language models with NNCF."""
